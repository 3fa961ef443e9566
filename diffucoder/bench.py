"""How fast a model decodes on this machine, and how much of the machine that is.

Counts first: a forward pass over T positions costs about 2 · parameters · T operations, plus attention; what a matmul
of the same dtype reaches in the same run is the ceiling beside it. Timed in repeats, of which the median is reported.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from diffucoder.decoding.canvas import Canvas
from diffucoder.decoding.denoise import denoise
from diffucoder.decoding.params import DecodingParams
from diffucoder.errors import ConfigError
from diffucoder.models.denoiser import Denoiser


@dataclass(frozen=True)
class BenchResult:
    """Figures of one model, canvas and machine; every time is a median."""

    parameters: int
    dtype: str
    device: str
    threads: int
    batch: int
    positions: int  # of a row: prompt and canvas
    forward_ms: float  # scoring every masked position once
    forward_flops: float  # operations in one such pass
    flops_per_second: float  # achieved by the pass
    matmul_flops_per_second: float  # of a square matmul in the same dtype, in the same run
    tokens_per_second: float  # of the whole batch, one token a step, sampler included
    tokens_per_forward: float

    @property
    def share(self) -> float:
        """Achieved share of the matmul's rate."""
        return self.flops_per_second / self.matmul_flops_per_second


@torch.no_grad()
def bench(
    model: Denoiser, *, prompt_tokens: int = 32, new_tokens: int = 64, batch: int = 1, repeats: int = 10
) -> BenchResult:
    """Measure `model` on `batch` rows of random prompts. Raises ConfigError for sizes that make no canvas."""
    sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch": batch, "repeats": repeats}
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{name}={value} leaves nothing to measure; give at least 1")
    if prompt_tokens + new_tokens > model.max_length:
        raise ConfigError(f"{prompt_tokens + new_tokens} positions exceed the model's context of {model.max_length}")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocab_size, (batch, prompt_tokens), generator=generator)
    ids = torch.where(ids == model.mask_id, (model.mask_id + 1) % model.vocab_size, ids).to(model.device)
    canvas = Canvas.from_prompts(ids, new_tokens=new_tokens, mask_id=model.mask_id)
    rows = canvas.masked.nonzero()

    def forward() -> None:
        model(canvas.tokens, rows=rows, reduce=lambda logits, _: logits.argmax(-1))

    seconds = median_seconds(forward, model.device, repeats)
    began = time.perf_counter()
    passes = sum(1 for _ in denoise(model, canvas, DecodingParams()))
    decoding = time.perf_counter() - began
    spent = operations(model, canvas.tokens, rows)
    return BenchResult(
        parameters=sum(p.numel() for p in model.parameters()),
        dtype=str(model.compute_dtype).removeprefix("torch."),
        device=str(model.device),
        threads=torch.get_num_threads(),
        batch=batch,
        positions=prompt_tokens + new_tokens,
        forward_ms=1e3 * seconds,
        forward_flops=spent,
        flops_per_second=spent / seconds,
        matmul_flops_per_second=matmul_rate(model.compute_dtype, model.device),
        tokens_per_second=batch * new_tokens / decoding,
        tokens_per_forward=new_tokens / passes,
    )


def operations(model: Denoiser, tokens: Tensor, rows: Tensor) -> float:
    """Multiply-adds of one pass, counted twice: body matrices at all positions, head at wanted rows, attention."""
    body = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in n)
    head = model.model.get_output_embeddings().weight.numel()
    config = model.config
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    attention = 4.0 * config.num_hidden_layers * width * tokens.shape[1] * tokens.numel()
    tied = bool(config.tie_word_embeddings)
    return float(2.0 * (body - (0 if tied else head)) * tokens.numel() + 2.0 * head * len(rows) + attention)


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int = 1024) -> float:
    """Operations a second of a square matmul: the ceiling of everything else."""
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    multiply = torch._int_mm if dtype == torch.int8 else torch.mm
    return 2.0 * size**3 / median_seconds(lambda: multiply(left, right), device, 10)


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median of `repeats` timings, after two to warm up."""
    seconds = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return median(seconds[2:])
