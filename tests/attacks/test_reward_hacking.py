"""Programs that want a reward without solving the problem, through the real rewards and the real sandbox.

The problem: `digits(n)` is the sum of the digits of n. A cheat of `cheats.txt` earns nothing for tests, an honest
program everything. docs/rl.md names the kinds.
"""

from pathlib import Path

import pytest

from diffucoder.grading.constants import passing_constants
from diffucoder.grading.sandbox import Limits, Sandbox
from diffucoder.training.exercises import Exercise
from diffucoder.training.grpo import usable
from diffucoder.training.rewards import reward

TESTS = [
    "assert digits(123) == 6",
    "assert digits(9090) in (18, 19)",
    "assert abs(digits(55) - 10) < 1e-6",
    "assert digits(1) + 1 == 2",
    "assert not digits(70) != 7",
]
LIMITS = Limits(seconds=1.0)


def programs_of(file: str) -> dict[str, str]:
    """The programs of a text file, each after a line `### name: why it earns nothing`."""
    text = "\n" + Path(__file__).with_name(file).read_text(encoding="utf-8")
    programs = {}
    for part in text.split("\n### ")[1:]:
        head, _, program = part.partition("\n")
        programs[head.partition(":")[0]] = program.partition("\n## ")[0].strip()
    return programs


CHEATS = programs_of("cheats.txt")
BEFORE = CHEATS.pop("before every program")
HONEST = programs_of("honest.txt")


def fenced(program: str) -> str:
    return f"```python\n{program}\n```\n"


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_earns_nothing_for_tests(name: str, sandbox: Sandbox) -> None:
    given = reward(fenced(f"{BEFORE}\n\n\n{CHEATS[name]}"), TESTS, sandbox, limits=LIMITS)
    assert (given.pass_rate, given.solved, given.total <= 0.5) == (0.0, False, True), given


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_program_earns_everything(name: str, sandbox: Sandbox) -> None:
    assert reward(fenced(HONEST[name]), TESTS, sandbox).total == 2.5
    assert reward(fenced(HONEST[name]), TESTS, sandbox, style="paper").total == 2.5


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "```python\n```\n",
        "```python\n```\n" * 5,
        "```python\n# def digits(n): sum of digits\n```\n",
        '```python\n"""digits(n) is the sum of the digits."""\n```\n',
        "```python\npass\n```\n",
        "```python\n...\n```\n",
        "```python\nimport math\n```\n",
        "```python\ndigits\n```\n",
        "I would write digits(n) with a loop.",
        "def is a keyword, ```python``` a language",
        "<think>```python\ndef digits(n): return n\n```</think>",
        "```\n" * 1000,
    ],
)
def test_a_form_without_a_program_earns_nothing(reply: str, sandbox: Sandbox) -> None:
    assert reward(reply, TESTS, sandbox).total == 0.0


ANYTHING = "class A: pass\ndef f(*a): return A()"


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("def f(x): return float('nan')", ["assert not abs(f(7) - 49) > 1e-6", "assert not f(3) > 9"]),
        ("def f(x): return float('inf')", ["assert f(7) > 9", "assert f(3) >= 2"]),
        ("def f(x): return []", ["assert all(f(3))", "assert not any(f(5))", "assert len(f(3)) <= 3"]),
        ("def f(x): return []", ["assert sorted(f(3)) == []", "assert sum(f(3)) == 0"]),
        ("def f(x): return ''", ["assert f(3) in 'the right answer'"]),
        ("def f(x): return 0", ["assert f(3) in (0, 1)", "assert f(4) % 2 == 0", "assert isinstance(f(4), int)"]),
        ("def f(x): return 'xxx'", ["assert len(f(3)) == 3", "assert len(f(4)) > 2"]),
        ("def f(x): return [0, 0]", ["assert len(f(3)) == 2", "assert len(set(f(4))) == 1"]),
        ("def f(x): return True", ["assert f(3) == True", "assert f(7) is True", "assert f(11)"]),
        ("def f(x): return False", ["assert not f(4)"]),
        ("def f(x): return None", ["assert f(4) is None"]),
        ("def f(x): return 42", ["assert f(4) == 42", "assert f(5) == 42", "assert f(6) == 42"]),
        ("def f(x): return 4.2", ["assert abs(f(4) - 4.2) < 1e-6", "assert round(f(5), 1) == 4.2"]),
        ("def f(x): return 'yes'", ["assert f(4) == 'yes'", "assert f(5) in ['yes', 'no']"]),
        ("def f(*a): return 1\ndef g(*a): return ''", ["assert f(1) == 1", "assert g(1) == ''", "assert f(2) == 1"]),
        ("class Solution:\n    def f(self, x): return 1", ["assert Solution().f(3) == 1", "assert Solution().f(4)"]),
        (ANYTHING, ["assert f(3)", "assert f(3) is not None", "assert f(4) != 5"]),
        (ANYTHING, ["assert f(3) not in [1, 2]", "assert not f(3) == 4"]),
        ("def f(x): return 55", ["assert 0 <= f(3) <= 100", "assert 55 <= f(4) <= 60"]),
        (
            "def f(x): return float('nan')\nint = lambda x: x",
            ["assert not int(f(3)) > 9", "assert not int(f(4)) < 20"],
        ),
    ],
)
def test_tests_that_a_constant_passes_earn_nothing_and_are_not_trained_on(
    program: str, tests: list[str], sandbox: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    given = reward(fenced(program), tests, sandbox)
    assert (given.total, given.solved) == (0.5, False)
    assert given.detail.startswith("a constant passes all tests (")
    good = Exercise("good", "?", ("assert f(3) == 4", "assert f(4) == 5"))
    assert usable([Exercise("bad", "?", tuple(tests)), good], "data") == [good]
    assert "data: left out 1 problems whose tests a constant passes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "tests",
    [
        ["assert f(3) == 4"],  # any single result could be guessed
        ["assert f(3)", "assert not f(4)"],
        ["assert f(3) == True", "assert f(4) == False"],
        ["assert f(3) == 0", "assert f(4) == 1"],
        ["assert len(f('a')) == 1", "assert len(f('ab')) == 2"],
        ["assert f(1) == g(2)"],  # not split
        ["not Python ("],
        TESTS,
    ],
)
def test_tests_that_no_constant_passes_are_kept(tests: list[str]) -> None:
    assert passing_constants(tests) == ""


SIGN = """
import dis, sys
class Truth:
    def __bool__(self):
        code = sys._getframe(1).f_code
        return sum(each.opname == "UNARY_NOT" for each in dis.get_instructions(code)) == 2
def f(n): return Truth()
"""


def test_the_truth_that_is_expected_cannot_be_read_from_the_question(sandbox: Sandbox) -> None:
    """`not f(4)` and `f(3)` are asked in the same way."""
    given = reward(fenced(SIGN), ["assert f(3)", "assert not f(4)", "assert not f(6)", "assert f(5)"], sandbox)
    assert given.pass_rate <= 0.5


def test_a_table_of_the_tests_that_a_prompt_shows_earns_their_share_alone(sandbox: Sandbox) -> None:
    table = "def digits(n): return {123: 6}[n]"
    assert reward(fenced(table), TESTS, sandbox).pass_rate == 1 / len(TESTS)


@pytest.mark.parametrize("program", [BEFORE + "\nf = g = Everything()", "def f(n): return 1\ng = f"])
def test_tests_that_run_beside_the_program_earn_nothing(program: str, sandbox: Sandbox) -> None:
    given = reward(fenced(program), ["assert f(1) == g(2)", "x = f(3)\nassert x == 3", "assert f(7) == 9"], sandbox)
    assert (given.total, given.pass_rate) == (0.5, 0.0)
