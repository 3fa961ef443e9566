"""How fast a training step is, what share of this machine's matmul that is, and how much memory it takes.

    python benchmarks/training.py                        # under five minutes on two cores
    python benchmarks/training.py --threads 1 --steps 3  # one thread, fewer steps to take the median of

Each row is a process of its own, in which the project's Trainer takes real steps of the masked objective on random
tokens. The time covers a whole step: noise, forward, backward, clipping, AdamW. The work is counted as 6 N operations a
token, where N is the parameters that multiply (all but the input embedding). The ceiling beside it is a matmul of 2048
cubed of the same dtype in the same process. The last rows, a layer under a vocabulary of 152,064, show what keeping
logits in chunks saves. The table goes to benchmarks/results/training.md.
"""

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from common import RESULTS, commit, machine, synchronize
from transformers import Qwen2Config, Qwen2ForCausalLM

from diffucoder.bench import matmul_rate
from diffucoder.diffusion import keyed_generator
from diffucoder.models.denoiser import CHUNK_ELEMENTS, Denoiser
from diffucoder.training.masked import MaskedStage, Objective, Row
from diffucoder.training.settings import TrainSettings
from diffucoder.training.trainer import Batch, Trainer
from recipes.report import provenance, table, update_page

WARM_UP = 2  # steps before the timed ones
WHOLE = 2**62  # elements of a chunk that no logits fill


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    name: str
    vocabulary: int
    hidden: int
    layers: int
    intermediate: int
    batch: int
    context: int
    threads: int
    steps: int
    bf16: bool = False
    chunk: int = CHUNK_ELEMENTS


@dataclass(frozen=True)
class Measured:
    """What it returns."""

    parameters: int
    multiplying: int  # N: without the input embedding
    seconds: float  # of a step, the median
    ceiling: float  # operations a second of a matmul
    peak: int  # bytes, peak after the last step


def main(
    threads: Annotated[int, typer.Option(help="threads of torch; 0: torch's own choice")] = 0,
    steps: Annotated[int, typer.Option(help=f"timed steps, after {WARM_UP} to warm up", min=1)] = 5,
    output: Annotated[Path, typer.Option(help="file of the table")] = RESULTS / "training.md",
) -> None:
    """Measure, and write the table."""
    torch.set_num_threads(threads or torch.get_num_threads())
    threads = torch.get_num_threads()
    tiny = Job("tiny", 1536, 256, 5, 640, 16, 256, threads, steps)
    larger = Job("30 M", 8192, 512, 8, 1280, 16, 256, threads, steps)
    chunked = Job("logits in chunks", 152_064, 64, 1, 64, 8, 512, threads, min(steps, 2))
    whole = replace(chunked, name="logits whole", chunk=WHOLE)
    rows = []
    for job in (tiny, replace(tiny, bf16=True), larger, replace(larger, bf16=True), chunked, whole):
        rows.append(row_of(job, measure_in_own_process(job)))
    head = ["model", "dtype", "parameters", "N", "step", "tokens/s", "6·N·tokens", "share", "ceiling", "peak memory"]
    run = provenance("make bench-training", commit(), machine(), f"median of {steps} steps")
    update_page(output, {"run": run, "table": table(head, rows)})


def measure_in_own_process(job: Job) -> Measured:
    """A memory peak belongs to a process, so each job gets its own."""
    print(f"{job.name}, {dtype_of(job)} ...", file=sys.stderr)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, job).result()


class RandomRows:
    """Rows of random tokens, all of which may be hidden. The last id is the mask."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def width(self, step: int) -> int:
        return self.job.context

    def row(self, step: int, index: int) -> Row:
        tokens = torch.randint(self.job.vocabulary - 1, (self.job.context,), generator=keyed_generator(step, index))
        return Row(tokens, torch.ones(self.job.context, dtype=torch.bool))


class TimedStage(MaskedStage):
    """The masked objective; notes the time and the peak of memory whenever a step begins."""

    def __init__(self, job: Job) -> None:
        objective = Objective(mask_id=job.vocabulary - 1, pad_id=0, seed=0, batch=job.batch, normaliser="masked")
        super().__init__(objective, RandomRows(job), None, 0)
        self.begun: list[float] = []
        self.peak = 0

    def batches(self, step: int, shares: Sequence[range]) -> Iterator[Batch]:
        synchronize()
        self.begun.append(time.perf_counter())
        self.peak = peak_memory()
        yield from super().batches(step, shares)


def measure(job: Job) -> Measured:
    """Train, time, then find the ceiling."""
    torch.set_num_threads(job.threads)
    model = build(job)
    stage = TimedStage(job)
    parameters = 0
    multiplying = 0
    for name, parameter in model.named_parameters():
        parameters += parameter.numel()
        if parameter.ndim == 2 and "embed_tokens" not in name:
            multiplying += parameter.numel()
    steps = WARM_UP + job.steps + 1  # the begin of the last one is the end of the last that is timed
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        Trainer(model, stage, TrainSettings(run=run, steps=steps, batch=job.batch, lr=1e-4, bf16=job.bf16)).train()
    return Measured(
        parameters=parameters,
        multiplying=multiplying,
        seconds=median([end - begin for begin, end in pairwise(stage.begun[WARM_UP:])]),
        ceiling=matmul_rate(getattr(torch, dtype_of(job)), model.device, 2048),
        peak=stage.peak,
    )


def build(job: Job) -> Denoiser:
    config = Qwen2Config(
        vocab_size=job.vocabulary,
        hidden_size=job.hidden,
        intermediate_size=job.intermediate,
        num_hidden_layers=job.layers,
        num_attention_heads=job.hidden // 64,
        num_key_value_heads=max(1, job.hidden // 128),
        max_position_embeddings=job.context,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)  # of the weights
    denoiser = Denoiser.from_causal_lm(Qwen2ForCausalLM(config), mask_id=job.vocabulary - 1)
    denoiser.chunk_elements = job.chunk
    return denoiser


def peak_memory() -> int:
    """Bytes: of the device if there is one, else of the process, with everything that it has loaded."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def dtype_of(job: Job) -> str:
    return "bfloat16" if job.bf16 else "float32"


def row_of(job: Job, result: Measured) -> list[str]:
    tokens = job.batch * job.context
    rate = 6.0 * result.multiplying * tokens / result.seconds
    return [
        job.name,
        dtype_of(job),
        f"{result.parameters / 1e6:.1f} M",
        f"{result.multiplying / 1e6:.1f} M",
        f"{1e3 * result.seconds:.0f} ms",
        f"{tokens / result.seconds:,.0f}",
        f"{rate / 1e9:,.0f} GFLOP/s",
        f"**{rate / result.ceiling:.0%}**",
        f"{result.ceiling / 1e9:,.0f} GFLOP/s",
        f"{result.peak / 2**30:.1f} GiB",
    ]


if __name__ == "__main__":
    typer.run(main)
