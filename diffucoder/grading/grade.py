"""Judge a program by its tests: program + tests → Verdict. Or call it: program + calls → outcomes.

In the sandbox, `runner` puts questions to processes that run the program. What a test expects stays here: an assert
`f(2) == 4` is split (`asserts`), the program answers `f(2)` with plain data (`values`), and this process compares the
answer with 4. A test that cannot be split runs beside the program. Its verdict is `trusted=False`, because a program
that sets out to cheat can pass it (`docs/sandbox.md`).
"""

import json
import marshal
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from diffucoder.errors import ConfigError
from diffucoder.grading.asserts import Assert, parse_all
from diffucoder.grading.runner import Question
from diffucoder.grading.sandbox import DEFAULT_LIMITS, Limits, Sandbox, Status, source_of
from diffucoder.grading.values import from_json, readable, short

_GRACE = 1.0  # seconds for the runner to start and to report
_PATIENCE = 5  # a program that waits for a processor has so many times its seconds on the clock, and 20 more
_ANSWER_BYTES = 1 << 20  # of one answer; a list of all primes below a million takes half of it
_LINE_BYTES = 1024  # of a line of the runner's report, without a value


@dataclass(frozen=True)
class TestVerdict:
    """The result of one test."""

    passed: bool
    status: Status  # "failed" also for a wrong answer
    detail: str
    trusted: bool = True  # False: the test ran beside the program, which could have tampered with it


@dataclass(frozen=True)
class Verdict:
    """The result of all tests. `status` and `detail` are those of the first test that did not pass."""

    passed: bool
    passed_tests: int
    total_tests: int
    status: Status | Literal["no program"]
    seconds: float
    detail: str
    tests: tuple[TestVerdict, ...] = ()

    @property
    def pass_rate(self) -> float:
        """Share of the tests that passed."""
        return self.passed_tests / self.total_tests

    @property
    def trusted(self) -> bool:
        """Whether no test ran beside the program."""
        return all(test.trusted for test in self.tests)


@dataclass(frozen=True)
class Call:
    """An expression that the program evaluates, in which `_` is `arguments`, and its seconds."""

    expression: str
    arguments: tuple[Any, ...] = ()  # plain data
    seconds: float = 5.0


@dataclass(frozen=True)
class Outcome:
    """The value of a call, or why there is none."""

    status: Status
    value: Any  # plain data: None, numbers, strings, containers of them; a Digest of what is large; else Opaque
    seconds: float
    detail: str = ""


_NOT_RUN = Outcome("failed", None, 0.0, "did not run, because a test before it failed")


def grade(
    program: str,
    tests: Sequence[str],
    limits: Limits = DEFAULT_LIMITS,
    *,
    sandbox: Sandbox | None = None,
    together: bool = False,
) -> Verdict:
    """Run each test in a fresh process of the program, or all of them `together`.

    Together they are graded as published benchmarks are: one process, in order, until the first failure. A test sees
    what the ones before it left, such as a default argument that has grown.

    `limits.seconds` is for all tests together, on the clock, without the time in which a program waits for a processor.
    Tests that cannot be split have a run of their own, with the same seconds again. Without `sandbox`, one is started
    for this program. Raises ConfigError if there are no tests.
    """
    if isinstance(tests, str) or not tests:
        raise ConfigError(f"tests={tests!r} must be a list of one or more asserts; leave out a problem without tests")
    if not program.strip():
        return Verdict(False, 0, len(tests), "no program", 0.0, "the program is empty")
    asserts = parse_all(tests)
    if together and not all(asserts):  # one that runs beside the program must see what the others leave
        tests = ["\n".join(tests)]
        asserts = [None]
    questions: dict[str, dict[int, Question]] = {"value": {}, "test": {}}
    for index, (test, split) in enumerate(zip(tests, asserts, strict=True)):
        kind = "value" if split else "test"
        questions[kind][index] = (split.expression if split else test, (), limits.seconds)
    limits = replace(limits, output=max(limits.output, _ANSWER_BYTES))
    outcomes: dict[int, Outcome] = {}
    seconds = 0.0
    with nullcontext(sandbox) if sandbox else Sandbox(1) as box:
        # Two runs, because a program can read what a whole test expects in the run of that test.
        for kind, asked in questions.items():
            if asked:
                job = {"kind": kind, "questions": [*asked.values()], "fresh": not together, "stop_at_failure": together}
                answers, run_seconds = _ask(box, program, job, limits)
                outcomes.update(zip(asked, answers, strict=False))
                seconds += run_seconds
    verdicts = tuple(_judge(test, asserts[index], outcomes.get(index, _NOT_RUN)) for index, test in enumerate(tests))
    passed = sum(verdict.passed for verdict in verdicts)
    for number, verdict in enumerate(verdicts, start=1):
        if not verdict.passed:
            detail = f"test {number}: {verdict.detail}"
            return Verdict(False, passed, len(tests), verdict.status, seconds, detail, verdicts)
    return Verdict(True, passed, len(tests), "ok", seconds, "", verdicts)


def grade_many(
    pairs: Iterable[tuple[str, Sequence[str]]], limits: Limits = DEFAULT_LIMITS, *, workers: int | None = None
) -> list[Verdict]:
    """Grade (program, tests) pairs, `workers` at a time. Verdicts come in order."""
    with Sandbox(workers) as sandbox, ThreadPoolExecutor(sandbox.workers) as pool:
        return list(pool.map(lambda pair: grade(pair[0], pair[1], limits, sandbox=sandbox), pairs))


def call(
    program: str,
    calls: Sequence[Call],
    limits: Limits = DEFAULT_LIMITS,
    *,
    sandbox: Sandbox | None = None,
    until_failure: bool = False,
) -> list[Outcome]:
    """Evaluate the calls one after the other in one process of the program, or in a new one where that ends.

    `limits.seconds` is for all calls together. As in `grade`, no seconds count in which the program waits for a
    processor. With `until_failure` the first call without a value is the last one, and the list ends there.
    """
    if not calls:
        return []
    questions = [(each.expression, each.arguments, each.seconds) for each in calls]
    job = {"kind": "value", "questions": questions, "fresh": False, "stop_at_failure": until_failure}
    with nullcontext(sandbox) if sandbox else Sandbox(1) as box:
        return _ask(box, program, job, limits)[0]


def _ask(sandbox: Sandbox, program: str, job: dict[str, Any], limits: Limits) -> tuple[list[Outcome], float]:
    """An outcome for every question of a job (see `runner.main`), and the seconds of the run."""
    count = len(job["questions"])
    clock = _PATIENCE * limits.seconds + 20
    output = _LINE_BYTES * count + limits.output
    if job["fresh"]:  # then every answer may be as long as the limit
        output = (_LINE_BYTES + limits.output) * count
    job |= {"program": program, "seconds": limits.seconds, "clock": clock, "output": limits.output}
    roomier = replace(limits, seconds=clock + _GRACE, processes=limits.processes + 1, output=output)
    result = sandbox.run(source_of("runner.py"), roomier, stdin=marshal.dumps(job, 2))
    answers = dict(map(_read_line, _LINE.finditer(result.stdout)))
    status: Status = "killed" if result.status == "ok" else result.status
    lost = Outcome(status, None, 0.0, readable(result.detail) or "the runner ended before it")
    outcomes = [answers.get(index, lost) for index in range(count)]
    # without any answer the runner did not stop at a failure: the program ended it
    if job["stop_at_failure"] and answers and answers[max(answers)].status != "ok":
        outcomes = outcomes[: max(answers) + 1]
    return outcomes, result.seconds


# a line that was cut short has no end
_LINE = re.compile(r'^\[([0-9]{1,9}), "(ok|failed|timeout|killed)", ([0-9]{1,9}\.[0-9]{6}), (.*)\]\n', re.MULTILINE)


def _read_line(line: re.Match[str]) -> tuple[int, Outcome]:
    """Index and outcome from a line of the report. The last field is the program's, and may be anything."""
    status = cast(Status, line[2])
    seconds = float(line[3])
    try:
        content = json.loads(line[4])
        if status == "ok":
            return int(line[1]), Outcome("ok", from_json(content), seconds)
        return int(line[1]), Outcome(status, None, seconds, readable(str(content)))
    except (ValueError, TypeError, LookupError, RecursionError, ArithmeticError):
        return int(line[1]), Outcome("failed", None, seconds, "the answer is not plain data")


def _judge(test: str, split: Assert | None, outcome: Outcome) -> TestVerdict:
    trusted = split is not None
    if outcome.status != "ok":
        is_assert = outcome.detail == "AssertionError"
        detail = f"AssertionError: {readable(test)}" if is_assert else outcome.detail
        return TestVerdict(False, outcome.status, detail, trusted)
    if split is None or split.holds(outcome.value):
        return TestVerdict(True, "ok", "", trusted)
    return TestVerdict(False, "failed", f"AssertionError: {readable(test)}; it gave {short(outcome.value)}", trusted)
