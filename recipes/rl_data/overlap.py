"""Find what an exercise shares with the tasks of benchmarks, which training data must not contain.

An exercise overlaps a task if ten words in a row of its request are in the task's prompt (or all words of a shorter
request), if one of its tests calls the same function with the same literal arguments, or if its solution is the task's
apart from names, comments and docstrings. Ten words are customary; they also hit phrases that many tasks begin with, so
this drops too much rather than too little. Numbers are not words, and asserts in a request are not compared.
"""

import ast
import builtins
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from diffucoder.grading.extract import parsed
from diffucoder.training.exercises import Exercise

WORDS = 10
NOT_CODE = (SyntaxError, ValueError, RecursionError, MemoryError)  # what `parsed` raises
_WORD = re.compile(r"[^\W\d_]+")
_ASSERT = re.compile(r"^\s*assert\b.*$", re.MULTILINE)
_LONGEST_CALL = 10_000  # characters


@dataclass(frozen=True)
class HeldOut:
    """A task that no exercise may overlap."""

    id: str
    function: str  # what the tests call, by this name or as `candidate`
    prompt: str
    solution: str
    tests: str = ""  # code
    inputs: tuple[tuple[Any, ...], ...] = ()  # arguments of further calls of `function`


class Overlaps:
    """The tasks of several benchmarks, in which exercises are looked up."""

    def __init__(self, benchmarks: Mapping[str, Iterable[HeldOut]]) -> None:
        self.marks: dict[str, dict[str, str]] = {}  # for each benchmark, the task that has a mark
        self.prompts: dict[str, dict[str, str]] = {}  # for each benchmark, the task that has a prompt's words
        for name, tasks in benchmarks.items():
            self.marks[name] = {}
            self.prompts[name] = {}
            for task in tasks:
                calls = [task.tests, *(call_with(task.function, arguments) for arguments in task.inputs)]
                self.marks[name] |= dict.fromkeys(marks_of(task.prompt, calls, task.solution, task.function), task.id)
                self.prompts[name][" ".join(words_of(task.prompt))] = task.id

    def find(self, exercise: Exercise, solution: str = "") -> dict[str, str]:
        """The benchmarks that the exercise overlaps: for each a task and what is shared with it."""
        marks = list(marks_of(exercise.prompt, exercise.tests, solution))
        words = words_of(exercise.prompt)
        overlaps = {}
        for name, tasks in self.marks.items():
            shared = [f"{tasks[mark]}: {mark[:100]}" for mark in marks if mark in tasks]
            if 0 < len(words) < WORDS:
                request = " ".join(words)
                prompts = self.prompts[name].items()
                shared += [f"{task}: words: {request}" for prompt, task in prompts if f" {request} " in f" {prompt} "]
            if shared:
                overlaps[name] = shared[0]
        return overlaps


def marks_of(prompt: str, tests: Iterable[str], solution: str, function: str | None = None) -> Iterator[str]:
    """What two problems may share: ten words in a row, a call in the tests (of `function`), a solution."""
    words = words_of(prompt)
    for start in range(len(words) - WORDS + 1):
        yield f"words: {' '.join(words[start : start + WORDS])}"
    for test in tests:
        for call in calls_in(test, function):
            yield f"call: {call}"
    shape = shape_of(solution)
    if shape:
        yield f"solution: {shape}"


def words_of(text: str) -> list[str]:
    return _WORD.findall(_ASSERT.sub("", text).lower())


def calls_in(code: str, function: str | None) -> Iterator[str]:
    """Calls with literal arguments: of `function`, or of all functions that are not built in."""
    try:
        nodes = list(ast.walk(parsed(code)))
    except NOT_CODE:
        return
    for node in nodes:
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        name = node.func.id
        wanted = not hasattr(builtins, name) if function is None else name in (function, "candidate")
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        if wanted and arguments and is_literal(ast.Tuple(arguments)):
            yield ast.unparse(ast.Call(ast.Name(function or name), node.args, node.keywords))


def is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (*NOT_CODE, TypeError):
        return False
    return True


def call_with(function: str, arguments: tuple[Any, ...]) -> str:
    """Code of the call, or "" if it is too long or cannot be written."""
    try:
        code = f"{function}({', '.join(map(repr, arguments))})"
    except (ValueError, RecursionError):  # an integer that is too long to print, lists that are too deep
        return ""
    return code if len(code) < _LONGEST_CALL else ""


def shape_of(program: str) -> str:
    """The program without comments, docstrings and the names that it defines, or "" if it is not a program."""
    try:
        tree = parsed(program)
    except NOT_CODE:
        return ""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        body: Any = getattr(node, "body", None)  # Any: not a list in a lambda
        if isinstance(body, list):
            node.body = [
                each for each in body if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
            ]
        for attribute in ("name", "arg", "id"):
            name = getattr(node, attribute, None)
            if isinstance(name, str) and not hasattr(builtins, name):
                setattr(node, attribute, names.setdefault(name, f"n{len(names)}"))
    return ast.dump(tree) if tree.body else ""


def is_constant(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
