"""The speed of a model on this machine, and the share of the machine that it uses. All times are medians of repeats."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffucoder.decoding.canvas import Canvas
from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.step import denoise
from diffucoder.errors import ConfigError
from diffucoder.models.denoiser import Denoiser


@dataclass(frozen=True)
class BenchResult:
    """Figures of one model, canvas and machine."""

    parameters: int
    dtype: str
    device: str
    threads: int
    batch: int
    positions: int  # of a row: prompt and canvas
    forward_ms: float  # to score every masked position once
    forward_flops: float  # operations in one such pass, two for a multiply-add
    flops_per_second: float  # reached by the pass
    matmul_flops_per_second: float  # reached by a square matmul of the same dtype, in the same run
    tokens_per_second: float  # of the whole batch, one token a step, sampler included
    tokens_per_forward: float
    share: float  # of the rate of the matmul


@torch.no_grad()
def bench(
    model: Denoiser, *, prompt_tokens: int = 32, new_tokens: int = 64, batch: int = 1, repeats: int = 10
) -> BenchResult:
    """Measure `model` on `batch` rows of random prompts. Raises ConfigError for sizes that make no canvas."""
    sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch": batch, "repeats": repeats}
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{name}={value} leaves nothing to measure; give at least 1")
    positions = prompt_tokens + new_tokens
    if positions > model.max_length:
        raise ConfigError(f"{positions} positions exceed the model's context of {model.max_length}; give fewer")
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(model.vocab_size - 1, (batch, prompt_tokens), generator=generator)
    prompts += (prompts >= model.mask_id).long()  # any token except the mask
    canvas = Canvas.from_prompts(prompts.to(model.device), new_tokens=new_tokens, mask_id=model.mask_id)
    tokens = canvas.tokens.cpu()
    valid = torch.ones_like(tokens, dtype=torch.bool)
    wanted = canvas.masked.cpu().nonzero()  # (M, 2)

    def forward() -> None:
        model.score(tokens, valid=valid, feed=valid, wanted=wanted, reduce=lambda logits, _: logits.argmax(-1))

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it does not count fused attention
        forward()
    flops = float(counter.get_total_flops())
    forward_seconds = median_seconds(forward, model.device, repeats)
    start = time.perf_counter()
    passes = len(list(denoise(model, canvas, DecodingParams())))
    decoding_seconds = time.perf_counter() - start
    ceiling = matmul_rate(model.dtype, model.device)
    return BenchResult(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        threads=torch.get_num_threads(),
        batch=batch,
        positions=positions,
        forward_ms=1e3 * forward_seconds,
        forward_flops=flops,
        flops_per_second=flops / forward_seconds,
        matmul_flops_per_second=ceiling,
        tokens_per_second=batch * new_tokens / decoding_seconds,
        tokens_per_forward=new_tokens / passes,
        share=flops / forward_seconds / ceiling,
    )


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int = 1024) -> float:
    """Return the operations per second of a square matmul, the ceiling of all other figures."""
    left = torch.ones(size, size, dtype=dtype, device=device)
    right = torch.ones(size, size, dtype=dtype, device=device)
    return 2.0 * size**3 / median_seconds(lambda: torch.mm(left, right), device, 10)


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median of `repeats` timings, after two to warm up."""
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return median(seconds[2:])
