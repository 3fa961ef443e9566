"""What benchmarks share: where results go, what they were measured on, verdicts and intervals.

Every benchmark is a script: `python benchmarks/NAME.py`. It measures the package that PYTHONPATH finds first, so one
script can compare two versions: import little of the package here.
"""

import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from diffucoder.grading.extract import program_from
from diffucoder.grading.grade import grade_many
from diffucoder.models.hub import SHIPPED

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.append(str(ROOT))  # last: only `recipes` is looked for there

from recipes.tiny.problems import Problem


def key_of(model: str | None) -> str:
    """A name that changes with the weights, so that answers of another model are never taken for this one's."""
    folder = Path(model) if model else SHIPPED
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:10]


def commit() -> str:
    """The commit of the benchmark, marked if files have changed since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return f"commit {ended.stdout.strip() or 'unknown'}"


def machine() -> str:
    """What torch computes on."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    kind = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} CPUs with {kind}, {torch.get_num_threads()} threads"


def run_peer(python: Path, program: str, *arguments: str, fed: str = "") -> str:
    """Run a program in the environment of llama.cpp: what it prints. Raises SystemExit with its errors."""
    ended = subprocess.run([python, "-c", program, *arguments], input=fed, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{python} ended with {ended.returncode}:\n{ended.stderr[-2000:]}")
    return ended.stdout


def synchronize() -> None:
    """Wait until the device has nothing left to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def solved(texts: Sequence[str], problems: Sequence[Problem]) -> list[bool]:
    """Whether each answer passes the tests of its problem, run in the sandbox."""
    pairs = [(program_from(text), problem.tests) for text, problem in zip(texts, problems, strict=True)]
    return [verdict.passed for verdict in grade_many(pairs)]


def paired_gain(before: Sequence[bool], after: Sequence[bool]) -> str:
    """By how much the share solved has changed on the same problems, with a 95 % interval."""
    gains = np.array(after, dtype=float) - np.array(before, dtype=float)
    half = 1.96 * gains.std(ddof=1) / math.sqrt(len(gains))
    return f"{gains.mean():+.1%} ± {half:.1%}"
