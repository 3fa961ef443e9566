"""The canvas: rows of tokens, some of them masked, that decoding fills in.

Shapes: B rows of T positions. A position is padding (`valid` False, only on the left), masked (holds `mask_id`) or
known. A mask within a prompt is a hole, and is filled too.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffucoder.decoding.resize import Resize
from diffucoder.errors import PromptError
from diffucoder.models.attention import FULL, Attention


@dataclass(frozen=True, eq=False, kw_only=True)
class Canvas:
    """Rows of tokens to decode. Raises PromptError for a canvas that cannot be decoded."""

    tokens: Tensor  # (B, T) int64
    valid: Tensor  # (B, T) bool, False on left padding
    sample: Tensor  # (B,) int64: which sample of its prompt a row is; with the seed it fixes the row's random numbers
    mask_id: int
    pad_id: int | None = None  # replaces the masks that are left after a terminator; None keeps them
    terminators: tuple[int, ...] = ()  # ids that end a row once nothing before them is masked (not `reference`)
    forbidden: tuple[int, ...] = ()  # ids that are never proposed, as the mask is (not `reference`)
    proposable: int | None = None  # ids from this one on are never proposed (not `reference`); None: all may be
    attention: Attention = FULL  # of the model
    resize: Resize | None = None  # the model decides how long the holes become

    def __post_init__(self) -> None:
        shape = tuple(self.tokens.shape)
        if self.valid.shape != shape or self.sample.shape != shape[:1]:
            shapes = f"valid {tuple(self.valid.shape)} and sample {tuple(self.sample.shape)}"
            raise PromptError(f"{shapes} do not fit tokens {shape}; give valid (B, T) and sample (B,)")
        padded_inside = (self.valid[:, :-1] & ~self.valid[:, 1:]).any(-1)  # (B,)
        if padded_inside.any():
            row = padded_inside.int().argmax()
            raise PromptError(f"row {row} has padding right of a token; pad on the left only")
        if not self.masked.any():
            raise PromptError(f"no position holds the mask id {self.mask_id}: nothing to decode; add new_tokens")

    @classmethod
    def from_prompts(
        cls,
        input_ids: Tensor,
        *,
        valid: Tensor | None = None,
        new_tokens: int,
        mask_id: int,
        pad_id: int | None = None,
        terminators: tuple[int, ...] = (),
        forbidden: tuple[int, ...] = (),
        proposable: int | None = None,
        attention: Attention = FULL,
    ) -> "Canvas":
        """Add `new_tokens` masks after prompts (B, P). `valid` is False on their left padding; 0 tokens: only holes."""
        shape = tuple(input_ids.shape)
        if input_ids.ndim != 2 or input_ids.is_floating_point() or input_ids.numel() == 0:
            raise PromptError(f"input_ids is {input_ids.dtype} of shape {shape}; give ids of shape (rows, length)")
        if new_tokens < 0:
            raise PromptError(f"new_tokens={new_tokens} is negative; give 0 to fill only the masks within the prompts")
        valid = torch.ones_like(input_ids) if valid is None else valid
        if valid.shape != shape:
            raise PromptError(f"valid {tuple(valid.shape)} does not fit input_ids {shape}; give (B, P) of both")
        return cls(
            tokens=pad(input_ids.long(), (0, new_tokens), value=mask_id),
            valid=pad(valid.bool(), (0, new_tokens), value=True),
            sample=torch.zeros(shape[0], dtype=torch.long, device=input_ids.device),
            mask_id=mask_id,
            pad_id=pad_id,
            terminators=terminators,
            forbidden=forbidden,
            proposable=proposable,
            attention=attention,
        )

    @classmethod
    def stacked(cls, canvases: "list[Canvas]") -> "Canvas":
        """Return the rows of several canvases of one model, left-padded to the longest; holes have the least limit."""
        longest = max(canvas.tokens.shape[1] for canvas in canvases)
        tokens = []
        valid = []
        for canvas in canvases:
            missing = (longest - canvas.tokens.shape[1], 0)
            tokens.append(pad(canvas.tokens, missing, value=canvas.pad_id or 0))
            valid.append(pad(canvas.valid, missing, value=False))
        sample = torch.cat([canvas.sample for canvas in canvases])
        first = min(canvases, key=lambda canvas: canvas.resize.most if canvas.resize else 0)
        return replace(first, tokens=torch.cat(tokens), valid=torch.cat(valid), sample=sample)

    @property
    def masked(self) -> Tensor:
        """(B, T) bool: positions to fill in."""
        return self.valid & (self.tokens == self.mask_id)

    def repeat(self, num_samples: int) -> "Canvas":
        """Return each row `num_samples` times, consecutively, as different samples."""
        offset = torch.arange(num_samples, device=self.sample.device)  # (n,)
        return replace(
            self,
            tokens=self.tokens.repeat_interleave(num_samples, 0),
            valid=self.valid.repeat_interleave(num_samples, 0),
            sample=(self.sample[:, None] * num_samples + offset).flatten(),
        )

    def check_scorable(self, first: int) -> None:
        """Raise PromptError if a row has a mask before `first`, the first position that the model can score."""
        early = (self.masked & (self.valid.cumsum(-1) <= first)).any(-1)  # (B,)
        if early.any():
            row = early.int().argmax()
            raise PromptError(f"row {row} begins with a mask, which has nothing to its left; put a token before it")


def leftmost(matches: Tensor) -> int:
    """Return the position of the first True of `matches` (T,), or T."""
    return int(pad(matches, (0, 1), value=True).int().argmax())  # the first of equals
