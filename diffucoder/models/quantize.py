"""Weights in eight bits on the disk: a matrix as whole numbers and a scale for each of its outputs.

For: files small enough to be shipped, read back without a float32 copy. Not for: arithmetic in eight bits
(`projections`), files and configs (`checkpoint`).

A scale is a bfloat16, and what it multiplies has seven bits: so the product is exact in float32, and rounded once in
bfloat16. Vectors (norms, biases) stay bfloat16. A matrix may be cut into parts by its rows, so that no file is large.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

SHARD = 15 * 2**20  # bytes of a file, which is to stay under 16 MiB with its header
_LARGEST = 127  # -128 is left out: the steps are the same on either side of zero
_SMALLEST = 1e-12  # of a scale: a row of zeros stays one


@torch.no_grad()
def packed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` as it is stored: int8 parts `NAME.0`, `NAME.1`, ... and `NAME.scale` (out,) for a matrix (out, in)."""
    stored = {}
    for name, tensor in state.items():
        if tensor.ndim != 2:
            stored[name] = tensor.to(torch.bfloat16)
            continue
        largest = torch.cat([rows.float().abs().amax(1) for rows in _parts(tensor)])  # (out,)
        scale = (largest / _LARGEST).clamp(min=_SMALLEST).to(torch.bfloat16)
        stored[f"{name}.scale"] = scale
        for at, rows in enumerate(_parts(tensor)):
            scales = scale[at * _rows(tensor) :][: len(rows), None].float()
            # a scale that was rounded down would ask for 128
            stored[f"{name}.{at}"] = (rows.float() / scales).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
    return stored


@torch.no_grad()
def unpacked(
    shapes: Mapping[str, torch.Size], stored: Callable[[str], Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The weights of these `shapes` in `dtype`, one after the other; `stored` reads what `packed` made by its name."""
    for name, shape in shapes.items():
        if len(shape) != 2:
            yield name, stored(name).to(dtype)
            continue
        weight = torch.empty(shape, dtype=dtype)
        scale, step = stored(f"{name}.scale").to(dtype), _rows(weight)
        for at, rows in enumerate(_parts(weight)):
            torch.mul(stored(f"{name}.{at}").to(dtype), scale[at * step :][: len(rows), None], out=rows)
        yield name, weight


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tensor, _rows(tensor))


def _rows(tensor: Tensor) -> int:
    """Rows of a part: a third of a file at most, so that files fill up."""
    return max(1, SHARD // 3 // max(1, tensor.shape[1]))
