"""Caching: which positions of a canvas a forward pass must be fed, for each kind of cache.

For: one small object a sequence, which remembers what its keys and values were computed from. Not for: the keys and
values themselves (`models.cache`).

A pass without a cache computes the whole canvas. *Block* caches (Fast-dLLM, arXiv 2505.22618) keep what is outside the
block at work as it was when the block began: `prefix` what is left of it, `dual` what is right of it too. The *delayed*
cache (dKV-Cache, arXiv 2505.15781) keeps every token's keys and values from the second pass on after the one that
committed it. To add a kind: a class, and a name in `cache_plan_of` and in `params`.
"""

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from diffucoder.decoding.params import DecodingParams
from diffucoder.models.denoiser import Denoiser

if TYPE_CHECKING:
    from diffucoder.decoding.sequence import Sequence


class CachePlan(Protocol):
    """What the passes of one sequence are fed."""

    uses_cache: bool  # whether keys and values are kept between passes

    def feed(self, sequence: "Sequence", model: Denoiser) -> Tensor:
        """(T,) bool: the positions that the next pass is fed."""

    def passed(self, sequence: "Sequence") -> None:
        """Note that a pass has succeeded. It is called before the tokens of `sequence` change."""


class NoCache:
    """Every pass computes the whole canvas."""

    uses_cache = False

    def feed(self, sequence: "Sequence", model: Denoiser) -> Tensor:
        """(T,) bool, all of them."""
        return torch.ones_like(sequence.holes)

    def passed(self, sequence: "Sequence") -> None:
        """Nothing is kept."""


class BlockCache:
    """All is computed when a block begins; then the block, and with `prefix_only` what is right of it."""

    uses_cache = True

    def __init__(self, *, prefix_only: bool) -> None:
        self.prefix_only = prefix_only
        self._block: int | None = None  # the block at work when all was computed

    def feed(self, sequence: "Sequence", model: Denoiser) -> Tensor:
        """(T,) bool."""
        if self._block != sequence.block:
            return torch.ones_like(sequence.holes)
        start, end = sequence.block_bounds()
        fed = torch.zeros_like(sequence.holes)
        fed[start : None if self.prefix_only else end] = True
        return fed | model.needed_for(fed)

    def passed(self, sequence: "Sequence") -> None:
        """From now on only this block is fed, until decoding moves to the next one."""
        self._block = sequence.block


class DelayedCache:
    """A token is computed again as long as it is masked, and once more after it was committed or revoked."""

    uses_cache = True

    def __init__(self) -> None:
        self._tokens: Tensor | None = None  # (T,) what the keys and values were computed from

    def feed(self, sequence: "Sequence", model: Denoiser) -> Tensor:
        """(T,) bool."""
        if self._tokens is None:
            return torch.ones_like(sequence.holes)
        masked = sequence.masked
        return masked | model.needed_for(masked) | (sequence.tokens != self._tokens)

    def passed(self, sequence: "Sequence") -> None:
        """The cache now matches these tokens."""
        self._tokens = sequence.tokens


def cache_plan_of(params: DecodingParams) -> CachePlan:
    """The plan that `params` ask for."""
    if params.cache == "delayed":
        return DelayedCache()
    if params.cache in ("prefix", "dual"):
        return BlockCache(prefix_only=params.cache == "prefix")
    return NoCache()
