"""Hostile texts: reading a reply, a test or a check takes a bounded time, and crashes nothing.

What takes long is killed in a process of its own after two seconds of a processor (`grading.reading`), so the time of
this process is what is measured here.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from diffucoder.analysis.tokens import token_classes
from diffucoder.evaluation.judge import check_asserts
from diffucoder.grading.asserts import parse
from diffucoder.grading.constants import passing_constants
from diffucoder.grading.extract import (
    answered,
    called_names,
    completed,
    future_first,
    program_blocks,
    program_from,
    program_key,
)
from diffucoder.training.exercises import parse_exercise
from diffucoder.training.rewards import read_program, reward

SIZE = 1 << 20
T = "```"


def repeat(unit: str, size: int = SIZE) -> str:
    return unit * (size // len(unit))


TEXTS = {
    "decorators": repeat("@x\n"),
    "few decorators": repeat("@x\n", 5000),
    "brackets": "(" * 100_000,
    "brackets that are closed": "[" * 100_000 + "]" * 100_000,
    "fences": repeat(f"{T}\n"),
    "programs that need each other": "".join(f"{T}\ndef f{n}(): return f{n + 1}()\n" for n in range(20_000)),
    "strings without end": repeat("'''\n"),
    "near programs": repeat("def f(:\n"),
    "heads without bodies": repeat("if x:\n"),
    "a long line": "x = " + "1+" * 500_000 + "1",
    "operators": "x = " + "-" * SIZE + "1",
    "attributes": "x" + ".a" * 500_000,
    "branches": "if x: pass\n" + "elif x: pass\n" * 70_000,
    "NULs": repeat("\0"),
    "surrogates": repeat("\ud800"),
    "f-strings": 'f"{' * 10_000,
    "a number": "x = " + "9" * SIZE,
    "thinking": "<think>\n" * 10_000 + "</think>\n" * 10_000,
    "continued lines": repeat("x=\\\n"),
    "HTML": repeat("<pre><code"),
    "prompts": repeat(">>> x\n"),
    "names of other scripts": repeat("ℌ = 1\n"),
}


def within_time(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The result of a call that takes this process less than two seconds, and less than a minute on the clock."""
    begin = time.process_time()
    clock = time.monotonic()
    result = function(*args, **options)
    assert time.process_time() - begin < 2
    assert time.monotonic() - clock < 60
    return result


@pytest.mark.parametrize("name", TEXTS)
def test_a_hostile_reply_is_read_in_bounded_time(name: str) -> None:
    form, program = within_time(read_program, TEXTS[name], "robust", ["assert f(2) == 4"])
    assert form in (0.0, 0.5, 1.0)
    assert isinstance(program, str)


@pytest.mark.parametrize("name", ["decorators", "programs that need each other", "a long line", "surrogates"])
def test_every_reader_has_the_limit(name: str) -> None:
    text = TEXTS[name]
    head = "def f(x):\n"
    assert isinstance(within_time(program_from, text), str)
    assert within_time(program_blocks, text, names=["f"])
    assert within_time(answered, head, text, "f")
    assert within_time(completed, head, text, "f")
    assert within_time(called_names, [text]) in ([], ["x"])
    assert within_time(future_first, text + "__future__")
    assert within_time(program_key, text)
    assert set(within_time(token_classes, [text[: SIZE // 2], text[SIZE // 2 :]])) <= {
        "text",
        "name",
        "operator",
        "keyword",
    }
    assert within_time(parse, f"assert f(2) == {text}") is None
    assert within_time(passing_constants, [text, f"assert f(2) == {text}"]) == ""
    assert within_time(check_asserts, text, "f") == []


def test_a_reply_that_takes_too_long_is_returned_as_it_is() -> None:
    assert program_from(TEXTS["programs that need each other"]) == TEXTS["programs that need each other"]
    assert completed("def f(x):\n", TEXTS["decorators"], "f") == "def f(x):\n" + TEXTS["decorators"]


def test_a_reply_that_takes_too_long_earns_nothing() -> None:
    class Unused:
        """No program may run."""

    text = f"{T}python\n{TEXTS['decorators']}def f(x): return x\n{T}\n"
    assert reward(text, ["assert f(2) == 4"], Unused()).total in (0.0, 0.25)  # type: ignore[arg-type] # as it says


def test_a_hostile_test_is_not_split_and_a_hostile_check_is_not_used() -> None:
    bomb = "assert f(2) == " + " + ".join(["[0] * 100_000"] * 20_000)  # each operation is allowed; all are too much
    assert within_time(parse, bomb) is None
    with pytest.raises(ValueError, match=r"field .test. (is not Python|takes too long to read)"):
        within_time(parse_exercise, "x", {"prompt": "P", "entry_point": "f", "test": TEXTS["brackets"]})


def test_other_graders_go_on_while_a_hostile_reply_is_read() -> None:
    """There is no lock that the reader of a hostile text holds."""
    program_from("def f(): pass")
    hostile = threading.Thread(target=program_from, args=[TEXTS["decorators"]])
    hostile.start()
    for _ in range(20):
        assert read_program("```python\ndef f(x): return x\n```", "robust", ["assert f(2) == 4"])[0] == 1.0
        assert parse("assert f(2) == 4") is not None
    assert hostile.is_alive()
    hostile.join()


def test_what_a_base_model_repeats_at_the_end_is_cut_at_once() -> None:
    """Degenerate answers repeat a line; each cut once cost a parse of everything before it."""
    program = "def f(x):\n    return x\n"
    for line in ("@x\n", "@x.y(1)\n\n", "x = \\\n"):
        assert completed("", program + "\n" + line * 300, "f").rstrip() == program.rstrip()
