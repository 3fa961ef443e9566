"""Which attention kernel a training step runs on, as measured in benchmarks/results/training.md.

For: `trainer`, around forward and backward, which recomputes layers under gradient checkpointing. Not for: decoding,
where torch's own choice, flash attention, is the fastest everywhere.

On a CPU the flash kernel's backward multiplies bfloat16 slowly: up to 512 positions plain products take half its time.
torch widens those to float32 unless told not to, and then they are as slow; in bfloat16 they round the scores as
transformers' eager attention does. In float32 the flash kernel is the faster one at every length.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def training_kernels(device: torch.device, *, bf16: bool) -> Iterator[None]:
    """Attend by plain products of bfloat16 where that is fastest, and as torch chooses elsewhere."""
    if device.type != "cpu" or not bf16:
        yield
        return
    flags = torch.backends.cuda  # of every device, whatever its name
    before = flags.fp16_bf16_reduction_math_sdp_allowed()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    flags.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        flags.allow_fp16_bf16_reduction_math_sdp(before)
