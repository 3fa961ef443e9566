"""Projections for decoding on CPUs, from copies of the weights: in eight-bit integers, or laid out for bfloat16.

Eight bits have about twice the arithmetic a second of bfloat16 (VNNI). Weights are rounded once, by a scale for each
output; what comes in is rounded as it comes, by a scale for each row. So nothing is calibrated, the sums are exact in
32 bits, and a row's result depends on neither batch nor width.

Packed weights have the numbers of bfloat16 and the order that oneDNN's products read, so that a narrow pass, where
there are few rows to spread that work over, does not arrange them again in each call.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

Project = Callable[[Tensor], Tensor]  # (..., in) -> (..., out)

_LARGEST = 127  # -128 is left out: the steps are the same on either side of zero
_SMALLEST = 1e-12  # of a scale: a row of zeros stays one
_MOST_PACKED = 2**29  # bytes
_PACKED_FOR = 64  # rows of a product, about: it is right for any number
_NARROW = 64  # products of so many rows have a multiple of 8, wider ones of 32


@torch.no_grad()
def int8_projection(weight: Tensor, bias: Tensor | None) -> Project:
    """`weight` (out, in) and `bias` (out,) of any float dtype as a projection that gives what it is given's dtype."""
    scale = weight.float().abs().amax(1).clamp(min=_SMALLEST) / _LARGEST  # (out,)
    whole = (weight.float() / scale[:, None]).round().to(torch.int8).t()  # (in, out)

    def project(hidden: Tensor) -> Tensor:
        rows, count = _even(hidden)
        step = rows.abs().amax(-1, keepdim=True).float().clamp(min=_SMALLEST) / _LARGEST  # (M, 1)
        sums = torch._int_mm((rows / step).round_().to(torch.int8), whole)  # (M, out) int32
        out = (sums * step).mul_(scale)
        out = (out if bias is None else out.add_(bias)).to(hidden.dtype)
        return out[:count].view(*hidden.shape[:-1], len(scale))

    return project


def packable(model: nn.Module) -> bool:
    """Whether packed copies are possible and cheap: bfloat16 on a CPU that multiplies it, at most half a gigabyte."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    fitting = all(weight.device.type == "cpu" and weight.dtype == torch.bfloat16 for weight in weights)
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    return fitting and size <= _MOST_PACKED and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@torch.no_grad()
def packed_projection(weight: Tensor, bias: Tensor | None) -> Project:
    """`weight` (out, in) and `bias` (out,), bfloat16 on a CPU, as a projection by oneDNN's own layout."""
    packed, product = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR), _product()

    def project(hidden: Tensor) -> Tensor:
        if hidden.ndim == 2 and len(hidden) and len(hidden) == round_rows(len(hidden)):  # as passes come
            return product(hidden, packed, bias, "none", [], "")
        if not hidden.numel():
            return hidden.new_empty(*hidden.shape[:-1], len(weight))
        rows, count = _even(hidden)
        return product(rows, packed, bias, "none", [], "")[:count].view(*hidden.shape[:-1], len(weight))

    return project


def _product() -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
    return found


def round_rows(count: int) -> int:
    """Up from `count` rows of a product to one of few numbers.

    oneDNN writes a program for each size of a product that it meets: a millisecond, and half a megabyte that it keeps.
    """
    step = 8 if count <= _NARROW else 32
    return -(-count // step) * step


def _even(hidden: Tensor) -> tuple[Tensor, int]:
    """`hidden` (..., in) as rows (M, in) and a few of zeros, so that there are few sizes; and how many are its own."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    count = len(rows)
    more = round_rows(count) - count
    return (pad(rows, (0, 0, 0, more)) if more else rows), count
