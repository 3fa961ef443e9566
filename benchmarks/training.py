"""How fast a training step is, what share of this machine's matmul that is, and how much memory it takes.

    python benchmarks/training.py    # under five minutes on two cores

Each row is a process of its own, in which the project's Trainer takes real steps of the masked objective on random
tokens. The work is counted as 6 N operations a token, where N is the parameters that multiply (all but the input
embedding). The ceiling is a matmul of 2048 cubed of the same dtype. The last rows, a layer under a vocabulary of
152,064, show what keeping logits in chunks saves. The table goes to benchmarks/results/training.md.
"""

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from common import RESULTS, write_page

from diffucoder.bench import matmul_rate
from diffucoder.diffusion import keyed_generator
from diffucoder.models.denoiser import CHUNK_ELEMENTS
from diffucoder.training.masked import MaskedStage, Objective, Row
from diffucoder.training.pretrain import fresh_model
from diffucoder.training.settings import PretrainSettings
from diffucoder.training.trainer import Batch, Trainer

HEAD = ("model", "dtype", "parameters", "step", "tokens/s", "6·N·tokens", "share", "ceiling", "peak memory")
WARM_UP = 2  # steps before the timed ones
TINY = {"vocabulary": 1536, "hidden": 256, "layers": 5, "intermediate": 640, "batch": 16, "context": 256}
LARGER = {"vocabulary": 8192, "hidden": 512, "layers": 8, "intermediate": 1280, "batch": 16, "context": 256}
WIDE = {"vocabulary": 152_064, "hidden": 64, "layers": 1, "intermediate": 64, "batch": 8, "context": 512}
JOBS = (  # name, sizes, dtype, logits of a chunk
    ("tiny", TINY, "float32", CHUNK_ELEMENTS),
    ("tiny", TINY, "bfloat16", CHUNK_ELEMENTS),
    ("30 M", LARGER, "float32", CHUNK_ELEMENTS),
    ("30 M", LARGER, "bfloat16", CHUNK_ELEMENTS),
    ("logits in chunks", WIDE, "float32", CHUNK_ELEMENTS),
    ("logits whole", WIDE, "float32", 2**62),
)


def main(
    steps: Annotated[int, typer.Option(help=f"timed steps, after {WARM_UP} to warm up", min=1)] = 5,
) -> None:
    """Measure, and write the table."""
    rows = []
    for name, sizes, dtype, chunk in JOBS:
        print(f"{name}, {dtype} ...", file=sys.stderr)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:  # its own memory peak
            rows.append([name, dtype, *pool.submit(measure, sizes, dtype, chunk, steps).result()])
    write_page(RESULTS / "training.md", "make bench-training", (f"median of {steps} steps",), HEAD, rows)


class RandomRows:
    """Rows of random tokens, all of which may be hidden. The last id is the mask."""

    def __init__(self, context: int, mask_id: int) -> None:
        self.context = context
        self.mask_id = mask_id

    def width(self, step: int) -> int:
        return self.context

    def row(self, step: int, index: int) -> Row:
        tokens = torch.randint(self.mask_id, (self.context,), generator=keyed_generator(step, index))
        return Row(tokens, torch.ones(self.context, dtype=torch.bool))


class TimedStage(MaskedStage):
    """The masked objective; notes the time and the peak of memory whenever a step begins."""

    begun: list[float]
    peak = 0

    def batches(self, step: int, shares: Sequence[range]) -> Iterator[Batch]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.begun.append(time.perf_counter())
        self.peak = peak_memory()
        yield from super().batches(step, shares)


def measure(sizes: Mapping[str, Any], dtype: str, chunk: int, steps: int) -> list[str]:
    """Train, time, then find the ceiling; return the cells of a job."""
    vocabulary = sizes["vocabulary"]
    tokenizer = SimpleNamespace(vocab_size=vocabulary, mask_id=vocabulary - 1, pad_id=0, eos_id=0)
    total = WARM_UP + steps + 1  # the begin of the last one is the end of the last that is timed
    with tempfile.TemporaryDirectory() as folder:
        fixed = {"run": Path(folder) / "run", "tokenizer": folder, "data": folder, "lr": 1e-4, "steps": total}
        shape = {name: size for name, size in sizes.items() if name != "vocabulary"}
        settings = PretrainSettings(**fixed, **shape, bf16=dtype == "bfloat16")
        model = fresh_model(settings, tokenizer)
        model.chunk_elements = chunk
        objective = Objective(model.mask_id, pad_id=0, seed=0, batch=settings.batch, normaliser="masked")
        stage = TimedStage(objective, RandomRows(settings.context, model.mask_id), None, 0)
        stage.begun = []
        Trainer(model, stage, settings).train()
    parameters = sum([parameter.numel() for parameter in model.parameters()])
    multiplying = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed_tokens" not in name:
            multiplying += parameter.numel()
    seconds = median([end - begin for begin, end in pairwise(stage.begun[WARM_UP:])])
    ceiling = matmul_rate(getattr(torch, dtype), model.device, 2048)
    tokens = settings.batch * settings.context
    rate = 6.0 * multiplying * tokens / seconds
    return [
        f"{parameters / 1e6:.1f} M",
        f"{1e3 * seconds:.0f} ms",
        f"{tokens / seconds:,.0f}",
        f"{rate / 1e9:,.0f} GFLOP/s",
        f"**{rate / ceiling:.0%}**",
        f"{ceiling / 1e9:,.0f} GFLOP/s",
        f"{stage.peak / 2**30:.1f} GiB",
    ]


def peak_memory() -> int:
    """Bytes: of the device if there is one, else of the process, with everything that it has loaded."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    typer.run(main)
