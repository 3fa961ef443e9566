"""Judge programs by a task's own rules: task + program → Judged, in the sandbox.

A task with inputs is judged as EvalPlus does it: the published solution and the program are called with the same
arguments, and the results compared out here by `evalplus.correct`. What the published solutions give, and how long they
take, is found once and kept in a cache. Other tasks bring asserts or test code, which `grading.grade` runs.
"""

import ast
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffucoder.errors import ConfigError
from diffucoder.evaluation.benchmarks import Task
from diffucoder.evaluation.evalplus import MEMORY, correct, time_limit, total_limit
from diffucoder.grading.grade import Call, Outcome, Verdict, call, grade
from diffucoder.grading.sandbox import Limits, Sandbox
from diffucoder.grading.values import from_json, short, to_json

_OUTPUT = 256 << 20  # bytes that the results of all calls may take; published solutions give up to 245 MB
_ROOM = 64 << 10  # bytes that a program's results may take, beside four times what the published solution's do
_REFERENCE = 60.0  # seconds a call of a published solution may take
# test code: BigCodeBench's own limit, and some of its tests do wait that long
_TESTS = Limits(seconds=240.0, memory=MEMORY, files=64 << 20, processes=32)
_ASSERTS = Limits(seconds=10.0)
_UNITTEST = """
import unittest as _unittest
_result = _unittest.TestResult()
_unittest.defaultTestLoader.loadTestsFromTestCase(TestCases).run(_result)
_ends = [(case.id(), text.strip()) for case, text in _result.failures + _result.errors]
_broken = [name.split(".")[-1] + ": " + text.splitlines()[-1] for name, text in _ends]
if _broken or not _result.testsRun:
    raise AssertionError("; ".join(_broken) or "no test ran")
"""


@dataclass(frozen=True)
class Judged:
    """Whether a program solves a task, and the first thing that went wrong."""

    passed: bool
    base: bool  # by the benchmark's first tests
    plus: bool | None  # by EvalPlus's further inputs; None where the benchmark has none
    status: str  # ok, failed, timeout, killed
    detail: str
    trusted: bool  # False: the tests ran beside the program, which could have tampered with them


@dataclass(frozen=True)
class Reference:
    """What a published solution gives, and the seconds it takes, for every base and then every plus input."""

    values: tuple[Any, ...]
    seconds: tuple[float, ...]
    size: int = 0  # bytes of all values, as they are stored


def judge(task: Task, program: str, reference: Reference | None, sandbox: Sandbox) -> Judged:
    """Judge one program. `reference` is for tasks with inputs, and needed there."""
    if not (task.base or task.plus):
        return _tested(task, program, sandbox)
    assert reference is not None
    count = len(task.base)
    base, *why = _called(task, program, task.base, reference, 0, sandbox)
    if task.plus is None:
        return Judged(base, base, None, why[0], why[1], trusted=True)
    plus, *plus_why = _called(task, program, task.plus, reference, count, sandbox)
    status, detail = plus_why if base else why
    return Judged(base and plus, base, plus, status, detail, trusted=True)


def _called(
    task: Task, program: str, rows: Sequence[tuple[Any, ...]], reference: Reference, first: int, sandbox: Sandbox
) -> tuple[bool, str, str]:
    """(whether all results are right, status, what was the first wrong one)."""
    expected = reference.values[first : first + len(rows)]
    seconds = reference.seconds[first : first + len(rows)]
    calls = [Call(f"{task.entry_point}(*_)", row, time_limit(s)) for row, s in zip(rows, seconds, strict=True)]
    # what is larger than it can be would only take this process's time and memory
    output = min(_ROOM + 4 * reference.size, _OUTPUT)
    limits = Limits(seconds=total_limit(seconds), memory=MEMORY, output=output, processes=32)
    outcomes = call(program, calls, limits, sandbox=sandbox, until_failure=True)
    for at, (outcome, row, value) in enumerate(zip(outcomes, rows, expected, strict=False)):
        where = f"{task.entry_point}{short(row)}"
        if outcome.status != "ok":
            return False, outcome.status, f"input {first + at + 1}: {where}: {outcome.detail}"
        if not correct(task.task_id, row, value, outcome.value, task.atol, in_order=task.in_order):
            detail = f"input {first + at + 1}: {where} gave {short(outcome.value)}, not {short(value)}"
            return False, "failed", detail
    if len(outcomes) < len(rows):  # nothing that was not asked and answered is right
        return False, "killed", f"input {first + len(outcomes) + 1}: there is no outcome"
    return True, "ok", ""


def _tested(task: Task, program: str, sandbox: Sandbox) -> Judged:
    """By asserts, by HumanEval's `check`, or by BigCodeBench's TestCases."""
    if task.asserts:
        verdict = grade(program, task.asserts, _ASSERTS, sandbox=sandbox)
    elif "class TestCases" in task.tests:
        verdict = grade(program, [task.tests + _UNITTEST], _TESTS, sandbox=sandbox)
    else:
        verdict = grade(program, check_asserts(task) or [task.tests], _TESTS, sandbox=sandbox)
    return _from_verdict(verdict)


def _from_verdict(verdict: Verdict) -> Judged:
    return Judged(verdict.passed, verdict.passed, None, verdict.status, verdict.detail, verdict.trusted)


def check_asserts(task: Task) -> list[str]:
    """The asserts of HumanEval's `check(candidate)`, about the entry point itself; empty if it does anything else."""
    tree = ast.parse(task.tests)
    check = next((node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "check"), None)
    others = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.Assign | ast.Expr)]
    if check is None or others or not all(isinstance(node, ast.Assert) for node in check.body):
        return []
    for node in ast.walk(check):
        if isinstance(node, ast.Name) and node.id == check.args.args[0].arg:
            node.id = task.entry_point
    tests = [node.test for node in check.body if isinstance(node, ast.Assert)]
    says_nothing = [isinstance(test, ast.Constant) and bool(test.value) for test in tests]  # HumanEval has 48 `True`s
    return [ast.unparse(node) for node, empty in zip(check.body, says_nothing, strict=True) if not empty]


# --- published solutions ---------------------------------------------------------------------------------------------


def references(
    tasks: Sequence[Task], sandbox: Sandbox, cache: Path, progress: Callable[[Iterable[Any], int], Iterable[Any]]
) -> dict[str, Reference]:
    """What the published solutions of `tasks` give, from the cache or the sandbox. Raises ConfigError if one fails."""
    found = {task.task_id: _cached(_path(task, cache)) for task in tasks if task.base or task.plus}
    missing = [task for task in tasks if task.task_id in found and found[task.task_id] is None]
    if missing:
        with ThreadPoolExecutor(sandbox.workers) as pool:
            results = pool.map(lambda task: _find(task, sandbox, cache), missing)
            for task, reference in zip(missing, progress(results, len(missing)), strict=True):
                found[task.task_id] = reference
    return {task_id: reference for task_id, reference in found.items() if reference is not None}


def _path(task: Task, cache: Path) -> Path:
    key = hashlib.sha256(repr((task.canonical, task.entry_point, task.base, task.plus or ())).encode()).hexdigest()
    return cache / "references" / f"{task.task_id.replace('/', '-')}-{key[:16]}.json"


def _cached(path: Path) -> Reference | None:
    try:
        text = path.read_text(encoding="utf-8")
        stored = json.loads(text)
        return Reference(tuple(map(from_json, stored["values"])), tuple(stored["seconds"]), len(text))
    except (OSError, ValueError, KeyError, TypeError):  # none there, or broken: found anew
        return None


def _find(task: Task, sandbox: Sandbox, cache: Path) -> Reference:
    rows = (*task.base, *(task.plus or ()))
    calls = [Call(f"{task.entry_point}(*_)", row, _REFERENCE) for row in rows]
    limits = Limits(seconds=10 * _REFERENCE, memory=MEMORY, output=_OUTPUT, processes=32)
    outcomes = call(task.canonical, calls, limits, sandbox=sandbox)
    broken = next(((at, each) for at, each in enumerate(outcomes) if each.status != "ok"), None)
    if broken:
        raise ConfigError(
            f"the published solution of {task.task_id} fails on input {broken[0] + 1} ({broken[1].detail}); "
            "fetch the benchmark's data anew"
        )
    size = _store(_path(task, cache), outcomes)
    return Reference(tuple(o.value for o in outcomes), tuple(o.seconds for o in outcomes), size)


def _store(path: Path, outcomes: Sequence[Outcome]) -> int:
    """Write what `_cached` reads, and say how many bytes that is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {"values": [to_json(o.value) for o in outcomes], "seconds": [round(o.seconds, 6) for o in outcomes]}
    partial = path.with_suffix(f".{os.getpid()}")
    size = partial.write_text(json.dumps(stored), encoding="utf-8")
    partial.replace(path)
    return size


def importable(tasks: Sequence[Task], sandbox: Sandbox) -> Iterator[tuple[Task, list[str]]]:
    """Each task with those of its libraries that programs cannot import here."""
    libraries = sorted({library for task in tasks for library in task.libraries})
    probe = f"import importlib.util\nprint(*(n for n in {libraries!r} if importlib.util.find_spec(n) is None))"
    absent = set(sandbox.run(probe).stdout.split()) if libraries else set()
    for task in tasks:
        yield task, [library for library in task.libraries if library in absent]
