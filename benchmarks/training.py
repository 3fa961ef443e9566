"""How fast a training step is, what share of this machine's matmul that is, and how much memory it takes.

    python benchmarks/training.py                        # the whole table, under five minutes on two cores
    python benchmarks/training.py --threads 1 --steps 3  # one thread, fewer steps to take the median of

Each row is a process of its own, in which the project's Trainer takes real steps of the masked objective on random
tokens; timed is all of a step: noise, forward, backward, clipping, AdamW. The ceiling beside it is the best matmul of
the same dtype in the same process: 2048 cubed, or one of the model's own products.

Two counts of work stand side by side. 6 N tokens is the usual one: N is the parameters that multiply, which leaves out
the input embedding. The other counts what is computed: the head at scored positions only, and attention; what gradient
checkpointing of the logits computes again counts in neither. The last rows show what keeping logits in chunks saves.
The table goes to benchmarks/results/training.md.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen2Config, Qwen2ForCausalLM

from diffucoder.diffusion import keyed_generator
from diffucoder.models.denoiser import CHUNK_ELEMENTS, Denoiser
from diffucoder.training.masked import MaskedMicro, MaskedStage, Objective, Row
from diffucoder.training.settings import TrainSettings
from diffucoder.training.trainer import Trainer, training_kernels

RESULTS = Path(__file__).parent / "results" / "training.md"
WARM_UP = 2  # steps before the timed ones
WHOLE = 2**62  # elements of a chunk that no logits fill
HEADS, HEAD_WIDTH, POSITIONS = 4, 64, 4096  # of the attention table: rows times their length is always as much


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
    bf16: bool
    threads: int
    steps: int
    chunk: int = CHUNK_ELEMENTS


@dataclass(frozen=True)
class Measured:
    """What it answers."""

    parameters: int
    multiplying: int  # N: without the input embedding
    seconds: float  # of a step, the median
    usual: float  # operations of a step: 6 N tokens
    counted: float  # the same, the head where it is applied, and with attention
    ceiling: float  # operations a second of the best matmul
    scored: float  # positions of a step that have logits
    before: int  # bytes, peak so far when the first step begins
    peak: int  # bytes, peak after the last step


def main(
    threads: Annotated[int, typer.Option(help="of torch; 0: as many as it takes by itself")] = 0,
    batch: Annotated[int, typer.Option(help="rows of a step", min=1)] = 16,
    context: Annotated[int, typer.Option(help="tokens of a row", min=8)] = 256,
    steps: Annotated[int, typer.Option(help=f"timed steps, after {WARM_UP} to warm up", min=1)] = 5,
    output: Annotated[Path, typer.Option(help="file of the table")] = RESULTS,
    one: Annotated[str, typer.Option(hidden=True, help="job of a process, in JSON")] = "",
) -> None:
    if one:
        torch.set_num_threads(json.loads(one)["threads"])
        print(json.dumps(asdict(measure(Job(**json.loads(one))))))
        return
    torch.set_num_threads(threads or torch.get_num_threads())
    sizes = {"batch": batch, "context": context, "threads": torch.get_num_threads(), "steps": steps}
    shapes = [("tiny", 1536, 256, 5, 640), ("30 M", 8192, 512, 8, 1280)]
    speed = [Job(*shape, **sizes, bf16=bf16) for shape in shapes for bf16 in (False, True)]
    wide = {**sizes, "batch": 8, "context": 512, "steps": min(steps, 2)}
    chunked = Job("in chunks", 152_064, 64, 1, 64, **wide, bf16=False)
    report = _report(
        [(job, _in_own_process(job)) for job in speed],
        [(job, _in_own_process(job)) for job in (chunked, replace(chunked, name="whole", chunk=WHOLE))],
        [_attention(*case) for case in product((torch.float32, torch.bfloat16), (128, 256, 512, 1024), (False, True))],
    )
    output.write_text(report, encoding="utf-8")
    print(f"{report}\nwritten to {output}")


def _in_own_process(job: Job) -> Measured:
    """A peak is a process's: one job each."""
    print(f"{job.name}, {'bfloat16' if job.bf16 else 'float32'} ...", file=sys.stderr)
    command = [sys.executable, __file__, "--one", json.dumps(asdict(job))]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{job} ended with {ended.returncode}:\n{ended.stderr[-2000:]}")
    return Measured(**json.loads(ended.stdout.splitlines()[-1]))


class EnoughError(Exception):
    """All steps are timed."""


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
    """The masked objective, which looks at the clock whenever a step begins."""

    def __init__(self, job: Job) -> None:
        mask_id = job.vocabulary - 1
        objective = Objective(mask_id=mask_id, pad_id=0, seed=0, batch=job.batch, normaliser="masked")
        super().__init__(objective, RandomRows(job), None, 0)
        self.last = WARM_UP + job.steps
        self.begun: list[float] = []
        self.peaks: list[int] = []
        self.scored: list[int] = []

    def micro_batches(self, step: int, shares: Sequence[range]) -> list[MaskedMicro]:
        _synchronize()
        self.begun.append(time.perf_counter())
        self.peaks.append(_peak_memory())
        if step == self.last:
            raise EnoughError  # without the checkpoint of a finished run
        micros = super().micro_batches(step, shares)
        self.scored.append(sum(len(micro.targets) for micro in micros))
        return micros


def measure(job: Job) -> Measured:
    """Train, time, then find the ceiling."""
    model, stage = _model(job), TimedStage(job)
    named = dict(model.named_parameters())
    parameters = sum(p.numel() for p in named.values())
    multiplying = sum(p.numel() for name, p in named.items() if p.ndim == 2 and "embed_tokens" not in name)
    with tempfile.TemporaryDirectory() as folder, suppress(EnoughError):
        run = Path(folder) / "run"
        settings = TrainSettings(run=run, steps=stage.last + 1, batch=job.batch, lr=1e-4, bf16=job.bf16)
        Trainer(model, stage, settings).train()
    scored = sum(stage.scored[WARM_UP:]) / job.steps
    tokens, head = job.batch * job.context, job.vocabulary * job.hidden
    attention = 12.0 * job.layers * job.hidden * job.context * tokens  # two products forward, four backward
    return Measured(
        parameters=parameters,
        multiplying=multiplying,
        seconds=median(end - begin for begin, end in pairwise(stage.begun[WARM_UP:])),
        usual=6.0 * multiplying * tokens,
        counted=6.0 * ((multiplying - head) * tokens + head * scored) + attention,
        ceiling=_ceiling(job, model.device),
        scored=scored,
        before=stage.peaks[0],
        peak=stage.peaks[-1],
    )


def _model(job: Job) -> Denoiser:
    config = Qwen2Config(
        vocab_size=job.vocabulary,
        hidden_size=job.hidden,
        intermediate_size=job.intermediate,
        num_hidden_layers=job.layers,
        num_attention_heads=job.hidden // 64,
        num_key_value_heads=max(1, job.hidden // 128),
        max_position_embeddings=job.context,
        tie_word_embeddings=False,
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
    )
    torch.manual_seed(0)  # of the weights
    denoiser = Denoiser.from_causal_lm(Qwen2ForCausalLM(config), mask_id=job.vocabulary - 1)
    denoiser.chunk_elements = job.chunk
    return denoiser


def _ceiling(job: Job, device: torch.device) -> float:
    """Operations a second of the best product: a cube, or a layer's or the head's, as the model has them."""
    tokens, dtype = job.batch * job.context, torch.bfloat16 if job.bf16 else torch.float32
    head = (min(tokens // 2, CHUNK_ELEMENTS // job.vocabulary), job.hidden, job.vocabulary)
    feed_forward = [(tokens, job.hidden, job.intermediate), (tokens, job.intermediate, job.hidden)]
    rates = []
    for rows, inner, columns in [(2048, 2048, 2048), *feed_forward, (tokens, job.hidden, job.hidden), head]:
        left = torch.randn(rows, inner, device=device).to(dtype)
        right = torch.randn(columns, inner, device=device).to(dtype).T  # as linear layers keep their weights
        seconds = _timings(lambda left=left, right=right: left @ right, 5)  # type: ignore[misc]  # bound, not called
        rates.append(2.0 * rows * inner * columns / min(seconds))
    return max(rates)


def _attention(dtype: torch.dtype, length: int, masked: bool) -> tuple[torch.dtype, int, bool, list[float]]:
    """Milliseconds forward and backward on the CPU: flash, plain products, and what training takes."""
    draws = torch.randn(4, POSITIONS // length, HEADS, length, HEAD_WIDTH).to(dtype)
    query, key, value = (draws[at].requires_grad_() for at in range(3))
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None] if masked else None

    def step() -> None:
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        torch.autograd.grad(out, (query, key, value), draws[3])

    kernels = (
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        sdpa_kernel(SDPBackend.MATH),
        training_kernels(torch.device("cpu"), bf16=dtype == torch.bfloat16),
    )
    milliseconds = []
    for kernel in kernels:
        with kernel:
            milliseconds.append(1e3 * median(_timings(step, 5)))
    return dtype, length, masked, milliseconds


def _timings(work: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, after two to warm up."""
    seconds = []
    for _ in range(repeats + 2):
        _synchronize()
        began = time.perf_counter()
        work()
        _synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds[2:]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_memory() -> int:
    """Bytes: of the device where there is one, else of the process, everything it has loaded included."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _report(
    speed: list[tuple[Job, Measured]],
    memory: list[tuple[Job, Measured]],
    attention: list[tuple[torch.dtype, int, bool, list[float]]],
) -> str:
    first, wide = speed[0][0], memory[0][0]
    logits = 4 * wide.batch * wide.context * wide.vocabulary
    return "\n".join(
        [
            "# Speed and memory of a training step",
            "",
            f"`make bench-training`, {time.strftime('%Y-%m-%d')}, commit {_commit()}; {_machine()}, {first.threads} "
            f"{'threads' if first.threads > 1 else 'thread'}.",
            "",
            f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, transformers "
            f"{version('transformers')}, accelerate {version('accelerate')}.",
            "",
            f"Steps of the Trainer on {first.batch} rows of {first.context} random tokens, about half of them hidden: "
            f"noise, forward, backward, clipping, AdamW; median of {first.steps} after {WARM_UP}. bfloat16 is autocast "
            "over float32 weights. N is the parameters that multiply: without the input embedding. *Computed* takes "
            "the head at hidden positions only, and adds attention. The ceiling is the best of five matmuls of the "
            "same dtype in the same process. The peak is the process's, torch and all.",
            "",
            "| model | dtype | parameters | N | step | tokens/s | 6·N·tokens | share | computed | share | ceiling "
            "| peak memory |",
            "| --- | --- | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
            *(_speed_row(job, found) for job, found in speed),
            "",
            "## Logits never exist whole",
            "",
            f"One layer of width {wide.hidden} and {wide.vocabulary:,} tokens of vocabulary, {wide.batch} × "
            f"{wide.context} positions, float32: the logits of all positions would be {_size(logits)}. The default "
            f"chunk is {CHUNK_ELEMENTS:,} logits, {_size(4 * CHUNK_ELEMENTS)} in float32.",
            "",
            "| logits | of hidden positions, whole | peak memory | before the first step | step |",
            "| --- | --: | --: | --: | --: |",
            *(
                f"| {job.name} | {_size(4 * found.scored * job.vocabulary)} | **{_size(found.peak)}** | "
                f"{_size(found.before)} | {found.seconds:.1f} s |"
                for job, found in memory
            ),
            "",
            "## Attention kernels on the CPU",
            "",
            f"Forward and backward of {POSITIONS} positions in rows of T, {HEADS} heads of {HEAD_WIDTH}, in "
            "milliseconds, median of 5: why `trainer.training_kernels` takes plain products of bfloat16, and leaves "
            "float32 to the flash kernel.",
            "",
            "| dtype | T | mask | flash | plain, as torch has it | what training takes |",
            "| --- | --: | --- | --: | --: | --: |",
            *(
                f"| {_name(dtype)} | {length} | {'yes' if masked else 'no'} | "
                f"{' | '.join(f'{value:.0f}' for value in milliseconds)} |"
                for dtype, length, masked, milliseconds in attention
            ),
            "",
        ]
    )


def _speed_row(job: Job, found: Measured) -> str:
    tokens = job.batch * job.context / found.seconds
    usual, counted, ceiling = found.usual / found.seconds, found.counted / found.seconds, found.ceiling
    return (
        f"| {job.name} | {'bfloat16' if job.bf16 else 'float32'} | {found.parameters / 1e6:.1f} M | "
        f"{found.multiplying / 1e6:.1f} M | {1e3 * found.seconds:.0f} ms | {tokens:,.0f} | "
        f"{usual / 1e9:,.0f} GFLOP/s | **{usual / ceiling:.0%}** | "
        f"{counted / 1e9:,.0f} GFLOP/s | {counted / ceiling:.0%} | "
        f"{ceiling / 1e9:,.0f} GFLOP/s | {_size(found.peak)} |"
    )


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} CPUs {models[0] if models else ''} with {torch.backends.cpu.get_cpu_capability()}"


def _commit() -> str:
    asked = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return asked.stdout.strip() or "unknown"


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(help=__doc__.replace("\n\n    ", "\n\n\b\n    "))(main)  # \b: these lines stay as they are
    app()
