"""What the tests of this folder look at on a machine that others use, too: processes, and how slow it is now."""

import os
import time
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path

from diffucoder.grading.sandbox import Limits, run

QUIET = 0.1  # seconds that a sandbox with a trivial program takes at most, from cold, on a quiet machine


def living(marker: str) -> dict[int, str]:
    """Living processes of the machine that hold the marker in their command line: number → line."""
    lines = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if marker in line:
            lines[int(path.parent.name)] = line
    return lines


def own(marker: str) -> set[int]:
    """Those of them that this process started, or one of its descendants."""
    return {process for process in living(marker) if os.getpid() in ancestors(process)}


def ancestors(process: int) -> set[int]:
    """The parent of a process, its parent and so on."""
    numbers: set[int] = set()
    while process > 1:
        try:
            stat = Path(f"/proc/{process}/stat").read_text()
        except OSError:  # it has ended meanwhile
            break
        process = int(stat.rpartition(")")[2].split()[1])
        numbers.add(process)
    return numbers


def gone(marker: str, seconds: float = 30.0) -> bool:
    """Whether all processes with the marker end in time: what the tests leave behind would live for a minute."""
    end = time.monotonic() + seconds
    while living(marker):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def none_left(marker: str, others: Set[int], seconds: float = 30.0) -> bool:
    """Whether the processes with the marker that this process started end in time, except for `others`."""
    end = time.monotonic() + seconds
    while own(marker) - others:
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def wait_for(marker: str, seconds: float = 30.0) -> dict[int, str]:
    """The living processes with the marker, as soon as there are any."""
    end = time.monotonic() + seconds
    while not (processes := living(marker)) and time.monotonic() < end:
        time.sleep(0.01)
    return processes


def slowness() -> float:
    """How many times longer a trivial program takes now than on a quiet machine; at least 1."""
    begin = time.monotonic()
    assert run("pass", Limits(seconds=60)).status == "ok"
    return max(1.0, (time.monotonic() - begin) / QUIET)


@contextmanager
def in_time(seconds: float) -> Iterator[None]:
    """Assert that the block takes less than so many seconds, times the slowness of the machine around it."""
    before = slowness()
    begin = time.monotonic()
    yield
    elapsed = time.monotonic() - begin
    assert elapsed < seconds * max(before, slowness())
