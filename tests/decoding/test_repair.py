"""A repair finds what is wrong in a program, with the shipped model, and keeps to its limits."""

import pytest

from diffucoder import DiffuCoder
from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.repair import Judge, RoundRequest, next_step, repair_rounds
from diffucoder.errors import PromptError, SandboxError
from diffucoder.grading.sandbox import Sandbox, isolation
from diffucoder.grading.syntax import fault_of

HEAD = "# Given a number, double the number.\ndef double(n):\n"
TESTS = ["assert double(2) == 4", "assert double(5) == 10"]

try:
    isolation()
    ISOLATED = True
except SandboxError:
    ISOLATED = False
sandboxed = pytest.mark.skipif(not ISOLATED, reason="programs cannot be isolated here")


@pytest.fixture(scope="module")
def tiny() -> DiffuCoder:
    return DiffuCoder.load(dtype=None, device="cpu")


@pytest.mark.parametrize(
    ("line", "fault"),
    [("    return n *\n", "SyntaxError"), ("    return m * 2\n", "nothing defines 'm'"), ("return n * 2\n", "Indent")],
)
def test_without_tests_a_repair_parses_and_defines_its_names(tiny: DiffuCoder, line: str, fault: str) -> None:
    repair = tiny.repair(HEAD + line)
    assert fault in repair.given.fault
    assert repair.given.line == 3
    assert repair.judgement.passed
    assert repair.changed
    assert fault_of(repair.text) == (0, "", True)
    assert 0 < repair.passes <= 1024


def test_the_rows_of_a_round_keep_a_rule_of_the_whole_text(tiny: DiffuCoder) -> None:
    params = DecodingParams(syntax="python")
    step = next_step(repair_rounds(tiny, f"{HEAD}    return n *\n", Judge(), params))
    assert isinstance(step, RoundRequest)
    for result in tiny.run([step])[0]:
        fault, message, parses = fault_of(result.text)
        assert parses != bool(result.problem), (result.text, result.problem, fault, message)


@sandboxed
def test_with_tests_a_repair_passes_them(tiny: DiffuCoder) -> None:
    with Sandbox(1) as sandbox:
        repair = tiny.repair(f"{HEAD}    return n + 2\n", tests=TESTS[1:], sandbox=sandbox)
        assert Judge(TESTS[1:], sandbox)(repair.text).passed
    assert repair.given.fault.startswith("test 1: AssertionError")
    assert repair.text.startswith(HEAD[:36])  # comments are not changed


@sandboxed
def test_what_passes_is_left_as_it_is(tiny: DiffuCoder) -> None:
    repair = tiny.repair(f"{HEAD}    return n + n\n", tests=TESTS)
    assert (repair.changed, repair.passes, repair.judgement.passed) == (False, 0, True)


def test_the_same_settings_give_the_same_repair(tiny: DiffuCoder) -> None:
    broken = f"{HEAD}    return n *\n"
    assert tiny.repair(broken, seed=3) == tiny.repair(broken, seed=3)


def test_a_repair_takes_no_more_passes_than_it_may(tiny: DiffuCoder) -> None:
    spent = []
    repair = tiny.repair(f"{HEAD}    return ((((((((n\n", passes=60, on_round=spent.append)
    assert repair.passes == sum(spent) <= 60


def test_a_round_has_no_more_rows_than_it_may(tiny: DiffuCoder) -> None:
    rounds = repair_rounds(tiny, f"{HEAD}    return ((((n\n", Judge(), DecodingParams(), passes=100, rows=5)
    request = next(rounds, None)
    passes = 0
    while request is not None:
        assert request.result_count == len(request.canvas.tokens) <= 5
        [results] = tiny.run([request])
        assert len(results) == request.result_count
        passes += sum(result.forward_passes for result in results)
        try:
            request = rounds.send(results)
        except StopIteration:
            request = None
    assert 0 < passes <= 100


def test_a_text_that_takes_too_many_passes_is_refused(tiny: DiffuCoder) -> None:
    with pytest.raises(PromptError, match="tokens, each takes a pass, and passes=5"):
        tiny.repair(f"{HEAD}    return (n\n", passes=5)


@pytest.mark.parametrize(
    ("program", "found"),
    [
        ("x = 1\n", (0, "", True)),
        ("x = 1\ny = z\n", (2, "NameError: nothing defines 'z'", True)),
        ("from a import *\ny = z\n", (0, "", True)),
        ("x = (\n", (1, "SyntaxError: '(' was never closed", False)),
        ("x = '\0'\n", (0, "SyntaxError: source code string cannot contain null bytes", False)),
    ],
)
def test_a_fault_has_its_line(program: str, found: tuple[int, str, bool]) -> None:
    assert fault_of(program) == found
