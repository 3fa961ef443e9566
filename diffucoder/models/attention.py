"""Attention patterns: which positions of a canvas a model was trained to see.

Most denoisers attend to every position. Block-causal ones cut a row into blocks of n positions: a position sees all of
its own block and of earlier blocks, so the keys of a finished block never change. The first block begins at position 0
(origin "start"; the block at the end of a prompt holds a part of the answer too), or at the end of the prompt
("prompt"), which sees all of itself.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Origin = Literal["start", "prompt"]


@dataclass(frozen=True)
class Attention:
    """What each position of a row sees: everything, or with `block` what block-causal attention allows."""

    block: int | None = None  # positions of a block; None: every position sees every other
    origin: Origin = "start"  # where the first block begins

    def origins(self, valid: Tensor, prompt_ends: Tensor | None = None) -> Tensor:
        """(R,) int64: the column where the first block of each row begins.

        `valid` (R, T) bool is False on padding; `prompt_ends` (R,) int64 is the column after each prompt.
        """
        if self.origin == "prompt" and prompt_ends is not None:
            return prompt_ends
        return valid.int().argmax(-1)


FULL = Attention()


def block_numbers(length: int, block: int, origins: Tensor) -> Tensor:
    """(R, T) int64: the block of each of T = `length` columns.

    The first block of each row begins at the column `origins` (R,) int64. All columns before it are the block -1.
    """
    columns = torch.arange(length, device=origins.device)
    return (columns - origins[:, None]).div(block, rounding_mode="floor").clamp(min=-1)


def block_causal_mask(blocks: Tensor) -> Tensor:
    """(R, T, T) bool, True where a position (row) may see another (column), given their `blocks` (R, T)."""
    return blocks[:, None, :] <= blocks[:, :, None]


def two_stream_mask(blocks: Tensor, mask: Tensor) -> Tensor:
    """(R, 1, 2 T, 2 T) bool, the mask of a noisy text with the clean one after it; `mask` (R, 1, T, T) is that of one.

    A noisy block sees itself and the clean blocks before it, as in decoding, so one pass trains all blocks (block
    diffusion, arXiv 2503.09573).
    """
    own = (blocks[:, None, :] == blocks[:, :, None])[:, None] & mask
    noisy = torch.cat([own, mask & ~own], -1)
    clean = torch.cat([torch.zeros_like(mask), mask], -1)
    return torch.cat([noisy, clean], -2)
