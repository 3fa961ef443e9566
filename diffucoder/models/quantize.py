"""Projections in eight-bit integers, for decoding on CPUs: about twice the arithmetic a second of bfloat16 (VNNI).

Weights are rounded once, by a scale for each output; what comes in is rounded as it comes, by a scale for each row. So
nothing is calibrated, the sums are exact in 32 bits, and a row's result depends on neither batch nor width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Project = Callable[[Tensor], Tensor]  # (..., in) -> (..., out)

_LARGEST = 127  # -128 is left out: the steps are the same on either side of zero
_SMALLEST = 1e-12  # of a scale: a row of zeros stays one


@torch.no_grad()
def int8_projection(weight: Tensor, bias: Tensor | None) -> Project:
    """`weight` (out, in) and `bias` (out,) of any float dtype as a projection that gives what it is given's dtype."""
    scale = weight.float().abs().amax(1).clamp(min=_SMALLEST) / _LARGEST  # (out,)
    whole = (weight.float() / scale[:, None]).round().to(torch.int8).t()  # (in, out)

    def project(hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])  # (M, in)
        step = rows.abs().amax(-1, keepdim=True).float().clamp(min=_SMALLEST) / _LARGEST  # (M, 1)
        sums = torch._int_mm((rows / step).round_().to(torch.int8), whole)  # (M, out) int32
        out = (sums * step).mul_(scale)
        out = (out if bias is None else out.add_(bias)).to(hidden.dtype)
        return out.view(*hidden.shape[:-1], len(scale))

    return project
