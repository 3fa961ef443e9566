"""What exercises share with tasks they must not teach: exercise + benchmarks → which task, and by what.

For: keeping benchmarks out of training data. Not for: reading benchmarks, which `cli` does; here they are plain text.

An exercise overlaps a task where one of these holds:

* ten words in a row of its request stand in the task's prompt, or all of its words where it has fewer;
* one of its tests calls the same function with the same literal arguments as a test of the task;
* its solution is the task's, whatever the names of its variables, its comments and its docstrings.

Ten words, lower case and without punctuation, is what reports on code models use. It also hits phrases that many tasks
begin with, and errs on the side of dropping. Words are of letters: numbers, tests that a request shows and solutions
are not compared so, as ten in a row are often the same by chance: `[1, 2, 3, ..., 10]`, the loops of two programs.
"""

import ast
import builtins
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffucoder.grading.extract import parsed
from diffucoder.training.exercises import Exercise

WORDS = 10

_WORD = re.compile(r"[^\W\d_]+")
_ASSERT = re.compile(r"^\s*assert\b.*$", re.MULTILINE)
_BROKEN = (SyntaxError, ValueError, RecursionError, MemoryError)  # what ast makes of text that is no code
_LONG = 10_000  # characters of a call; nothing so long is compared


@dataclass(frozen=True)
class HeldOut:
    """A task that no exercise may overlap, as plain text and data."""

    id: str
    function: str  # what its tests call, by this name or as `candidate`
    prompt: str
    solution: str
    tests: str = ""
    inputs: tuple[tuple[Any, ...], ...] = ()  # arguments of calls that judge a program, where they are no code


@dataclass
class _Index:
    """Of one benchmark: which task has it."""

    words: dict[str, str] = field(default_factory=dict)  # ten in a row
    prompts: dict[str, str] = field(default_factory=dict)  # the whole, as words
    calls: dict[str, str] = field(default_factory=dict)
    solutions: dict[str, str] = field(default_factory=dict)


class Overlaps:
    """The tasks of several benchmarks, to look exercises up in."""

    def __init__(self, benchmarks: Mapping[str, Iterable[HeldOut]]) -> None:
        self._indices = {name: _index(tasks) for name, tasks in benchmarks.items()}

    def find(self, exercise: Exercise, solution: str = "") -> dict[str, str]:
        """The benchmarks that the exercise overlaps, with the task and what is shared."""
        words = _words(exercise.prompt)
        grams, calls = list(_in_a_row(words)), [each for test in exercise.tests for each in _calls(test)]
        program = _shape(solution)
        found = {}
        for name, index in self._indices.items():
            shared = _first("words", grams, index.words) or _first("call", calls, index.calls)
            if not shared and len(words) < WORDS:
                shared = _contained(" ".join(words), index.prompts)
            if not shared and program:
                shared = _first("solution", [program], index.solutions)
            if shared:
                found[name] = shared
        return found


def _index(tasks: Iterable[HeldOut]) -> _Index:
    index = _Index()
    for task in tasks:
        words = _words(task.prompt)
        index.prompts[" ".join(words)] = task.id
        index.words.update(dict.fromkeys(_in_a_row(words), task.id))
        called = [_call(task.function, arguments) for arguments in task.inputs]
        index.calls.update(dict.fromkeys([*_calls(task.tests, task.function), *filter(None, called)], task.id))
        if shape := _shape(task.solution):
            index.solutions[shape] = task.id
    return index


def _first(what: str, keys: Iterable[str], index: Mapping[str, str]) -> str:
    key = next((key for key in keys if key in index), None)
    if key is None:
        return ""
    return f"{index[key]}: solution" if what == "solution" else f"{index[key]}: {what}: {key[:200]}"


def _contained(words: str, prompts: Mapping[str, str]) -> str:
    task = next((task for prompt, task in prompts.items() if f" {words} " in f" {prompt} "), None)
    return f"{task}: words: {words}" if task and words else ""


def _words(text: str) -> list[str]:
    return _WORD.findall(_ASSERT.sub("", text).lower())


def _in_a_row(words: list[str]) -> Iterator[str]:
    return (" ".join(words[at : at + WORDS]) for at in range(len(words) - WORDS + 1))


def _calls(tests: str, function: str | None = None) -> Iterator[str]:
    """Calls with literal arguments in test code: of `function`, else of all functions that are not built in."""
    try:
        nodes = list(ast.walk(parsed(tests)))
    except _BROKEN:
        return
    for node in nodes:
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        name = node.func.id
        wanted = not hasattr(builtins, name) if function is None else name in (function, "candidate")
        if wanted and (node.args or node.keywords) and _literal(node):
            yield ast.unparse(ast.Call(ast.Name(function or name), node.args, node.keywords))


def _literal(call: ast.Call) -> bool:
    try:
        for argument in (*call.args, *(keyword.value for keyword in call.keywords)):
            ast.literal_eval(argument)
    except (*_BROKEN, TypeError):
        return False
    return True


def _call(function: str, arguments: tuple[Any, ...]) -> str:
    """The call in the words of `_calls`; empty where it cannot be written."""
    try:
        text = f"{function}({', '.join(map(repr, arguments))})"
        return next(_calls(text, function), "") if len(text) < _LONG else ""
    except (ValueError, RecursionError):  # an integer too long to print, lists too deep
        return ""


def _shape(program: str) -> str:
    """A program without comments, docstrings and the names of its functions and variables; empty where it is none."""
    try:
        tree = parsed(program)
    except _BROKEN:
        return ""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        body: Any = getattr(node, "body", None)  # Any: of a lambda it is no list
        if isinstance(body, list):
            node.body = [each for each in body if not _is_text(each)]  # type: ignore[attr-defined]  # who has a body
        for attribute in ("name", "arg", "id"):
            name = getattr(node, attribute, None)
            if isinstance(name, str) and not hasattr(builtins, name):
                setattr(node, attribute, names.setdefault(name, f"n{len(names)}"))
    return ast.dump(tree) if tree.body else ""


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
