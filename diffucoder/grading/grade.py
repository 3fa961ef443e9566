"""Judge a program by its tests: program + tests → Verdict; or ask it what calls give: program + calls → outcomes.

One sandbox run a program; in it a harness (`harness`) puts the questions to children that run the program. Tests are
assert strings. What a test expects does not go where the program is: `assert f(2) == 4` is *split*, the program is
asked for `f(2)`, answers with plain data (`plain`), and 4 is compared with it here (`asserts`), as is all else that the
assert does with the answer. So a program can only pass by giving the right answer: patching `==`, shadowing `abs`,
returning objects that equal everything, `sys.exit(0)`, `os._exit(0)`, exit handlers, printed results and killing who
asks do not help.

What cannot be split runs beside the program, in a sandbox run of its own, and its verdict says `trusted=False`: a
program that is out to cheat can dig such a test's secret out of memory (`gc`, `ctypes`), read what it expects up the
stack, jump over it with a trace function, shadow the built-ins it calls, or return objects that equal everything.
Exits, exit handlers, printing and patching `os` or `exec` do not work there either.
"""

import json
import marshal
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from diffucoder.errors import ConfigError
from diffucoder.grading.asserts import Assert, parse
from diffucoder.grading.harness import PATIENCE
from diffucoder.grading.plain import from_data, readable, short
from diffucoder.grading.sandbox import DEFAULT_LIMITS, Limits, Sandbox, Status

_GRACE = 1.0  # seconds the harness gets beyond the questions' own, to start and to report
_SLEEP = 60.0  # seconds on the clock that tests may take beyond their own, of a processor
_LINE = 1024  # bytes a message may take in the harness's report


@dataclass(frozen=True)
class TestVerdict:
    """How a program did in one test."""

    passed: bool
    status: Status  # "failed" also for a wrong answer
    detail: str
    line: int | None = None  # of the program, where an exception passed through it
    trusted: bool = True  # False: the test ran beside the program, which could have tampered with it


@dataclass(frozen=True)
class Verdict:
    """How a program did; `status`, `detail` and `line` speak of the first test that did not pass."""

    passed: bool
    passed_tests: int
    total_tests: int
    status: Status | Literal["no program"]
    seconds: float
    detail: str
    line: int | None = None
    tests: tuple[TestVerdict, ...] = ()

    @property
    def pass_rate(self) -> float:
        """Share of tests passed."""
        return self.passed_tests / self.total_tests

    @property
    def trusted(self) -> bool:
        """Whether no test ran beside the program."""
        return all(test.trusted for test in self.tests)


@dataclass(frozen=True)
class Call:
    """A question: what does `expression` give, where `_` stands for `arguments`, within so many seconds?"""

    expression: str
    arguments: tuple[Any, ...] = ()  # plain data
    seconds: float = 5.0


@dataclass(frozen=True)
class Outcome:
    """What became of a call: a value, or why there is none."""

    status: Status
    value: Any  # plain data: None, numbers, strings, containers of them; a Digest of what is large; else Opaque
    seconds: float
    detail: str = ""
    line: int | None = None


def grade(
    program: str,
    tests: Sequence[str],
    limits: Limits = DEFAULT_LIMITS,
    *,
    sandbox: Sandbox | None = None,
    unsafe: bool = False,
) -> Verdict:
    """Put every test to a fresh process of the program; `limits.seconds` is for all of them together.

    Those that cannot be split run in a job of their own, which has as many seconds again.
    Seconds are those of a processor, so that a busy machine makes nothing a time-out; who sleeps gets five times as
    many on the clock, but no more than a minute beyond them.
    Without `sandbox` one is started for this program. Raises ConfigError where there are no tests.
    """
    if isinstance(tests, str) or not tests:
        raise ConfigError(f"tests={tests!r} must be a list of one or more assert strings; drop the problem otherwise")
    if not program.strip():
        return Verdict(False, 0, len(tests), "no program", 0.0, "the program is empty")
    parsed = [parse(test) for test in tests]
    asked = {at: ("value", p.expression, (), 0.0) for at, p in enumerate(parsed) if p}
    whole = {at: ("run", tests[at], (), 0.0) for at, p in enumerate(parsed) if not p}
    outcomes: dict[int, Outcome] = {}
    seconds = 0.0
    with _at_hand(sandbox, unsafe) as box:
        for questions in filter(None, (asked, whole)):  # apart: what a whole test expects can be read where it runs
            found, took = _ask(box, program, list(questions.values()), limits, fresh=True)
            outcomes.update(zip(questions, found, strict=True))
            seconds += took
    return _verdict([_judge(tests[at], parsed[at], outcomes[at]) for at in range(len(tests))], seconds)


def grade_many(
    pairs: Iterable[tuple[str, Sequence[str]]],
    limits: Limits = DEFAULT_LIMITS,
    *,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
    unsafe: bool = False,
) -> list[Verdict]:
    """Grade (program, tests) pairs, `workers` at a time, in order; `progress` hears how many are done."""
    verdicts: list[Verdict] = []
    with Sandbox(workers, unsafe=unsafe) as sandbox, ThreadPoolExecutor(sandbox.workers) as pool:
        for verdict in pool.map(lambda pair: grade(pair[0], pair[1], limits, sandbox=sandbox), pairs):
            verdicts.append(verdict)
            if progress is not None:
                progress(len(verdicts))
    return verdicts


def call(
    program: str,
    calls: Sequence[Call],
    limits: Limits = DEFAULT_LIMITS,
    *,
    sandbox: Sandbox | None = None,
    until_failure: bool = False,
    unsafe: bool = False,
) -> list[Outcome]:
    """Ask the program one call after another in one process, as long as it lives; `limits.seconds` is for all together.

    Seconds are those of a processor here, so that a busy machine makes nothing a time-out; who sleeps gets five times
    as many on the clock.
    With `until_failure` the first call without a value is the last one asked: the list is then shorter than `calls`.
    """
    if not calls:
        return []
    questions = [("value", each.expression, each.arguments, each.seconds) for each in calls]
    with _at_hand(sandbox, unsafe) as box:
        outcomes, _ = _ask(box, program, questions, limits, stop=until_failure)
    return outcomes


@contextmanager
def _at_hand(sandbox: Sandbox | None, unsafe: bool) -> Iterator[Sandbox]:
    if sandbox is not None:
        yield sandbox
        return
    with Sandbox(1, unsafe=unsafe) as own:
        yield own


def _ask(
    sandbox: Sandbox, program: str, questions: list[Any], limits: Limits, *, fresh: bool = False, stop: bool = False
) -> tuple[list[Outcome], float]:
    """An outcome for every question, and the seconds in all."""
    clock = PATIENCE * limits.seconds
    if fresh:
        clock = min(clock, limits.seconds + _SLEEP)
    roomier = replace(
        limits,
        seconds=clock + _GRACE,
        processes=limits.processes + 1,
        output=(_LINE + limits.output) * len(questions) if fresh else _LINE * len(questions) + limits.output,
    )
    job = marshal.dumps((limits.seconds, clock, limits.output, fresh, stop, program, questions), 2)
    result = sandbox.run(_harness(), roomier, stdin=job)
    missing: Status = "killed" if result.status == "ok" else result.status
    lost = Outcome(missing, None, 0.0, readable(result.detail) or "the harness ended before it")
    outcomes = [lost] * len(questions)
    told = 0
    for line in result.stdout.split("\n")[:-1]:  # a line cut short has no end
        index, outcome = _outcome(line) or (len(questions), lost)
        if index < len(questions):
            outcomes[index] = outcome
            told = max(told, index + 1)
    # that nothing was told is no end: somebody ended the harness
    ended_early = stop and 0 < told < len(questions) and outcomes[told - 1].status != "ok"
    return outcomes[:told] if ended_early else outcomes, result.seconds


def _outcome(line: str) -> tuple[int, Outcome] | None:
    """Read what the harness told, None if that is no line of its; its answer is the program's, and may be anything."""
    told = _TOLD.fullmatch(line)
    if told is None:
        return None
    index, status, seconds = int(told[1]), told[2], float(told[3])
    try:
        answer = json.loads(told[4])
        if status == "ok":
            return index, Outcome("ok", from_data(answer), seconds)
        where, detail = answer
        return index, Outcome(_STATUS[status], None, seconds, readable(str(detail)), int(where) or None)
    except (ValueError, TypeError, LookupError, RecursionError, ArithmeticError):
        return index, Outcome("failed", None, seconds, "gave what is no data")


_TOLD = re.compile(r'\[([0-9]{1,9}), "(ok|failed|timeout|killed)", ([0-9]{1,9}\.[0-9]{6}), (.*)\]', re.DOTALL)
_STATUS: dict[str, Status] = {"failed": "failed", "timeout": "timeout", "killed": "killed"}


def _judge(test: str, parsed: Assert | None, outcome: Outcome) -> TestVerdict:
    trusted = parsed is not None
    if outcome.status != "ok":
        detail = outcome.detail
        if detail == "AssertionError":
            detail += ": " + readable(test)
        return TestVerdict(False, outcome.status, detail, outcome.line, trusted)
    if parsed is None or parsed.holds(outcome.value):
        return TestVerdict(True, "ok", "", None, trusted)
    detail = f"AssertionError: {readable(test)}; it gave {short(outcome.value)}"
    return TestVerdict(False, "failed", detail, None, trusted)


def _verdict(tests: list[TestVerdict], seconds: float) -> Verdict:
    failed = [index for index, test in enumerate(tests) if not test.passed]
    passed = len(tests) - len(failed)
    if not failed:
        return Verdict(True, passed, len(tests), "ok", seconds, "", None, tuple(tests))
    first = tests[failed[0]]
    detail = f"test {failed[0] + 1}: {first.detail}"
    return Verdict(False, passed, len(tests), first.status, seconds, detail, first.line, tuple(tests))


@cache
def _harness() -> str:
    return Path(__file__).with_name("harness.py").read_text(encoding="utf-8")
