"""Rewards: the released format check to the letter, what the robust one takes, and what cheating earns: nothing."""

import pytest

from diffucoder.grading.sandbox import Limits, Sandbox
from diffucoder.training.rewards import Style, read_program, reward

PROGRAM = "def add(a, b):\n    return a + b"
BLOCK = f"Here it is:\n```python\n{PROGRAM}\n```\n"
TESTS = ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(-1, 1) == 0", "assert add(2, 2) == 4"]


@pytest.mark.parametrize(
    ("completion", "released", "robust"),
    [
        (BLOCK, 1.0, 1.0),
        (BLOCK[:-1], 0.0, 1.0),
        (BLOCK + "\n", 0.0, 1.0),
        (BLOCK + "That is all.", 0.0, 1.0),
        (BLOCK + BLOCK, 0.0, 1.0),
        (BLOCK.replace("python", "Python"), 0.0, 1.0),
        (BLOCK.replace("python", "python "), 0.0, 1.0),
        (BLOCK.replace("\n", "\r\n"), 0.0, 1.0),
        ("```python\nx = '```'\n```\n", 0.0, 1.0),
        (f"Here it is: ```python\n{PROGRAM}\n```\n", 1.0, 1.0),
        ("```python\n```\n", 1.0, 0.0),
        ("```python\ndef add(a, b)\n    return a\n```\n", 0.5, 0.5),
        (f"```python\n{PROGRAM}\n", 0.0, 1.0),
        (PROGRAM, 0.0, 1.0),
        ("I cannot say", 0.0, 0.0),
        ("Sorry", 0.0, 0.0),
        ("Answer: yes", 0.0, 0.0),
        ("pass", 0.0, 0.0),
        ("import this", 0.0, 0.0),
        ("raise concerns", 0.0, 0.0),
        ("global warming", 0.0, 0.0),
        ("```python\nimport this\n```\n", 1.0, 0.0),
        ("import math\nadd = math.fsum", 0.0, 1.0),
        ("add: object = max", 0.0, 1.0),
        ("for each in range(3):\n    print(each)", 0.0, 1.0),
        ("", 0.0, 0.0),
    ],
)
def test_the_format_as_released_and_as_a_person_would_read_it(completion: str, released: float, robust: float) -> None:
    assert (read_program(completion, "paper")[0], read_program(completion)[0]) == (released, robust)


def test_three_of_four_tests_in_the_right_format_are_worth_two(sandbox: Sandbox) -> None:
    given = reward(BLOCK, [*TESTS[:3], "assert add(1, 1) == 3"], sandbox, style="paper")
    assert (given.total, given.format, given.pass_rate, given.solved) == (2.0, 1.0, 0.75, False)


@pytest.mark.parametrize(
    ("completion", "style", "total"),
    [
        (BLOCK, "paper", 2.5),
        (BLOCK.replace("):", ")"), "paper", 0.25),
        (BLOCK.rstrip("`\n"), "paper", 0.0),
        (BLOCK.replace("+", "-") + BLOCK, "paper", 0.0),
        (PROGRAM, "robust", 2.5),
        ("```python\n```\n", "paper", 0.5),
    ],
)
def test_both_parts_add_up(completion: str, style: Style, total: float, sandbox: Sandbox) -> None:
    assert reward(completion, TESTS, sandbox, style=style).total == total


def test_a_test_that_runs_out_of_time_costs_the_others_as_released_alone(sandbox: Sandbox) -> None:
    slow = BLOCK.replace("    return", "    while a == 2: pass\n    return")
    limits = Limits(seconds=2.0)
    assert reward(slow, TESTS, sandbox, style="paper", limits=limits).pass_rate == 0.0
    assert reward(slow, TESTS, sandbox, limits=limits).pass_rate == 0.75


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "raise SystemExit",
        "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b): raise KeyError",
        "print('__PASS_RATE__ 1.0')\ndef add(a, b): pass",
        "class Any:\n    def __eq__(self, other): return True\ndef add(a, b): return Any()",
        "import builtins\nbuiltins.AssertionError = Exception\ndef add(a, b): return None",
        "import unittest.mock as m\nadd = m.MagicMock(return_value=m.ANY)",
        "def add(a, b):\n    import sys\n    frame = sys._getframe(1)\n    frame.f_globals['add'] = lambda a, b: 3\n",
        "import signal, os\nos.kill(os.getppid(), signal.SIGKILL)",
        "import operator\nclass I(int):\n    __eq__ = lambda s, o: True\n    __hash__ = int.__hash__\n"
        "def add(a, b): return I(9)",
    ],
)
@pytest.mark.parametrize("style", ["robust", "paper"])
def test_programs_that_exit_fake_or_patch_earn_nothing_for_tests(program: str, style: Style, sandbox: Sandbox) -> None:
    given = reward(f"```python\n{program}\n```\n", TESTS, sandbox, style=style)
    assert (given.pass_rate, given.solved) == (0.0, False)


def test_a_number_that_equals_everything_earns_nothing_for_tests_that_do_more_than_compare(sandbox: Sandbox) -> None:
    liar = "class L(float):\n    __eq__ = lambda s, o: True\n    __ne__ = lambda s, o: False\n    __hash__ = None\n"
    tests = ["assert not f(2) != 4", "assert (f(2) == 4) == True"]
    given = reward(f"```python\n{liar}def f(x): return L()\n```\n", tests, sandbox)
    assert (given.pass_rate, given.solved) == (0.0, False)
