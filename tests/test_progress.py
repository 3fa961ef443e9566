"""Progress: a bar with a heading on a terminal, a line now and then elsewhere."""

import io

import pytest
from rich.console import Console

from diffucoder import progress as progress_module
from diffucoder.progress import progress


class Clock:
    """Time that passes when it is told to."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def test_without_a_terminal_there_is_a_line_every_few_seconds(clock: Clock) -> None:
    pipe = io.StringIO()
    with progress("runs/sft", 60, unit="step", console=Console(file=pipe, width=40)) as update:
        for step in range(1, 23):
            clock.now += 2.0
            update(step, f"loss {5 - step / 10:.2f}")
    lines = pipe.getvalue().splitlines()
    assert lines[0] == "runs/sft: step 3/60, loss 4.70, 114 s left"
    assert lines[-1] == "runs/sft: step 21/60, loss 2.90, 78 s left"
    assert len(lines) == 7


def test_short_work_prints_no_line(clock: Clock) -> None:
    pipe = io.StringIO()
    with progress("samples graded", 3, console=Console(file=pipe)) as update:
        for done in range(1, 4):
            clock.now += 1.0
            update(done)
    assert pipe.getvalue() == ""


def test_steps_that_were_done_earlier_do_not_count_for_the_time_left(clock: Clock) -> None:
    pipe = io.StringIO()
    with progress("r1", 1000, done=900, unit="step", console=Console(file=pipe)) as update:
        clock.now += 10.0
        update(901)
    assert pipe.getvalue() == "r1: step 901/1000, 16 min left\n"


def test_a_terminal_has_a_bar_with_a_heading() -> None:
    terminal = io.StringIO()
    with progress("my [run]", 4, unit="step", console=Console(file=terminal, force_terminal=True, width=90)) as update:
        update(4, "loss 1.5")
    assert "my [run]" in terminal.getvalue()
    assert "step 4/4, loss 1.5" in terminal.getvalue()
