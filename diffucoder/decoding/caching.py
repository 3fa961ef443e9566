"""Caching: which positions of a canvas a forward pass must be fed, for each kind of cache.

Each sequence has a plan, which remembers the tokens of its keys and values. `models.cache` holds those. To
add a kind: a class, and a name in `cache_plan_of` and in `params`.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffucoder.decoding.params import DecodingParams
from diffucoder.models.attention import Attention
from diffucoder.models.denoiser import Denoiser

if TYPE_CHECKING:
    from diffucoder.decoding.sequence import Sequence


class NoCache:
    """Every pass computes the whole canvas. Base of all plans."""

    uses_cache = False  # whether keys and values are kept between passes

    def feed(self, sequence: "Sequence", model: Denoiser) -> Tensor:
        """Return (T,) bool: the positions that the next pass is fed."""
        return torch.ones_like(sequence.holes)

    def passed(self, sequence: "Sequence") -> None:
        """Record that a pass has succeeded. This is called before the tokens of `sequence` change."""


class BlockCache(NoCache):
    """Compute everything when a block begins, then only the block. With `prefix_only`, also compute all right of it.

    Fast-dLLM (arXiv 2505.22618).
    """

    uses_cache = True

    def __init__(self, *, prefix_only: bool) -> None:
        self.prefix_only = prefix_only
        self._block: tuple[int, int] | None = None  # the block that was current when everything was computed

    def feed(self, sequence: "Sequence", model: Denoiser) -> Tensor:
        start, end = sequence.open_block()
        if self._block != (start, end):
            return torch.ones_like(sequence.holes)
        fed = torch.zeros_like(sequence.holes)
        fed[start : None if self.prefix_only else end] = True
        return fed | model.needed_for(fed)

    def passed(self, sequence: "Sequence") -> None:
        self._block = sequence.open_block()


class DelayedCache(NoCache):
    """Compute a position while it is masked, and once more after it was committed or revoked.

    After dKV-Cache (arXiv 2505.15781), which computes everything again at intervals. This one never does.
    """

    uses_cache = True

    def __init__(self) -> None:
        self._tokens: Tensor | None = None  # (T,) tokens of the keys and values

    def feed(self, sequence: "Sequence", model: Denoiser) -> Tensor:
        if self._tokens is None:
            return torch.ones_like(sequence.holes)
        masked = sequence.masked
        return masked | model.needed_for(masked) | (sequence.tokens != self._tokens)

    def passed(self, sequence: "Sequence") -> None:
        self._tokens = sequence.tokens


class BlockCausal(NoCache):
    """The plan for block-causal models: feed nothing after the current block.

    With a cache, each block is computed once more after it is finished. No later token changes its keys and values, so
    this cache is exact.
    """

    def __init__(self, *, uses_cache: bool) -> None:
        self.uses_cache = uses_cache
        self._final = 0  # the keys and values before this position are final

    def feed(self, sequence: "Sequence", model: Denoiser) -> Tensor:
        fed = torch.zeros_like(sequence.holes)
        fed[self._final : sequence.model_block()[1]] = True
        return fed | model.needed_for(fed)

    def passed(self, sequence: "Sequence") -> None:
        if self.uses_cache:
            self._final = sequence.model_block()[0]


def cache_plan_of(params: DecodingParams, attention: Attention) -> NoCache:
    """Return the cache plan of `params` for a model with this attention. Block-causal models have one kind of cache."""
    if attention.block is not None:
        return BlockCausal(uses_cache=params.cache != "none")
    if params.cache == "delayed":
        return DelayedCache()
    if params.cache in ("prefix", "dual"):
        return BlockCache(prefix_only=params.cache == "prefix")
    return NoCache()
