"""Calling the command line, in this process or as one of its own, and what a refusal looks like."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


def process(*arguments: object, stdin: str = "") -> Outcome:
    """Call the command line as a process of its own."""
    command = [sys.executable, "-m", "diffucoder.cli", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment)
    return Outcome(ended.returncode, ended.stdout, ended.stderr)


def assert_refused(outcome: Outcome, *parts: str) -> None:
    """One line on standard error that says all of `parts`, exit code 2, nothing on standard output."""
    assert (outcome.code, outcome.out) == (2, ""), outcome
    assert outcome.err.startswith("error: "), outcome.err
    assert outcome.err.count("\n") == 1, outcome.err
    assert all(part in outcome.err for part in parts), outcome.err
