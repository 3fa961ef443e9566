"""What benchmarks share: the page of results, decoding and grading, intervals.

A benchmark measures the package that PYTHONPATH finds first, also an older one: import little of the package here.
"""

import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from diffucoder import DecodingParams, DiffuCoder, Generation
from diffucoder.grading.extract import program_from
from diffucoder.grading.grade import grade_many
from diffucoder.models.hub import SHIPPED

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.append(str(ROOT))  # last: only `recipes` is looked for there

from recipes.report import provenance, table, update_page
from recipes.tiny.problems import Problem

BATCH = 32  # requests decoded together


def write_page(path: Path, command: str, details: Sequence[str], head: Sequence[str], rows: Sequence[Sequence]) -> None:
    """Write a table, with the commit and the machine it was measured on."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    commit = subprocess.run(describe, capture_output=True, text=True, cwd=ROOT).stdout.strip() or "unknown"
    run = provenance(command, f"commit {commit}", machine(), *details)
    update_page(path, {"run": run, "table": table(head, rows)})


def machine() -> str:
    """What torch computes on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    kind = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} CPUs with {kind}, {torch.get_num_threads()} threads"


def model_id(model: str | None) -> str:
    """The start of the SHA-256 of the weights, which names a model in reports."""
    folder = Path(model) if model else SHIPPED
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:10]


def decode(
    coder: DiffuCoder, prompts: Sequence[str], params: DecodingParams, *, chat: bool = True
) -> Iterator[Generation]:
    """Yield the answer to each prompt, decoded in batches."""
    for start in track(range(0, len(prompts), BATCH), description="decoding"):
        yield from coder.generate_batch(prompts[start : start + BATCH], params, chat=chat)


def solved(texts: Sequence[str], problems: Sequence[Problem]) -> list[bool]:
    """Whether each answer passes the tests of its problem, run in the sandbox."""
    pairs = [(program_from(text), problem.tests) for text, problem in zip(texts, problems, strict=True)]
    return [verdict.passed for verdict in grade_many(pairs)]


def paired_gain(before: Sequence[bool], after: Sequence[bool]) -> str:
    """By how much the share solved has changed on the same problems, with a 95 % interval."""
    gains = np.array(after, dtype=float) - np.array(before, dtype=float)
    half = 1.96 * gains.std(ddof=1) / math.sqrt(len(gains))
    return f"{gains.mean():+.1%} ± {half:.1%}"
