"""Programs are judged by each kind of task as its benchmark judges them."""

from dataclasses import replace
from pathlib import Path

import pytest

from diffucoder.errors import ConfigError
from diffucoder.evaluation.benchmarks import Script, Task
from diffucoder.evaluation.judge import Judged, check_asserts, judge, references, split_by_imports
from diffucoder.grading.sandbox import Sandbox

CHECK = (
    "METADATA = {}\ndef check(candidate):\n    assert candidate(2) == 1\n    assert True, 'here'\n"
    "    assert candidate(3) == 1.5\ncheck(half)\n"
)
CASES = """
import unittest
class TestCases(unittest.TestCase):
    def test_even(self):
        self.assertEqual(half(2), 1)
    def test_odd(self):
        self.assertEqual(half(3), 1.5)
"""


def judged(task: Task, program: str, sandbox: Sandbox) -> Judged:
    known = references([task], sandbox)
    return judge(task, program, known.get(task.task_id), sandbox)


@pytest.mark.parametrize(
    ("program", "base", "plus", "detail"),
    [
        ("def half(x):\n    return x / 2\n", True, True, ""),
        ("def half(x):\n    return x * 0.5000000001\n", True, True, ""),
        ("def half(x):\n    return x // 2\n", True, False, "input 3: half(1,) gave 0, not 0.5"),
        ("def half(x):\n    return x\n", False, False, "input 1: half(2,) gave 2, not 1.0"),
        ("def half(x):\n    return 1 / (4 - x)\n", False, False, "input 1: half(2,) gave 0.5"),
        ("def other(x):\n    return x / 2\n", False, False, "NameError"),
        ("import os\nos._exit(0)\n", False, False, "ended before"),
        ("half = type('', (), {'__call__': lambda *a: __import__('os')._exit(0)})()", False, False, "ended before"),
        ("", False, False, "NameError"),
        ("import os\nos.kill(os.getppid(), 9)\n", False, False, "input 1: half(2,): "),
        ("import os\nos.kill(-1, 9)\n", False, False, "input 1: half(2,): "),
    ],
)  # fmt: skip
def test_a_task_with_inputs_compares_results(
    program: str, base: bool, plus: bool, detail: str, half: Task, sandbox: Sandbox
) -> None:
    result = judged(half, program, sandbox)
    assert (result.passed, result.base, result.plus, result.trusted) == (base and plus, base, plus, True)
    assert detail in result.detail


def test_a_call_without_an_outcome_is_no_pass(half: Task, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    known = references([half], sandbox)["Test/0"]
    monkeypatch.setattr("diffucoder.evaluation.judge.call", lambda *a, **k: [])
    assert not judge(half, half.canonical, known, sandbox).passed


def test_results_far_larger_than_the_published_ones_are_not_read(half: Task, sandbox: Sandbox) -> None:
    result = judged(half, "def half(x):\n    return [[]] * 100_000\n", sandbox)
    assert (result.passed, result.status) == (False, "killed")
    assert "output: gave more than" in result.detail


def test_the_published_solution_runs_once(half: Task, sandbox: Sandbox) -> None:
    ran: list[int] = []

    def progress(items: object, count: int, what: str) -> object:
        ran.append(count)
        return items

    first = references([half], sandbox, progress)  # type: ignore[arg-type]
    assert references([half], sandbox, progress) == first  # type: ignore[arg-type]
    assert ran == [1]
    assert first["Test/0"].values == (1.0, 2.0, 0.5, 0.15)


def test_a_published_solution_that_fails_is_told(half: Task, sandbox: Sandbox) -> None:
    with pytest.raises(ConfigError, match=r"Test/0 fails on input 1 \(NameError"):
        judged(replace(half, canonical="pass"), "pass", sandbox)


def test_a_check_made_of_asserts_is_judged_from_outside(half: Task, sandbox: Sandbox) -> None:
    task = replace(half, tests=Script(CHECK))
    assert check_asserts(CHECK, "half") == ["assert half(2) == 1", "assert half(3) == 1.5"]
    good = judged(task, task.canonical, sandbox)
    assert (good.passed, good.plus, good.trusted) == (True, None, True)
    liar = "class L:\n    __eq__ = lambda *a: True\ndef half(x):\n    return L()\n"
    assert not judged(task, liar, sandbox).passed


@pytest.mark.parametrize(
    "tests",
    [
        "DATA = 2\ndef check(candidate):\n    assert candidate(DATA) == 1\n",
        "def same(a, b):\n    return a == b\ndef check(candidate):\n    assert same(candidate(2), 1)\n",
        "def check(candidate, n=2):\n    assert candidate(n) == 1\n",
        "def check(candidate):\n    assert candidate(2) == 3\ndef check(candidate):\n    assert candidate(2) == 1\n",
    ],
)
def test_a_check_that_needs_the_code_around_it_runs_whole(half: Task, sandbox: Sandbox, tests: str) -> None:
    task = replace(half, tests=Script(tests + "check(half)\n"))
    assert judged(task, task.canonical, sandbox).passed
    assert not judged(task, "def half(x): return 7", sandbox).passed


def test_a_check_runs_in_one_process_for_three_seconds(half: Task, sandbox: Sandbox) -> None:
    """As human-eval does, whose `timeout` is 3.0."""
    task = replace(half, tests=Script(CHECK))
    grown = "def half(x, seen=[]):\n    seen.append(x)\n    return sum(seen) / 2\n"
    assert judged(task, grown, sandbox).status == "failed"
    slow = "import time\ndef half(x):\n    time.sleep(2)\n    return x / 2\n"  # twice
    assert judged(task, slow, sandbox).status == "timeout"
    assert judged(task, slow.replace("(2)", "(0.5)"), sandbox).passed


def test_a_check_that_does_more_runs_whole_and_is_not_trusted(half: Task, sandbox: Sandbox) -> None:
    tests = CHECK.replace(
        "    assert candidate(3)", "    for x in (1, 3): assert candidate(x) == x / 2\n    assert candidate(3)"
    )
    task = replace(half, tests=Script(tests))
    assert check_asserts(tests, "half") == []
    good, bad = (judged(task, program, sandbox) for program in (task.canonical, "def half(x): return 1"))
    assert (good.passed, good.trusted, bad.passed) == (True, False, False)


def test_test_cases_run_beside_the_program(half: Task, sandbox: Sandbox) -> None:
    task = replace(half, tests=Script(CASES))
    assert judged(task, task.canonical, sandbox).passed
    bad = judged(task, "def half(x):\n    return x // 2\n", sandbox)
    assert not bad.passed
    assert "test_odd: AssertionError: 1 != 1.5" in bad.detail
    assert not bad.trusted
    empty = replace(task, tests=Script("import unittest\nclass TestCases(unittest.TestCase):\n    pass\n"))
    assert "no test ran" in judged(empty, task.canonical, sandbox).detail


def test_a_task_whose_imports_are_absent_is_known(half: Task, sandbox: Sandbox) -> None:
    other = replace(half, task_id="Test/1", libraries=("nobody_made_this", "json"))
    assert split_by_imports([half, other], sandbox) == ([half], {"Test/1": "needs nobody_made_this"})


def test_every_published_solution_of_a_sample_of_humaneval_passes(shared: Path, sandbox: Sandbox) -> None:
    from diffucoder.evaluation.benchmarks import load

    tasks = [task for task in load("humaneval+", shared / "data") if task.task_id in ("HumanEval/32", "HumanEval/53")]
    assert len(tasks) == 2
    assert all(judged(task, task.canonical, sandbox).passed for task in tasks)
