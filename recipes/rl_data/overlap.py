"""Find what an exercise shares with the tasks of benchmarks, which training data must not contain.

An exercise overlaps a task if ten words in a row of its request are in the task's prompt (or all words of a shorter
request), if one of its tests calls the same function with the same literal arguments, or if its solution is the task's
apart from names, comments and docstrings. Numbers are not words, and asserts in a request are not compared.
"""

import ast
import builtins
import re
from collections.abc import Iterable, Iterator, Mapping

from diffucoder.evaluation.benchmarks import Asserts, Calls, Task
from diffucoder.grading.reading import read_limited
from diffucoder.grading.syntax import statements_of
from diffucoder.training.exercises import Exercise

WORDS = 10


class Overlaps:
    """The tasks of several benchmarks, in which exercises are looked up."""

    def __init__(self, benchmarks: Mapping[str, Iterable[Task]]) -> None:
        self.marks: dict[str, dict[str, str]] = {}  # for each benchmark, the task that has a mark
        for name, tasks in benchmarks.items():
            self.marks[name] = {}
            for task in tasks:
                self.marks[name] |= dict.fromkeys(marks_of(task), task.task_id)

    def find(self, exercise: Exercise, solution: str = "") -> dict[str, str]:
        """The benchmarks that the exercise overlaps: for each a task and what is shared with it."""
        length = min(WORDS, max(1, len(words_of(exercise.prompt))))
        marks = [*phrases(exercise.prompt, [length]), *code_marks(exercise.tests, solution)]
        overlaps = {}
        for name, tasks in self.marks.items():
            shared = [f"{tasks[mark]}: {mark[:100]}" for mark in marks if mark in tasks]
            if shared:
                overlaps[name] = shared[0]
        return overlaps


def phrases(text: str, lengths: Iterable[int]) -> Iterator[str]:
    """So many words in a row of a text."""
    words = words_of(text)
    for length in lengths:
        for start in range(len(words) - length + 1):
            yield f"words: {' '.join(words[start : start + length])}"


def code_marks(tests: Iterable[str], solution: str, function: str | None = None) -> list[str]:
    """Calls in the tests (of `function`), and the solution; nothing if that takes too long to read."""
    return read_limited(read_code_marks, [*tests], solution, function, otherwise=[])


def read_code_marks(tests: list[str], solution: str, function: str | None) -> list[str]:
    marks = []
    for test in tests:
        marks += [f"call: {call}" for call in calls_in(test, function)]
    shape = shape_of(solution)
    return [*marks, f"solution: {shape}"] if shape else marks


def marks_of(task: Task) -> Iterator[str]:
    """What an exercise may share with a task of a benchmark."""
    yield from phrases(task.prompt, range(1, WORDS + 1))
    tests: Iterable[str] = ()
    if isinstance(task.tests, Calls):
        for arguments in task.tests.base:
            try:
                yield f"call: {task.entry_point}({', '.join(map(repr, arguments))})"
            except (ValueError, RecursionError):  # an integer that is too long to print, lists that are too deep
                continue
    elif isinstance(task.tests, Asserts):
        tests = task.tests.lines
    elif task.tests is not None:
        tests = [task.tests.code]
    yield from code_marks(tests, task.canonical, task.entry_point)


def words_of(text: str) -> list[str]:
    without_asserts = re.sub(r"^\s*assert\b.*$", "", text, flags=re.MULTILINE)
    return re.findall(r"[^\W\d_]+", without_asserts.lower())


def calls_in(code: str, function: str | None) -> Iterator[str]:
    """Calls with literal arguments: of `function`, or of all functions that are not built in."""
    for node in ast.walk(ast.Module(statements_of(code) or [], [])):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        name = node.func.id
        wanted = not hasattr(builtins, name) if function is None else name in (function, "candidate")
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        if not wanted or not arguments:
            continue
        try:
            ast.literal_eval(ast.Tuple(arguments))
        except (ValueError, TypeError, RecursionError, MemoryError):
            continue
        yield ast.unparse(ast.Call(ast.Name(function or name), node.args, node.keywords))


def shape_of(program: str) -> str:
    """The program without comments, docstrings and the names that it defines, or "" if it is not a program."""
    tree = ast.Module(statements_of(program) or [], [])
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):  # not a lambda's
            node.body = [each for each in body if not is_constant(each)]
        for attribute in ("name", "arg", "id"):
            name = getattr(node, attribute, None)
            if isinstance(name, str) and not hasattr(builtins, name):
                setattr(node, attribute, names.setdefault(name, f"n{len(names)}"))
    return ast.dump(tree) if tree.body else ""


def is_constant(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
