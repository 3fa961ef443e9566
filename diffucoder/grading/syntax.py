"""What a program defines and what it needs, from its syntax tree: where it can be cut, and what must be kept.

Hostile programs make the parser slow and can crash it: what strangers wrote is read in `grading.reading`'s processes.
"""

import ast
import builtins
import re
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

Function = ast.FunctionDef | ast.AsyncFunctionDef
Import = ast.Import | ast.ImportFrom
NOT_PARSED = (SyntaxError, ValueError, RecursionError, MemoryError)  # what `parsed` raises

_INCOMPLETE = re.compile(r"\s*(?:@[\w.]+(?:\(.*\))?\s*)?$|.*\\$")  # a blank line, a decorator, or one that goes on
_parsing = threading.Lock()  # warning filters belong to the process: two threads would restore each other's


@contextmanager
def quietly() -> Iterator[None]:
    """Parse or compile here without warnings, as of a "\\d" in somebody's program."""
    with _parsing, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def parsed(program: str) -> ast.Module:
    """`ast.parse` without warnings."""
    with quietly():
        return ast.parse(program)


def statements_of(program: str) -> list[ast.stmt] | None:
    """The statements of a program. None: this is not Python."""
    try:
        return parsed(program).body
    except NOT_PARSED:
        return None


def parses(program: str) -> bool:
    """Whether this is Python."""
    return statements_of(program) is not None


def all_parse(programs: Iterable[str]) -> bool:
    """Whether all of these are Python."""
    return all(map(parses, programs))


def future_first(program: str) -> str:
    """The program with its `from __future__` imports at its beginning, where alone Python allows them."""
    if "__future__" not in program:
        return program
    statements = statements_of(program) or []
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


def cut(program: str, entry_point: str, *, last: bool = False) -> str | None:
    """The first lines of a program that parse, without what the requested function does not need; None without it."""
    lines, tree = longest_program(program.split("\n"))
    functions = [node for node in tree.body if isinstance(node, Function) and node.name == entry_point]
    functions = [function for function in functions if not is_stub(function)]  # that of a prompt has no body
    return _with_helpers(lines, tree, functions[-1 if last else 0]) if functions else None


def longest_program(lines: list[str]) -> tuple[list[str], ast.Module]:
    """The most first lines that parse. No line after an error can correct it, so each error says where to cut."""
    while lines:
        try:
            return lines, parsed("\n".join(lines))
        except NOT_PARSED as error:
            lines = lines[: _line_of_error(lines, error)]
            while lines and _INCOMPLETE.match(lines[-1]):  # thousands of them would be cut one by one
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


def is_stub(node: ast.stmt) -> bool:
    """Whether a function has no body, or at most a docstring, imports and inner definitions; or a class of such."""
    match node:
        case ast.FunctionDef(body=body) | ast.AsyncFunctionDef(body=body):
            return all(isinstance(child, Function | ast.ClassDef) or is_stub(child) for child in body)
        case ast.ClassDef(body=body):
            return all(map(is_stub, body))
        case ast.Raise(ast.Name("NotImplementedError") | ast.Call(ast.Name("NotImplementedError"))):
            return True
        case ast.Expr(ast.Constant()) | ast.Pass() | ast.Import() | ast.ImportFrom():
            return True
    return False


def _with_helpers(lines: list[str], tree: ast.Module, function: Function) -> str:
    """Everything up to `function`, and of the later code what the kept code needs, in its order."""
    index = tree.body.index(function)
    kept = tree.body[: index + 1]
    later = tree.body[index + 1 :]
    while True:
        defined = defined_names(*kept)
        missing = needed_names(kept) - defined
        if missing:
            missing.add("*")
        helper = next((node for node in later if defined_names(node) & missing), None)
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
    match node:
        case ast.Assign([target, *_]) | ast.AnnAssign(target) | ast.AugAssign(target):
            return any(isinstance(name, ast.Name) and name.id in names for name in ast.walk(target))
    return False


def _first_line(node: ast.stmt) -> int:
    decorators = node.decorator_list if isinstance(node, Function | ast.ClassDef) else []
    return min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1


def defined_names(*statements: ast.stmt) -> set[str]:
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


def needed_names(statements: Iterable[ast.stmt] | None) -> set[str]:
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


def fault_of(program: str) -> tuple[int, str, bool]:
    """What is wrong first: its line or 0, what it is, and whether the program parses; (0, "", True) for nothing."""
    try:
        body = parsed(program).body
    except NOT_PARSED as error:
        return getattr(error, "lineno", None) or 0, f"{type(error).__name__}: {getattr(error, 'msg', error)}", False
    missing = needed_names(body) - defined_names(*body)
    for node in (node for statement in body for node in ast.walk(statement)):
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            return 0, "", True
        if isinstance(node, ast.Name) and node.id in missing:
            return node.lineno, f"NameError: nothing defines {node.id!r}", True
    return 0, "", True


def imported_packages(program: str) -> list[str]:
    """The packages that a program imports anywhere. Raises what `parsed` does."""
    names: set[str] = set()
    for node in ast.walk(parsed(program)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return sorted({name.split(".")[0] for name in names})


def names_at_once(statements: Iterable[ast.stmt]) -> set[str]:
    """The global names that statements look up when they run, and not only when a function in them is called."""
    nodes: list[ast.AST] = list(statements)
    names: set[str] = set()
    while nodes:
        match nodes.pop():
            case ast.FunctionDef() | ast.AsyncFunctionDef() as function:
                arguments = function.args
                nodes += [*function.decorator_list, *arguments.defaults, *filter(None, arguments.kw_defaults)]
            case ast.Lambda():
                continue
            case ast.Name(name, ast.Load()):
                names.add(name)
            case node:
                nodes.extend(ast.iter_child_nodes(node))
    return names - vars(builtins).keys()


# --- HumanEval's tests -----------------------------------------------------------------------------------------------


def asserts_of_check(code: str, function: str) -> tuple[list[str], bool, str]:
    """The asserts of HumanEval's `check(candidate)`, about `function` itself, and whether they are all that it does.

    The text names what keeps one of them from being used alone, if anything does.
    """
    try:
        body = parsed(code).body
    except NOT_PARSED as error:
        return [], False, f"is not Python ({error})"
    checks = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == "check"]
    is_all = len(checks) == 1 and all(isinstance(node, ast.FunctionDef | ast.Assign | ast.Expr) for node in body)
    asserts = []
    problem = ""
    for check in checks:
        candidate = _only_parameter(check)
        around = defined_names(*body, *check.body)
        for statement in check.body:
            names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
            about_it = [name for name in names if name.id == candidate]
            if not isinstance(statement, ast.Assert) or not about_it:
                is_all = is_all and _does_nothing(statement)
                continue
            for name in about_it:
                name.id = function
            text = ast.unparse(statement)
            asserts.append(text)
            inside = {name.id for name in names if isinstance(name.ctx, ast.Store)} | {function}
            needed = sorted({name.id for name in names} & around - inside)
            if needed and not problem:
                problem = f"has {text!r}, which needs {needed[0]!r}, defined beside it"
    return asserts, is_all and not problem, problem


def _only_parameter(function: ast.FunctionDef) -> str | None:
    given = function.args
    others = [*given.posonlyargs, *given.kwonlyargs, given.vararg, given.kwarg]
    return given.args[0].arg if len(given.args) == 1 and not any(others) else None


def _does_nothing(statement: ast.stmt) -> bool:
    """Whether it is a constant or `assert True`, which HumanEval has 48 times."""
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Constant) and bool(statement.test.value)
