"""Resizing: holes whose length the model decides, by a token that becomes two masks and one that ends its hole.

DreamOn's rule (DreamLM/DreamOn, `eval/generator.py`). Not for: how a row follows its new places (`sequence`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Resize:
    """The two tokens of a model that decides the length of holes, and what it may not exceed."""

    expand_id: int  # becomes two masks
    delete_id: int  # is removed, with the masks to its right in the same hole
    most: int  # tokens in all holes of a row, and expansions; then `expand_id` is not proposed any more

    def places(self, tokens: Tensor, holes: Tensor, mask_id: int) -> Tensor | None:
        """(T',) int64: the position that each position of the resized row comes from; None if the size stays.

        `tokens` (T,) are those of the row, `holes` (T,) bool are its holes.
        """
        expanded = holes & (tokens == self.expand_id)
        deleted = holes & (tokens == self.delete_id)
        if not (expanded | deleted).any():
            return None
        copies = torch.ones_like(tokens)
        copies[expanded] = 2
        ended = False  # whether the hole at work has had a token that deletes
        for position in range(len(tokens)):
            ended = bool(holes[position]) and (ended or bool(deleted[position]))
            if deleted[position] or (ended and tokens[position] == mask_id):
                copies[position] = 0
        return torch.arange(len(tokens)).repeat_interleave(copies)
