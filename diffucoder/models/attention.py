"""Attention patterns: which positions of a canvas a model was trained to see.

Most denoisers attend to every position. Block-causal ones cut a row into blocks of n positions: a position sees its own
block, both ways, and all earlier blocks. So the keys of a finished block never change.

Two conventions say where the first block begins (`origin`). "start": at position 0, so the prompt is in blocks too, and
the block at its end holds both prompt and answer. "prompt": at the end of the prompt, which sees all of itself.
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

        `valid` (R, T) bool is False on left padding; `prompt_ends` (R,) int64 are the columns after the prompts. A
        model whose blocks begin there takes a row without it as an answer without a prompt.
        """
        if self.origin == "prompt" and prompt_ends is not None:
            return prompt_ends
        return (~valid).sum(-1)


FULL = Attention()


def block_causal_mask(length: int, block: int, origins: Tensor) -> Tensor:
    """(R, T, T) bool, True where a position (row) may see another (column): for rows of T = `length` columns.

    The first block of each row begins at the column `origins` (R,) int64. All columns before it are one earlier block.
    """
    columns = torch.arange(length, device=origins.device)
    blocks = (columns - origins[:, None]).div(block, rounding_mode="floor").clamp(min=-1)  # (R, T)
    return blocks[:, None, :] <= blocks[:, :, None]
