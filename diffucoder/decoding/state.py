"""One request: a row of a canvas, and everything that decides what becomes of it.

For: what `advance` keeps between its steps. Not for: the steps (`denoise`), or what the model is shown (`passes`).
"""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from diffucoder.decoding.canvas import Canvas, leftmost
from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.policies import schedule
from diffucoder.models.lean import Place

Until = Callable[[Tensor], bool]
"""Whether to end a row now, given the ids (n,) from its first hole to its first position that is still masked."""

_LATER = 1 << 30  # a step that no request reaches


class Slot(NamedTuple):
    """Where a request's keys and values are, and of which time."""

    place: Place
    block: int  # the block at work when all of them were computed
    age: int  # steps the request had taken then
    tokens: Tensor  # (T,) what they are the keys and values of by now


class DecodeState:
    """One request. It belongs to whoever calls `advance`, which alone changes it."""

    def __init__(
        self, canvas: Canvas, params: DecodingParams, *, row: int = 0, until: Until | None = None, entropies: int = 0
    ) -> None:
        """Take up one `row` of a canvas. Its random numbers depend on `params.seed` and its sample index alone.

        Its first `entropies` Steps tell the entropy of every position that may be committed.
        The preset `fast` must have been turned into settings before (`tuning.tuned`).
        """
        assert params.preset != "fast", "what fast stands for depends on model and canvas: call tuned first"
        self.canvas = canvas
        self.params = params
        self.until = until
        self.entropies = entropies
        self.tokens = canvas.tokens[row][canvas.valid[row]].cpu()  # (T,) without padding
        self.holes = self.tokens == canvas.mask_id  # (T,) bool: what is to be filled
        self.total = int(self.holes.sum())
        self.schedule = schedule(self.total, params)  # (steps,) counts or shares
        self.first_hole = self.settled = int(leftmost(self.holes[None]))  # positions; what `until` last saw ended there
        self.finish_reason: Literal["stop", "length"] | None = None if self.total else "length"
        self.forward_passes = 0
        self.age = 0  # steps taken: as many as passes, or more where drafts came true
        self.block = 0  # the block at work, and the age at which it began
        self.entered = 0
        exact = params.preset == "exact"
        self.barred = torch.tensor([canvas.mask_id, *canvas.forbidden] if exact else [canvas.mask_id])
        self.terminators = torch.tensor(canvas.terminators, dtype=torch.long)
        self.guesses: list[Tensor] = []  # (T,) canvases that the next pass looks at beside this one
        self.worth: tuple[Tensor, Tensor] | None = None  # (T,) confidence and log-probability of what they guess
        self.last_seen = torch.zeros(len(self.tokens))  # (T,) log-probability of each commitment when last looked at
        self.made = torch.where(self.holes, _LATER, -1)  # (T,) the step that committed each; -1 if it was given
        self.slot: Slot | None = None  # its keys and values, where there is a cache
        # SeedSequence mixes (seed, sample), so that neighbouring seeds and samples share nothing
        mixed = np.random.SeedSequence((params.seed, int(canvas.sample[row]))).generate_state(1, np.uint64)
        self._generator = torch.Generator().manual_seed(int(mixed[0]))
        self._drawn: list[Tensor] = []  # (2, T) uniform numbers of the steps to come

    @property
    def cached(self) -> bool:
        """Whether passes keep keys and values."""
        return self.params.cache != "none"

    @property
    def tells_entropy(self) -> bool:
        """Whether the next Step tells entropies."""
        return self.forward_passes < self.entropies

    @property
    def ar_ness(self) -> float:
        """Local AR-ness@1 until now: the share of commitments right behind what the step before committed, or given.

        Tokens of one step follow none of each other. As if there were one more that did: 1 before the first.
        """
        committed = self.holes & (self.made < _LATER)
        follows = committed & (self.made == 1 + pad(self.made[:-1], (1, 0), value=-1))
        return (1 + int(follows.sum())) / (1 + int(committed.sum()))

    def uniform(self, ahead: int) -> Tensor:
        """(2, T) uniform numbers in [0, 1) for tokens and order, `ahead` steps from now."""
        while len(self._drawn) <= ahead:  # a number for every position, masked or not: padding and past do not matter
            self._drawn.append(torch.rand(2, len(self.tokens), generator=self._generator))
        return self._drawn[ahead]

    def pass_by(self, steps: int) -> None:
        """Count one pass that made `steps` steps."""
        if self.params.ar_bound is not None:  # nothing else asks
            self.made = self.made.clamp(max=self.age).where(self.tokens != self.canvas.mask_id, _LATER)
        self.forward_passes += 1
        self.age += steps
        del self._drawn[:steps]
        if (block := self.block_of(self.tokens)) != self.block:
            self.block, self.entered = block, self.age

    def owed(self, ahead: int, left: int) -> int:
        """What the step `ahead` has to commit with `left` masks before it, so that the schedule holds; at least one."""
        return max(1, int(self.schedule[: self.age + ahead + 1].sum()) - (self.total - left))

    def block_of(self, tokens: Tensor) -> int:
        """The number of the block at work in `tokens` (T,): the first one with a mask; that of the end without."""
        if self.params.block is None:
            return 0
        return (int(leftmost((tokens == self.canvas.mask_id)[None])) - self.first_hole) // self.params.block

    def bounds(self, block: int) -> tuple[int, int]:
        """The positions of a block: from, to."""
        size = self.params.block or len(self.tokens)
        start = self.first_hole + block * size
        return start, min(start + size, len(self.tokens))

    def stale(self, steps: int = 0, block: int | None = None) -> bool:
        """Whether all keys and values are to be computed anew, `steps` from now with `block` at work then."""
        if self.slot is None:
            return True
        age, every = self.age + steps, self.params.refresh_every
        if every is not None and age - self.slot.age >= every:
            return True
        if self.params.cache == "delayed":
            return False
        if block is not None and block != self.block:
            return True  # another block begins: whoever looks ahead stops there
        return self.block != self.slot.block and age - self.entered >= self.params.cache_delay

    def begin_from(self, slots: Iterable[Slot]) -> None:
        """Take over the keys and values of the longest beginning that this request shares with another's.

        For a request with a delayed cache that has not begun. They are as they were in the other's company, so the
        result may differ from that of computing them anew.
        """
        assert self.params.cache == "delayed", "only a delayed cache knows of each position what it holds"
        least = min(len(self.tokens), self.first_hole)  # masks are never kept

        def shared(slot: Slot) -> int:
            size = min(least, len(slot.tokens))
            return int(leftmost((slot.tokens[:size] != self.tokens[:size])[None]))

        best = max(slots, key=shared, default=None)
        if best is None or not (count := shared(best)):
            return
        tokens = self.tokens.new_full(self.tokens.shape, -1)
        tokens[:count] = self.tokens[:count]
        self.slot = Slot(best.place.alone(count, len(self.tokens)), 0, 0, tokens)

    def unkept(self, tokens: Tensor) -> Tensor:
        """What a pass over the canvas `tokens` (T,) feeds with a delayed cache: (T,) bool.

        Every mask and the position to its left, and what was committed since its keys and values were computed.
        """
        assert self.slot is not None
        masked = tokens == self.canvas.mask_id
        return masked | pad(masked[1:], (0, 1)) | (tokens != self.slot.tokens)

    def window(self) -> tuple[int, int]:
        """The positions that a pass over the kept keys and values feeds: from, to."""
        assert self.slot is not None
        start, _ = self.bounds(min(self.block, self.slot.block))  # a block that has just ended is not kept at once
        _, end = self.bounds(self.block)
        end = len(self.tokens) if self.params.cache == "prefix" else end + self.params.vicinity
        return start - 1 - self.params.vicinity, end  # shifted models score a position from its left neighbour
