"""Find the program in a model's reply, or make one from its continuation of a prompt.

A reply is split at its code fences, and its blocks are chosen by what they define. Which fence opens a block and which
closes one does not matter: the prompt may have opened the first, and models forget some. Not for: the strict check of
the format in training rewards (`training.rewards`).
"""

import ast
import builtins
import re
import textwrap
import threading
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from diffucoder.tokenizer import TERMINATORS

_TERMINATORS = re.compile("|".join(map(re.escape, TERMINATORS)))
_TAG = r"(?:(?:\w+:)?think(?:ing)?|thoughts?|reasoning)[>\]▷]"
_THINKING = re.compile(rf"^[ \t]*(?:[<\[◁]{_TAG}|<\|begin_of_thought\|>)", re.MULTILINE | re.IGNORECASE)
_END_OF_THINKING = re.compile(rf"[<\[◁]/{_TAG}|<\|end_of_thought\|>", re.IGNORECASE)
_QUOTED_FENCE = re.compile(r"^>[ \t]*(?:```|~~~)", re.MULTILINE)

# A fence begins a line. Within a line it closes a block, or opens one that is named: the method's own prompt does that.
_PYTHON = r"[^\w`\n]*i?(?:python|py)[\d.]*(?![\w.+-])"
_FENCE = (
    r"(?:^[ \t]*(?:(?:[-*+]|\d+[.)])[ \t]+)?(?:`{3,}(?!`)|~{3,})(?P<label>[^`\n]*)"
    rf"|(?<!`)`{{3,}}(?!`)(?P<inline>{_PYTHON}[^`\n]*|[ \t]*[\w+#.-]*[ \t]*))$"
)
_STRINGS = r"""'''(?:\\[\s\S]|[^\\])*?'''|'(?:\\[\s\S]|[^'\\\n])*'"""
_FLAGS = re.MULTILINE | re.IGNORECASE
_ANY_FENCE = re.compile(_FENCE, _FLAGS)
# strings and comments are matched first, because the fences within them belong to the program
_CODE_FENCE = re.compile("|".join([r"\\[\s\S]", _STRINGS, _STRINGS.replace("'", '"'), r"#[^\n]*", _FENCE]), _FLAGS)
_PYTHON_LABEL = re.compile(_PYTHON, re.IGNORECASE)

_DEFINITION = re.compile(r"(?:async )?def |class |@\w")
_DEFINED_NAME = re.compile(r"^(?:async +)?(?:def|class) +(\w+)", re.MULTILINE)
_TEST_NAME = re.compile(r"[Tt]est|(?:\w*_tests?|\w*Tests?|check)$")
# a line of code; prose may begin with spaces if it is an item of a list
_CODE = re.compile(
    rf"\s(?!\s*(?:[-*•]|\d+[.)])\s)|{_DEFINITION.pattern}"
    r"|(?:from|import|return|if|for|while|with|try|assert|print)\b|\w+ = "
)

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Import = ast.Import | ast.ImportFrom
_parsing = threading.Lock()  # warning filters belong to the process: two threads would restore each other's


def program_from(reply: str, *, names: Iterable[str] = ()) -> str:
    """The program that a reply holds: the first blocks that define `names`, and the blocks that these need.

    Without `names` it is every block that defines something new, except tests. If no block defines anything, it is the
    first block of Python statements, else the first block. A draft in a thinking section is not an answer. Around code
    without a fence, prose is removed. The reply ends at the first terminator.
    """
    return future_first("\n\n\n".join(program_blocks(reply, names=names)))


def program_blocks(reply: str, *, names: Iterable[str] = ()) -> list[str]:
    """The blocks of a reply that `program_from` puts together."""
    readings = _without_thinking(_until_terminator(reply))
    names = list(names)
    for text in readings:
        # any fence may count if a quote in prose, or in broken code, hides the real one
        choices = [_chosen(_blocks(text, fence), names) for fence in (_CODE_FENCE, _ANY_FENCE)]
        chosen = max(choices, key=_quality)  # the first of equals
        if chosen:
            return [block.code for block in chosen]
    return [max(_blocks(readings[0], _CODE_FENCE), key=_likeness).code]


def answered(prompt: str, reply: str, entry_point: str) -> str:
    """A whole program from an instruct model's reply, which has the requested function or only its body.

    The prompt's imports and helpers are added. Of what follows the function, only what it needs
    is kept, as in `completed`.
    """
    program = _answered(prompt, reply, entry_point)
    return future_first(program) if program else program_from(reply, names=[entry_point])


def completed(prompt: str, completion: str, entry_point: str) -> str:
    """A whole program from a base model's continuation of `prompt`, cut after the requested function.

    Of what follows the function, only the helpers and imports that it needs are kept. A continuation that repeats the
    function from its head, or that answers in a fence, is accepted. Without the function everything is kept, for the
    tests to fail on.
    """
    text = _until_terminator(completion)
    program = _cut(prompt + text, entry_point) or _answered(prompt, text, entry_point)
    return future_first(program or prompt + text)


def called_names(tests: Iterable[str]) -> list[str]:
    """The names that tests look up, such as that of the function they call."""
    names: set[str] = set()
    for test in tests:
        names |= _needed_names(_Block(test).statements)
    return sorted(names)


def future_first(program: str) -> str:
    """The program with its `from __future__` imports at its beginning, where alone Python allows them."""
    statements = (_Block(program).statements if "__future__" in program else None) or []
    futures = [node for node in statements if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    start = 1 if statements and isinstance(statements[0], ast.Expr) else 0  # after a docstring
    if statements[start : start + len(futures)] == futures:
        return program
    lines = program.split("\n")
    moved: list[str] = []
    for node in reversed(futures):
        moved[:0] = lines[node.lineno - 1 : node.end_lineno]
        del lines[node.lineno - 1 : node.end_lineno]
    return "\n".join(moved + lines)


def parsed(program: str) -> ast.Module:
    """`ast.parse` without warnings, as of a "\\d" in somebody's program."""
    with _parsing, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(program)


def _until_terminator(reply: str) -> str:
    text = re.sub(r"\r\n?", "\n", _TERMINATORS.split(reply, maxsplit=1)[0])
    return re.sub(r"^> ?", "", text, flags=re.MULTILINE) if _QUOTED_FENCE.search(text) else text


def _without_thinking(text: str) -> list[str]:
    """The text without thinking sections, the first of which the prompt may have opened; else as it is.

    A section that is never closed is read as an answer.
    """
    *sections, answer = _END_OF_THINKING.split(text)
    kept = ""
    for section in sections:
        opening = _THINKING.search(section)
        kept += section[: opening.start()] if opening else ""
    if all(map(_THINKING.search, sections)):
        return [kept + answer]
    return [kept + answer, text]  # the tag may be the program's own


# --- blocks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Block:
    """Text between two fences, in or out of a fence."""

    code: str
    label: str = ""  # of the fence before it

    @cached_property
    def statements(self) -> list[ast.stmt] | None:
        """None: this is not Python."""
        try:
            return parsed(self.code).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None

    @cached_property
    def definitions(self) -> dict[str, bool]:
        """The functions and classes, and whether each is more than a head."""
        if self.statements is None:
            return dict.fromkeys(_DEFINED_NAME.findall(self.code), False)
        found = [node for node in self.statements if isinstance(node, _Function | ast.ClassDef)]
        return {node.name: not _is_stub(node) for node in found}

    @cached_property
    def tests(self) -> set[str]:
        """The definitions that are tests."""
        names = set(filter(_TEST_NAME.match, self.definitions))
        for node in self.statements or ():
            if isinstance(node, ast.ClassDef):
                for base in node.bases:
                    if "TestCase" in (getattr(base, "id", ""), getattr(base, "attr", "")):
                        names.add(node.name)
        return names

    @cached_property
    def bound(self) -> set[str]:
        """All global names that it gives a value."""
        return self.definitions.keys() | _defined_names(*self.statements or ())

    @cached_property
    def imported(self) -> set[str]:
        """The global names that it imports; "*" may be any."""
        return _defined_names(*(node for node in self.statements or () if isinstance(node, _Import)))

    def rank(self, name: str) -> int:
        """How good a source of `name` it is: it defines it, assigns it, imports it, or has only its head."""
        if name in self.definitions:
            return 3 if self.definitions[name] else 0
        return 1 if name in self.imported else 2

    def supplies(self, names: set[str]) -> bool:
        """Whether it is Python that gives a value to one of `names`, or imports alone that may do so."""
        imports_alone = all(isinstance(node, _Import) for node in self.statements or ())
        return self.statements is not None and bool(
            self.bound & names or (names and imports_alone and "*" in self.bound)
        )


def _blocks(text: str, fence: re.Pattern[str]) -> list[_Block]:
    """Split a reply at its fences."""
    blocks = []
    start = 0
    label: str | None = None
    for match in fence.finditer(text):
        info = match["label"] if match["inline"] is None else match["inline"]
        if info is not None:  # else a string or a comment
            blocks.append(_block(text[start : match.start()], label))
            start = match.end()
            label = info.strip()
    return [*blocks, _block(text[start:], label)]


def _block(text: str, label: str | None) -> _Block:
    """The block after a fence with this label; None: before any fence."""
    code = text.strip("\n")
    # only if it is needed, since dedent also empties blank lines, which may be part of a string; without a fence
    # spaces stay: the indentation is part of a completion
    if label is not None and code[:1].isspace():
        code = textwrap.dedent(code)
    return _Block(_without_prose(code), label or "")


def _chosen(blocks: Sequence[_Block], names: Sequence[str]) -> list[_Block]:
    """The blocks that define `names`, or something new, and those that these need, in order; none if there are none."""
    wanted = [name for name in names if any(name in block.bound for block in blocks)]
    is_named = bool(wanted)
    if not is_named:
        python = [block for block in blocks if block.statements is not None and block.definitions]
        every: dict[str, None] = {}
        tests: set[str] = set()
        for block in python or blocks:
            every |= dict.fromkeys(block.definitions)
            tests |= block.tests
        wanted = [name for name in every if name not in tests] or list(every)
    chosen: set[_Block] = set()
    defined: set[str] = set()
    for name in wanted:
        if name not in defined:
            candidates = [block for block in blocks if name in block.bound]
            best = max(candidates, key=lambda block: block.rank(name))
            if is_named or defined.isdisjoint(best.definitions):
                chosen.add(best)
                defined |= best.bound
    while True:
        missing = set().union(*(_needed_names(block.statements) for block in chosen)) - defined
        others = []
        for block in blocks:
            if block not in chosen and defined.isdisjoint(block.definitions) and block.supplies(missing):
                others.append(block)
        if not others:
            return [block for block in blocks if block in chosen]
        best = max(others, key=lambda block: max(map(block.rank, block.bound & missing), default=0))
        chosen.add(best)
        defined |= best.bound


def _quality(chosen: Sequence[_Block]) -> tuple[bool, bool]:
    return bool(chosen), all(block.statements is not None for block in chosen)


def _likeness(block: _Block) -> tuple[bool, ...]:
    """How likely a block that defines nothing is the program."""
    is_python = bool(_PYTHON_LABEL.match(block.label))
    does_something = False
    for node in block.statements or ():
        alone = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Call)  # as in the output of a program
        does_something |= not alone and not (isinstance(node, ast.AnnAssign) and node.value is None)
    is_other = bool(block.label) and not is_python
    return does_something and not is_other, is_python, not is_other, bool(block.code)


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


# --- programs --------------------------------------------------------------------------------------------------------


def _answered(prompt: str, reply: str, entry_point: str) -> str | None:
    """The program of `answered` if the requested function is in it."""
    answer = _Block(program_from(reply, names=[entry_point]))
    head = re.search(rf"^(?:async )?def {re.escape(entry_point)}\b", prompt, flags=re.MULTILINE)
    program = prompt[: head.start()] + answer.code if head else answer.code
    whole = _cut(program, entry_point, last=True)  # of two functions the later one is in force
    if whole is None and entry_point in answer.bound:  # a class, or another name of a function
        return program
    body = textwrap.indent(textwrap.dedent(answer.code), "    ")
    return whole or _cut(f"{prompt.rstrip()}\n{body}", entry_point)


def _cut(program: str, entry_point: str, *, last: bool = False) -> str | None:
    """The first lines of a program that parse, without what the requested function does not need; None without it."""
    lines, tree = _longest_program(program.split("\n"))
    functions = [node for node in tree.body if isinstance(node, _Function) and node.name == entry_point]
    functions = [function for function in functions if not _is_stub(function)]  # that of a prompt has no body
    return _with_helpers(lines, tree, functions[-1 if last else 0]) if functions else None


def _longest_program(lines: list[str]) -> tuple[list[str], ast.Module]:
    """The most first lines that parse. No line after an error can correct it, so each error says where to cut."""
    while lines:
        try:
            return lines, parsed("\n".join(lines))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            lines = lines[: _line_of_error(lines, error)]
            while lines and not lines[-1].strip():  # thousands of blank lines would be cut one by one
                lines.pop()
    return [], ast.Module([], [])


def _line_of_error(lines: list[str], error: Exception) -> int:
    if isinstance(error, SyntaxError) and error.lineno:
        return min(error.lineno, len(lines)) - 1
    # NUL bytes and too deep nesting, which takes a long line, are reported without a line
    for number, line in enumerate(lines):
        if "\0" in line:
            return number
    return lines.index(max(lines, key=len))


def _is_stub(node: ast.stmt) -> bool:
    """Whether a function has no body, or at most a docstring, imports and inner definitions; or a class of such."""
    if not isinstance(node, _Function | ast.ClassDef):
        if isinstance(node, ast.Raise):
            error = getattr(node.exc, "func", node.exc)
            return getattr(error, "id", "") == "NotImplementedError"
        constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        return constant or isinstance(node, ast.Pass | _Import)
    for child in node.body:
        inner = isinstance(node, _Function) and isinstance(child, _Function | ast.ClassDef)
        if not inner and not _is_stub(child):
            return False
    return True


def _with_helpers(lines: list[str], tree: ast.Module, function: _Function) -> str:
    """Everything up to `function`, and of the later code what the kept code needs, in its order."""
    index = tree.body.index(function)
    kept = tree.body[: index + 1]
    later = tree.body[index + 1 :]
    while True:
        defined = _defined_names(*kept)
        missing = _needed_names(kept) - defined
        if missing:
            missing.add("*")
        helper = next((node for node in later if _defined_names(node) & missing), None)
        if helper is None:
            break
        kept.append(helper)
        later.remove(helper)
    kept += [node for node in later if _changes(node, defined)]
    code = lines[: function.end_lineno]
    for node in sorted(kept[index + 1 :], key=lambda helper: helper.lineno):
        code += lines[_first_line(node) : node.end_lineno]
    return "\n".join(code) + "\n"


def _changes(node: ast.stmt, names: set[str]) -> bool:
    """Whether a statement assigns to one of `names` or to a part of it, as `f = cache(f)` and `f.calls = 0` do."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    for target in targets:
        if isinstance(target, ast.expr) and not isinstance(node, ast.For | ast.AsyncFor):
            return any(isinstance(name, ast.Name) and name.id in names for name in ast.walk(target))
    return False


def _first_line(node: ast.stmt) -> int:
    decorators = node.decorator_list if isinstance(node, _Function | ast.ClassDef) else []
    return min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1


def _defined_names(*statements: ast.stmt) -> set[str]:
    """The names that statements give a value, without those within functions and classes."""
    names: set[str] = set()
    nodes: list[ast.AST] = list(statements)
    while nodes:  # no recursion: expressions may be thousands deep
        match nodes.pop():
            case ast.FunctionDef(name) | ast.AsyncFunctionDef(name) | ast.ClassDef(name):
                names.add(name)
            case ast.Import(aliases) | ast.ImportFrom(_, aliases):
                names |= {(alias.asname or alias.name).split(".")[0] for alias in aliases}
            case ast.Name(name, ast.Store()):
                names.add(name)
            case node:
                nodes.extend(ast.iter_child_nodes(node))
    return names


def _needed_names(statements: Iterable[ast.stmt] | None) -> set[str]:
    """The names that statements look up among the globals: neither builtins nor parameters and local variables."""
    needed: set[str] = set()
    for statement in statements or ():
        nodes = list(ast.walk(statement))
        own = {node.arg for node in nodes if isinstance(node, ast.arg)}
        own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        for node in nodes:
            if isinstance(node, ast.Global):
                own -= set(node.names)
        needed |= {node.id for node in nodes if isinstance(node, ast.Name)} - own
    return needed - vars(builtins).keys()
