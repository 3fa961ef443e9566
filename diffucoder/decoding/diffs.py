"""Unified diffs, in time that grows with the length of the texts."""

import difflib
import io
import re
from itertools import takewhile
from operator import eq

_CONTEXT = 3  # lines around a change
_MOST_COMPARED = 10**6  # lines times lines; in longer texts everything from the first to the last change is replaced
_OTHER = "\udfff"  # makes a line unlike all others: comparing takes the square or the cube of their number


def unified_diff(before: str, after: str) -> str:
    """What changes `before` into `after`, as `git apply` and `patch` read it: only a newline ends a line."""
    old = list(io.StringIO(before, newline="\n"))
    new = list(io.StringIO(after, newline="\n"))
    start = _common(old, new)
    end = _common(old[start:][::-1], new[start:][::-1])
    if (len(old) - start - end) * (len(new) - start - end) > _MOST_COMPARED:
        new[start : len(new) - end] = [line + _OTHER for line in new[start : len(new) - end]]
    first = max(0, start - _CONTEXT)  # of the lines that are shown
    last = max(0, end - _CONTEXT)  # from the end
    diff = ""
    for line in difflib.unified_diff(old[first : len(old) - last], new[first : len(new) - last], "before", "after"):
        line = line.replace(_OTHER, "")
        if line.startswith("@@"):
            line = re.sub(r"(?<=[-+])\d+", lambda number: str(int(number[0]) + first), line)
        diff += line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"
    return diff


def _common(old: list[str], new: list[str]) -> int:
    """How many lines two texts begin with alike."""
    return sum(takewhile(bool, map(eq, old, new)))
