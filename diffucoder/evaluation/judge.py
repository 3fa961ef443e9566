"""Judge programs by the rules of their task: task + program → Judged, in the sandbox.

Tasks with inputs are judged as EvalPlus does: the published solution and the program are called with the same
arguments, and the results are compared outside the sandbox. `grading.grade` runs asserts and test code.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from diffucoder.errors import ConfigError
from diffucoder.evaluation.benchmarks import Asserts, Calls, Script, Task
from diffucoder.evaluation.evalplus import MEMORY, correct, time_limit, total_limit
from diffucoder.files import Json, append_jsonl, cache_folder, read_whole_lines, write_jsonl, write_text
from diffucoder.grading.grade import Call, call, grade
from diffucoder.grading.reading import read_limited
from diffucoder.grading.sandbox import Limits, Sandbox
from diffucoder.grading.syntax import asserts_of_check
from diffucoder.grading.values import from_json, short, to_json

Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]  # (items, their number, what they are) -> the items

_MOST_OUTPUT = 256 << 20  # bytes of the results of all calls; published solutions return up to 245 MB
_SPARE_OUTPUT = 64 << 10  # bytes that results may take beyond four times those of the published solution
_REFERENCE_SECONDS = 60.0  # for one call of a published solution
_ASSERT_LIMITS = Limits(seconds=10.0)
# the limit of BigCodeBench itself; some of its tests do wait that long
_SCRIPT_LIMITS = Limits(seconds=240.0, memory=MEMORY, files=64 << 20, processes=32)
_CHECK_LIMITS = replace(_SCRIPT_LIMITS, seconds=3.0)  # the limit of human-eval and human-eval-infilling
_RUN_TEST_CASES = """
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
    base: bool  # by the first tests of the benchmark
    plus: bool | None  # by the further inputs of EvalPlus; None: the benchmark has none
    status: str  # ok, failed, timeout, killed
    detail: str
    trusted: bool  # False: the tests ran beside the program, which could have tampered with them


@dataclass(frozen=True)
class Reference:
    """Results of a published solution, and the seconds they took, for all base and then all plus inputs."""

    values: tuple[Any, ...]
    seconds: tuple[float, ...]
    size: int = 0  # bytes of all values, as they are stored


def silent(items: Iterable[Any], count: int, what: str) -> Iterable[Any]:
    """Show no progress."""
    return items


# --- samples ---------------------------------------------------------------------------------------------------------


def grade_samples(
    tasks: Sequence[Task],
    samples: Sequence[Json],
    sandbox: Sandbox,
    *,
    path: Path | None = None,
    progress: Progress = silent,
) -> list[Json]:
    """Return a verdict for every sample of a task with tests, in order.

    `path` keeps the verdicts as they come; those in it are not repeated.
    """
    by_id = {task.task_id: task for task in tasks if task.tests is not None}
    samples = [sample for sample in samples if sample["task_id"] in by_id]
    verdicts: list[Json] = []
    if path is not None:
        verdicts = matching_lines(read_whole_lines(path), samples, _is_verdict)
        write_jsonl(path, verdicts)
    waiting = samples[len(verdicts) :]
    needed = {sample["task_id"] for sample in waiting}
    known = references([task for task in tasks if task.task_id in needed], sandbox, progress)

    def verdict_on(sample: Json) -> Json:
        task = by_id[sample["task_id"]]
        judged = judge(task, task.program(sample), known.get(task.task_id), sandbox)
        return {"task_id": task.task_id, "sample": sample["sample"], **asdict(judged)}

    with ThreadPoolExecutor(sandbox.workers) as pool:
        for verdict in progress(pool.map(verdict_on, waiting), len(waiting), "samples graded"):
            verdicts.append(verdict)
            if path is not None:
                append_jsonl(path, [verdict])
    return verdicts


def matching_lines(lines: Sequence[Json], wanted: Sequence[Json], is_whole: Callable[[Json], bool]) -> list[Json]:
    """Return the first `lines` that are whole and belong to the same samples as the lines of `wanted`."""
    matching = []
    for line, want in zip(lines, wanted, strict=False):
        if line.get("task_id") != want["task_id"] or line.get("sample") != want["sample"] or not is_whole(line):
            break
        matching.append(line)
    return matching


def _is_verdict(line: Json) -> bool:
    """Return whether a line of a run folder, which anybody may have written, has all fields of `Judged`."""
    kinds = {"passed": bool, "base": bool, "plus": bool | None, "status": str, "detail": str, "trusted": bool}
    return all(isinstance(line.get(name, ...), kind) for name, kind in kinds.items())


def split_by_imports(tasks: Sequence[Task], sandbox: Sandbox) -> tuple[list[Task], dict[str, str]]:
    """Return the tasks whose imports are installed, and the reason for the id of each other one."""
    names = sorted(set().union(*(task.libraries for task in tasks)))
    absent: set[str] = set()
    if names:
        probe = f"import importlib.util\nprint(*(n for n in {names!r} if importlib.util.find_spec(n) is None))"
        absent.update(sandbox.run(probe).stdout.split())
    skipped: dict[str, str] = {}
    for task in tasks:
        missing = absent.intersection(task.libraries)
        if missing:
            skipped[task.task_id] = f"needs {', '.join(sorted(missing))}"
    return [task for task in tasks if task.task_id not in skipped], skipped


# --- one program -----------------------------------------------------------------------------------------------------


def judge(task: Task, program: str, reference: Reference | None, sandbox: Sandbox) -> Judged:
    """Judge one program. Tasks with inputs need their `reference`."""
    if isinstance(task.tests, Calls):
        assert reference is not None
        return _judge_calls(task, task.tests, program, reference, sandbox)
    assert task.tests is not None
    tests, limits = _tests_of(task, task.tests)
    verdict = grade(program, tests, limits, sandbox=sandbox, together=True)
    return Judged(verdict.passed, verdict.passed, None, verdict.status, verdict.detail, verdict.trusted)


def _judge_calls(task: Task, tests: Calls, program: str, reference: Reference, sandbox: Sandbox) -> Judged:
    count = len(tests.base)
    base_failure = _run_calls(task, tests, slice(0, count), program, reference, sandbox)
    plus_failure = None
    plus: bool | None = None
    if tests.plus is not None:
        plus_failure = _run_calls(task, tests, slice(count, None), program, reference, sandbox)
        plus = plus_failure is None
    status, detail = base_failure or plus_failure or ("ok", "")
    return Judged(status == "ok", base_failure is None, plus, status, detail, trusted=True)


def _run_calls(
    task: Task, tests: Calls, part: slice, program: str, reference: Reference, sandbox: Sandbox
) -> tuple[str, str] | None:
    """Call the program with a part of its inputs. Return the status and detail of the first wrong result, if any."""
    rows = tests.inputs[part]
    seconds = reference.seconds[part]
    calls = [Call(f"{task.entry_point}(*_)", row, time_limit(time)) for row, time in zip(rows, seconds, strict=True)]
    # reading larger results would only cost this process time and memory
    output = min(_SPARE_OUTPUT + 4 * reference.size, _MOST_OUTPUT)
    limits = Limits(seconds=total_limit(seconds), memory=MEMORY, output=output, processes=32)
    outcomes = call(program, calls, limits, sandbox=sandbox, until_failure=True)
    expected = zip(outcomes, rows, reference.values[part], strict=False)
    for number, (outcome, row, value) in enumerate(expected, part.start + 1):
        where = f"input {number}: {task.entry_point}{short(row)}"
        if outcome.status != "ok":
            return outcome.status, f"{where}: {outcome.detail}"
        if not correct(task.task_id, row, value, outcome.value, tests.atol, in_order=tests.in_order):
            return "failed", f"{where} gave {short(outcome.value)}, not {short(value)}"
    if len(outcomes) < len(rows):  # an input without an outcome is a failure
        return "killed", f"input {part.start + len(outcomes) + 1}: there is no outcome"
    return None


def _tests_of(task: Task, tests: Asserts | Script) -> tuple[Sequence[str], Limits]:
    """The tests of a task, and the limits that its authors give all of them together."""
    if isinstance(tests, Asserts):
        return tests.lines, _ASSERT_LIMITS
    if "class TestCases" in tests.code:
        return [tests.code + _RUN_TEST_CASES], _SCRIPT_LIMITS
    return check_asserts(tests.code, task.entry_point) or [tests.code], _CHECK_LIMITS


def check_asserts(code: str, entry_point: str) -> list[str]:
    """Return the asserts of HumanEval's `check(candidate)`, about the entry point itself; none if it does more."""
    none: tuple[list[str], bool, str] = ([], False, "")
    asserts, is_all, _ = read_limited(asserts_of_check, code, entry_point, otherwise=none)
    return asserts if is_all else []


# --- published solutions ---------------------------------------------------------------------------------------------


def references(tasks: Sequence[Task], sandbox: Sandbox, progress: Progress = silent) -> dict[str, Reference]:
    """Return the reference of each task with inputs, from the cache or the sandbox. Raises ConfigError if one fails."""
    known: dict[str, Reference] = {}
    missing = []
    for task in tasks:
        if isinstance(task.tests, Calls):
            stored = _read_reference(_reference_path(task, task.tests))
            if stored is None:
                missing.append(task)
            else:
                known[task.task_id] = stored
    if missing:
        with ThreadPoolExecutor(sandbox.workers) as pool:
            results = pool.map(lambda task: _compute_reference(task, sandbox), missing)
            computed = progress(results, len(missing), "published solutions run")
            known.update(zip([task.task_id for task in missing], computed, strict=True))
    return known


def _reference_path(task: Task, tests: Calls) -> Path:
    content = repr((task.canonical, task.entry_point, tests.base, tests.plus or ()))
    key = hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()[:16]
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", task.task_id)[:80]  # an id may be anything; the key alone distinguishes
    return cache_folder() / "references" / f"{name}-{key}.json"


def _read_reference(path: Path) -> Reference | None:
    try:
        text = path.read_text(encoding="utf-8")
        stored = json.loads(text)
        return Reference(tuple(map(from_json, stored["values"])), tuple(stored["seconds"]), len(text))
    except (OSError, ValueError, KeyError, TypeError):  # absent or broken: to be computed again
        return None


def _compute_reference(task: Task, sandbox: Sandbox) -> Reference:
    assert isinstance(task.tests, Calls)
    calls = [Call(f"{task.entry_point}(*_)", row, _REFERENCE_SECONDS) for row in task.tests.inputs]
    limits = Limits(seconds=10 * _REFERENCE_SECONDS, memory=MEMORY, output=_MOST_OUTPUT, processes=32)
    values: list[Any] = []
    seconds: list[float] = []
    for number, outcome in enumerate(call(task.canonical, calls, limits, sandbox=sandbox), 1):
        if outcome.status != "ok":
            raise ConfigError(
                f"the published solution of {task.task_id} fails on input {number} ({outcome.detail}); "
                "fetch the benchmark's data again"
            )
        values.append(outcome.value)
        seconds.append(round(outcome.seconds, 6))
    text = json.dumps({"values": list(map(to_json, values)), "seconds": seconds})
    path = _reference_path(task, task.tests)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return Reference(tuple(values), tuple(seconds), len(text))
