"""Find the program in a model's reply, or make one from its continuation of a prompt.

Models fence code more or less neatly, so this finds what a person would read as the program. Not for: the strict check
of the format in training rewards (`training.rewards`).
"""

import ast
import re
import textwrap
import threading
import warnings

from diffucoder.tokenizer import TERMINATORS

_TERMINATORS = re.compile("|".join(map(re.escape, TERMINATORS)))
# A ```python opens a block anywhere in a line, because the method's own prompt has it at the end of a text line.
_PYTHON_FENCE = re.compile(r"```[ \t]*(?:python|py)[0-9.]*(?![\w.+-])[^\n`]*(?:\n|\Z)", re.IGNORECASE)
_ANY_FENCE = re.compile(r"^[ \t]*```[^\n`]*(?:\n|\Z)", re.MULTILINE)
# Backticks within a line belong to the program: x = "```".
_CLOSING_FENCE = re.compile(r"^[ \t]*```|```[ \t]*$", re.MULTILINE)
_DEFINITION = re.compile(r"(?:async )?def |class |@\w")
_CODE = re.compile(rf"\s|{_DEFINITION.pattern}|(?:from|import|return|if|for|while|with|try|assert|print)\b|\w+ = ")

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_parsing = threading.Lock()  # warning filters belong to the process: two threads would restore each other's


def program_from(reply: str) -> str:
    """The first ```python block, else the first fenced block, else the text; all up to the first terminator.

    From text without a fence, the prose around a single stretch of code is removed.
    """
    text = _until_terminator(reply)
    opening = _PYTHON_FENCE.search(text) or _ANY_FENCE.search(text)
    if opening is None:
        return _without_prose(text.strip("\n"))  # spaces stay: the indentation is part of a completion
    block = _CLOSING_FENCE.split(text[opening.end() :], maxsplit=1)[0].strip("\n")
    # only if it is needed, since dedent also empties blank lines, which may be part of a string
    return textwrap.dedent(block) if block[:1].isspace() else block


def completed(prompt: str, completion: str, entry_point: str) -> str:
    """A whole program from a base model's continuation of `prompt`, cut after the requested function.

    Of what follows the function, only the helpers and imports that it needs are kept. A continuation that repeats the
    function from its head, or that answers in a fence, is accepted. Without the function everything is kept, for the
    tests to fail on.
    """
    text = _until_terminator(completion)
    answer = program_from(text)
    preamble = re.split(rf"^(?:async )?def {re.escape(entry_point)}\b", prompt, maxsplit=1, flags=re.MULTILINE)[0]
    for program in (prompt + text, preamble + answer, prompt + textwrap.indent(answer, "    ")):
        lines, tree = _longest_program(program.split("\n"))
        function = _complete_function(tree, entry_point)
        if function is not None:
            return _with_helpers(lines, tree, function)
    return prompt + text


def parsed(program: str) -> ast.Module:
    """`ast.parse` without warnings, as of a "\\d" in somebody's program."""
    with _parsing, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(program)


def _until_terminator(reply: str) -> str:
    return _TERMINATORS.split(reply, maxsplit=1)[0].replace("\r\n", "\n")


def _without_prose(text: str) -> str:
    """The code in `text` if the rest is only prose; else the text, since it may be broken code."""
    lines = text.split("\n")
    starts = [number for number, line in enumerate(lines) if _CODE.match(line) and not line[0].isspace()]
    start = starts[0] if starts else 0
    code, tree = _longest_program(lines[start:])
    around = [line for line in lines[:start] + lines[start + len(code) :] if line.strip()]
    if any(map(_CODE.match, around)) or not any(isinstance(node, _Function | ast.ClassDef) for node in tree.body):
        return text
    return "\n".join(code).strip("\n")


def _longest_program(lines: list[str]) -> tuple[list[str], ast.Module]:
    """The most first lines that parse. No line after an error can correct it, so each error says where to cut."""
    while lines:
        try:
            return lines, parsed("\n".join(lines))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            lines = lines[: _line_of_error(lines, error)]
    return [], ast.Module([], [])


def _line_of_error(lines: list[str], error: Exception) -> int:
    if isinstance(error, SyntaxError) and error.lineno:
        return min(error.lineno, len(lines)) - 1
    # NUL bytes and too deep nesting, which takes a long line, are reported without a line
    for number, line in enumerate(lines):
        if "\0" in line:
            return number
    return lines.index(max(lines, key=len))


def _complete_function(tree: ast.Module, name: str) -> _Function | None:
    """The first function `name` with a body. That of a prompt has at most a docstring."""
    for function in tree.body:
        if isinstance(function, _Function) and function.name == name:
            for node in function.body:
                constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
                empty = isinstance(node, ast.Pass | ast.Import | ast.ImportFrom | _Function | ast.ClassDef)
                if not constant and not empty:
                    return function
    return None


def _with_helpers(lines: list[str], tree: ast.Module, function: _Function) -> str:
    """Everything up to `function`, and the later definitions that the kept code needs, in their order."""
    index = tree.body.index(function)
    kept = tree.body[: index + 1]
    later = tree.body[index + 1 :]
    while True:
        missing = set().union(*map(_used_names, kept)) - set().union(*map(_defined_names, kept))
        helper = next((node for node in later if _defined_names(node) & missing), None)
        if helper is None:
            break
        kept.append(helper)
    code = lines[: function.end_lineno]
    for node in sorted(kept[index + 1 :], key=lambda helper: helper.lineno):
        code += lines[_first_line(node) : node.end_lineno]
    return "\n".join(code) + "\n"


def _first_line(node: ast.stmt) -> int:
    decorators = node.decorator_list if isinstance(node, _Function | ast.ClassDef) else []
    return min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1


def _defined_names(node: ast.stmt) -> set[str]:
    match node:
        case ast.FunctionDef(name) | ast.AsyncFunctionDef(name) | ast.ClassDef(name):
            return {name}
        case ast.Import(names) | ast.ImportFrom(_, names):
            return {(alias.asname or alias.name).split(".")[0] for alias in names}
        case ast.Assign(targets):
            return set().union(*map(_used_names, targets))
        case ast.AnnAssign(target):
            return _used_names(target)
    return set()


def _used_names(node: ast.AST) -> set[str]:
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
