"""Find the program in a model's reply, or make one of its continuation of a prompt.

Models differ in how neatly they fence code, so this reads what a person would read as the program. The strict check of
the format that training rewards is another matter, and does not belong here.
"""

import ast
import re
import textwrap
import threading
import warnings

_TERMINATORS = re.compile(r"<\|(?:im_end|endoftext|dlm_pad)\|>")
# The method's own prompt has a fence open at the end of a text line, so a ```python is one wherever it stands.
_PYTHON_FENCE = re.compile(r"```[ \t]*(?:python|py)[0-9.]*(?![\w.+-])[^\n`]*(?:\n|\Z)", re.IGNORECASE)
_ANY_FENCE = re.compile(r"^[ \t]*```[^\n`]*(?:\n|\Z)", re.MULTILINE)
# Backticks within a line are the program's own: x = "```".
_CLOSING_FENCE = re.compile(r"^[ \t]*```|```[ \t]*$", re.MULTILINE)
_DEFINITION = re.compile(r"(?:async )?def |class |@\w")
_CODE = re.compile(rf"\s|{_DEFINITION.pattern}|(?:from|import|return|if|for|while|with|try|assert|print)\b|\w+ = ")

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def program_from(reply: str) -> str:
    """The first ```python block, else the first fenced block, else the text itself; all up to the first terminator.

    Text without a fence loses the prose around its one stretch of code.
    """
    text = _until_terminator(reply)
    opening = _PYTHON_FENCE.search(text) or _ANY_FENCE.search(text)
    if opening is None:
        return _without_prose(text.strip("\n"))  # and no more: a completion's indentation is part of it
    block = _CLOSING_FENCE.split(text[opening.end() :], maxsplit=1)[0].strip("\n")
    # only where need be: dedent also empties blank lines, which may stand in a string
    return textwrap.dedent(block) if block[:1].isspace() else block


def completed(prompt: str, completion: str, entry_point: str) -> str:
    """A whole program of a base model's continuation of `prompt`, cut behind the function asked for.

    What follows the function is kept where the function needs it (helpers, imports), and dropped otherwise: tests,
    prose, a next function cut in half. A continuation that says the function again from its head, or answers in a
    fence, is read so. Where there is no such function, all is kept as it came, for the tests to fail on.
    """
    text = _until_terminator(completion)
    answer = program_from(text)
    preamble = re.split(rf"^(?:async )?def {re.escape(entry_point)}\b", prompt, maxsplit=1, flags=re.MULTILINE)[0]
    for program in (prompt + text, preamble + answer, prompt + textwrap.indent(answer, "    ")):
        lines, tree = _parsing(program.split("\n"))
        function = _complete(tree, entry_point)
        if function is not None:
            return _kept(lines, tree, function)
    return prompt + text


_silence = threading.Lock()  # the filters of warnings are the process's: two threads would put back each other's


def parsed(program: str) -> ast.Module:
    """`ast.parse` without its warnings: a "\\d" in somebody's program is not ours to complain of."""
    with _silence, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(program)


def _until_terminator(reply: str) -> str:
    return _TERMINATORS.split(reply, maxsplit=1)[0].replace("\r\n", "\n")


def _without_prose(text: str) -> str:
    """`text`, or its code if the rest is nothing but prose: what looks like broken code is not for us to mend."""
    lines = text.split("\n")
    starts = (at for at, line in enumerate(lines) if _CODE.match(line) and not line[0].isspace())
    start = next(starts, 0)
    code, tree = _parsing(lines[start:])
    around = [line for line in [*lines[:start], *lines[start + len(code) :]] if line.strip()]
    if any(map(_CODE.match, around)) or not any(isinstance(node, _Function | ast.ClassDef) for node in tree.body):
        return text
    return "\n".join(code).strip("\n")


def _parsing(lines: list[str]) -> tuple[list[str], ast.Module]:
    """The longest run of first lines that parses. No line behind an error can mend it, so each error names a cut."""
    while lines:
        try:
            return lines, parsed("\n".join(lines))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            lines = lines[: _blamed(lines, error)]
    return [], ast.Module([], [])


def _blamed(lines: list[str], error: Exception) -> int:
    if isinstance(error, SyntaxError) and error.lineno:
        return min(error.lineno, len(lines)) - 1
    # no line is named for NUL bytes and for nesting that is too deep, which takes a long line
    return next((at for at, line in enumerate(lines) if "\0" in line), lines.index(max(lines, key=len)))


def _complete(tree: ast.Module, name: str) -> _Function | None:
    """The first function `name` with a body; a prompt's own head has a docstring at most."""

    def does_something(node: ast.stmt) -> bool:
        constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        return not constant and not isinstance(node, ast.Pass | ast.Import | ast.ImportFrom | _Function | ast.ClassDef)

    functions = (node for node in tree.body if isinstance(node, _Function) and node.name == name)
    return next((node for node in functions if any(map(does_something, node.body))), None)


def _kept(lines: list[str], tree: ast.Module, function: _Function) -> str:
    """All up to `function`, and of what follows the definitions that the kept code needs, in their order."""
    at = tree.body.index(function)
    kept, later = tree.body[: at + 1], tree.body[at + 1 :]
    while True:
        known = set().union(*map(_defines, kept))
        missing = set().union(*map(_uses, kept)) - known
        helper = next((node for node in later if _defines(node) & missing), None)
        if helper is None:
            break
        kept.append(helper)
    helpers = sorted(kept[at + 1 :], key=lambda node: node.lineno)
    parts = [lines[: function.end_lineno], *(lines[_first_line(node) : node.end_lineno] for node in helpers)]
    return "\n".join(line for part in parts for line in part) + "\n"


def _first_line(node: ast.stmt) -> int:
    decorators = node.decorator_list if isinstance(node, _Function | ast.ClassDef) else []
    return min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1


def _defines(node: ast.stmt) -> set[str]:
    if isinstance(node, _Function | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return set()


def _uses(node: ast.stmt) -> set[str]:
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
