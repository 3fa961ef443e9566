"""Sequence: one request in progress, a row of a canvas with everything that it keeps between decoding steps.

A sequence owns its tokens without padding, its settings as small objects (sampler, rule, cache plan, constraint,
verifier), its random numbers, its cache row and its history. So its result does not depend on its batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffucoder.decoding.caching import cache_plan_of
from diffucoder.decoding.canvas import Canvas, leftmost
from diffucoder.decoding.constraints import Constraint, Decision, verifier_of
from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.policies import rule_of, schedule_of
from diffucoder.decoding.sampling import Sampler
from diffucoder.decoding.trace import Trace, pack_entropies
from diffucoder.errors import ConfigError
from diffucoder.models.cache import KVCache
from diffucoder.models.denoiser import Denoiser

Until = Callable[[Tensor], bool]
"""Whether to end a row now, given the ids (n,) from its first hole to its first position that is still masked."""


@dataclass(frozen=True, eq=False)
class Step:
    """Result of one step for B rows of T positions."""

    index: int  # of this step, from 0
    canvas: Tensor  # (B, T) tokens after this step
    committed: Tensor  # (B, T) bool, unmasked by this step
    revoked: Tensor | None  # (B, T) bool, masked again by this step; None where no row revokes
    confidence: Tensor  # (B, T) score of each commitment, by the row's policy; 0 elsewhere
    log_prob: Tensor  # (B, T) log-probability of each commitment when it was made; 0 elsewhere
    entropy: Tensor | None  # (B, T) nats, of each position before this step; nan where none was scored
    resized: Tensor | None = None  # (B, T') tokens once holes have the length that this step gave them; None: as before
    places: Tensor | None = None  # (B, T') where each of these was before

    @property
    def forward_passes(self) -> int:
        """Number of forward passes so far."""
        return self.index + 1


@dataclass(frozen=True, eq=False)
class Proposals:
    """Proposals of a pass for R rows of T positions; without R, for one sequence. 0 where nothing was scored."""

    open: Tensor  # (R, T) bool: masked, and may be committed now
    verified: Tensor  # (R, T) bool: committed tokens that were scored again
    tokens: Tensor  # (R, T) ids: the proposal where open, else the present token
    confidence: Tensor  # (R, T) by the row's order
    log_prob: Tensor  # (R, T) of these tokens
    entropy: Tensor  # (R, T) nats; nan where it is not wanted
    candidates: Tensor  # (R, T, k) the most probable ids, best first; k = 0 where no constraint wants them
    candidate_log_probs: Tensor  # (R, T, k)

    def of(self, row: int, length: int) -> "Proposals":
        """Return the proposals of one row, without its padding."""
        rows = {field.name: getattr(self, field.name)[row, -length:] for field in fields(self)}
        return Proposals(**rows)


class Sequence:
    """One request in progress. Only `advance` changes it."""

    def __init__(
        self,
        canvas: Canvas,
        params: DecodingParams,
        *,
        row: int = 0,
        until: Until | None = None,
        entropies: int = 0,
        constraint: Constraint | None = None,
    ) -> None:
        """One `row` of a canvas, which `until` may end early. Its first `entropies` steps record entropies.

        ConfigError for settings that the model's attention does not allow.
        """
        if params.preset == "reference" and canvas.attention.block is not None:
            raise ConfigError(
                "preset='reference' is Dream's sampler, and this model writes in blocks, which it does not know; "
                "use preset='exact'"
            )
        self.canvas = canvas
        self.params = params
        self.row = row
        self.until = until
        self.entropies = entropies
        self.tokens = canvas.tokens[row][canvas.valid[row]].cpu()  # (T,)
        self.holes = self.tokens == canvas.mask_id  # (T,) bool: positions to fill
        self.first_hole = leftmost(self.holes)
        masked = int(self.holes.sum())
        self.schedule = schedule_of(params, masked)
        self.rule = rule_of(params)
        self.cache_plan = cache_plan_of(params, canvas.attention)
        self.constraint = constraint
        self.places = torch.arange(len(self.tokens))  # (T,) of the canvas: which of its positions each comes from
        self._expansions = 0
        self._schedule_began = 0  # the step that is the first of the schedule: later ones follow a resize
        self.verifier = verifier_of(params)
        self.finish_reason: Literal["stop", "length"] | None = None if masked else "length"
        self.forward_passes = 0
        self._until_saw = self.first_hole  # the first masked position when `until` was called last
        self._set_sampler()
        # Depends on seed and sample alone. SeedSequence hashes them, so that neighbours share nothing; it reads words
        # of 32 bits, so the sample follows the first word: else sample 1 of seed s would be sample 0 of seed s + 2**32
        upper, lower = divmod(params.seed, 2**32)
        mixed = np.random.SeedSequence((lower, int(canvas.sample[row]), upper)).generate_state(1, np.uint64)
        self._generator = torch.Generator().manual_seed(int(mixed[0]))
        self._uniform: Tensor | None = None
        self._cache: tuple[KVCache, int] | None = None
        self._committed_by = torch.full_like(self.tokens, -1)  # (T,) the step that committed each; -1 = none did
        self._confidence = torch.zeros(len(self.tokens))  # (T,) of each commitment
        self._log_prob = torch.zeros(len(self.tokens))  # (T,)
        self._proposed = self.tokens  # (T,) the proposals of the step before
        self._kept = torch.zeros_like(self.tokens)  # (T,) in how many steps before these were the same
        self._revoked: list[list[int]] = []
        self._entropies: list[Tensor] = []  # (T,) each

    @property
    def masked(self) -> Tensor:
        """(T,) bool: positions that are still masked."""
        return self.tokens == self.canvas.mask_id

    @property
    def first_masked(self) -> int:
        """The first position that is still masked; T if none is. Without a verifier nothing before it changes."""
        return leftmost(self.masked)

    @property
    def answer_end(self) -> int:
        """End of the answer: the first terminator that decoding wrote, or T.

        Only this decides it, except for stop strings, which `requests` looks for in text.
        """
        return leftmost(self.holes & self.are_ends(self.tokens))

    def are_ends(self, tokens: Tensor) -> Tensor:
        """Which of `tokens` end an answer, as bool."""
        return torch.isin(tokens, torch.tensor(self.canvas.terminators, dtype=torch.long))

    @property
    def written_end(self) -> int:
        """End of the part of the answer that has no gap. A stop string may leave gaps."""
        return min(leftmost(self.holes & (self._committed_by < 0)), self.answer_end)

    def model_block(self) -> tuple[int, int]:
        """Return the bounds of the current block of the model, the first with a mask. A pass shows nothing after it.

        With full attention there is one block, from the first hole to the end.
        """
        size = self.canvas.attention.block
        if size is None:
            return self.first_hole, len(self.tokens)
        origin = 0 if self.canvas.attention.origin == "start" else self.first_hole
        return self._first_masked_part(origin, len(self.tokens), size)

    def open_block(self) -> tuple[int, int]:
        """Return the bounds of the current block: the part of the model's block that may be filled now."""
        start, end = self.model_block()
        return self._first_masked_part(start, end, self.params.block or len(self.tokens))

    def _first_masked_part(self, start: int, end: int, size: int) -> tuple[int, int]:
        """Split `start` to `end` into parts of `size` positions, and return the one with the first mask."""
        start += (self.first_masked - start) // size * size
        return start, min(start + size, end)

    @property
    def takes_back(self) -> bool:
        """Whether a later step may mask committed tokens again."""
        return self.verifier is not None or (self.constraint is not None and self.constraint.takes_back)

    @property
    def wants_entropy(self) -> bool:
        """Whether the next step records entropies."""
        return self.forward_passes < self.entropies

    @property
    def uniform(self) -> Tensor:
        """(2, T) uniform numbers in [0, 1) of the next step, for tokens and for the order."""
        if not self.params.stochastic:
            return torch.zeros(2, len(self.tokens))
        if self._uniform is None:  # a number for every position, masked or not: padding and past do not matter
            self._uniform = torch.rand(2, len(self.tokens), generator=self._generator)
        return self._uniform

    def due(self) -> float:
        """Return the count or probability that the schedule wants of the next step."""
        return self.schedule.due(self.forward_passes - self._schedule_began, int(self.masked.sum()))

    def stable(self, proposed: Tensor) -> Tensor:
        """Note the tokens `proposed` (T,) by a step. Return which of them `params.stable` steps before it proposed."""
        self._kept = (self._kept + 1).masked_fill(proposed != self._proposed, 0)
        self._proposed = proposed
        return self._kept >= self.params.stable

    def acquire(self, model: Denoiser) -> int:
        """Return its row of the model's cache. Raises CheckpointError for a model without one."""
        if self._cache is None:
            cache = model.cache
            self._cache = cache, cache.acquire(len(self.tokens))
        return self._cache[1]

    def release(self) -> None:
        """Release the cache row. The next step then computes everything again."""
        if self._cache is not None:
            cache, row = self._cache
            cache.release(row)
            self._cache = None
            self.cache_plan = cache_plan_of(self.params, self.canvas.attention)

    def _set_sampler(self) -> None:
        """Decide how tokens are sampled: once the holes have their limit, none is proposed that makes them longer."""
        forbidden = self.canvas.forbidden
        if self.canvas.resize is not None and self._room <= 0:
            forbidden += (self.canvas.resize.expand_id,)
        self.sampler = Sampler.of(
            self.params,
            mask_id=self.canvas.mask_id,
            forbidden=forbidden,
            proposable=self.canvas.proposable,
            terminators=self.canvas.terminators,
        )

    def apply(self, proposals: Proposals, chosen: Tensor) -> Step:
        """Commit the `chosen` (T,) of the `proposals` ((T,) each), as constraint and verifier allow."""
        decision = Decision(self._within_room(chosen, proposals.tokens), proposals.tokens, proposals.log_prob)
        if self.constraint is not None:
            decision = self.constraint.allow(self, proposals, decision)
        committed = decision.committed
        # Not by products: a token that has become impossible has minus infinity
        confidence = proposals.confidence.masked_fill(~committed, 0)
        log_prob = decision.log_prob.masked_fill(~committed, 0)
        revoked = torch.zeros_like(committed) if self.takes_back else None
        rejected = None
        if self.verifier is not None:
            rejected = self.verifier.revoke(self, proposals, decision)
        entropy = None
        if self.wants_entropy:
            entropy = proposals.entropy[None]
            self._entropies.append(proposals.entropy)
        self.cache_plan.passed(self)
        if decision.revoked is not None:
            revoked = self._retreat(decision.revoked) & ~committed
        self.tokens = decision.tokens.where(committed, self.tokens)
        self._committed_by[committed] = self.forward_passes
        self._confidence = confidence.where(committed, self._confidence)
        self._log_prob = log_prob.where(committed, self._log_prob)
        if revoked is not None and rejected is not None:
            self._take_back(rejected)
            revoked = revoked | rejected
        self.forward_passes += 1
        self._uniform = None
        if decision.revoked is not None and self.params.steps is not None:  # as many tokens a step as before
            share = int(self.masked.sum()) / int(self.holes.sum())
            self._schedule_again(math.ceil(share * self.params.steps))
        before = self.tokens[None]
        places = self._resize()
        self._finish_if_over()  # may fill what is still masked with pads
        after = self.tokens[None]
        return Step(
            index=self.forward_passes - 1,
            canvas=after if places is None else before,
            committed=committed[None],
            revoked=None if revoked is None else revoked[None],
            confidence=confidence[None],
            log_prob=log_prob[None],
            entropy=entropy,
            resized=None if places is None else after,
            places=places,
        )

    def _within_room(self, chosen: Tensor, tokens: Tensor) -> Tensor:
        """Of the positions `chosen` (T,) those whose `tokens` (T,) leave the holes within their limit."""
        resize = self.canvas.resize
        if resize is None:
            return chosen
        expands = chosen & (tokens == resize.expand_id)
        return chosen & ~(expands & (expands.cumsum(0) > self._room))

    @property
    def _room(self) -> int:
        """How often a token may still become two masks."""
        assert self.canvas.resize is not None
        return self.canvas.resize.most - max(int(self.holes.sum()), self._expansions)

    def _resize(self) -> Tensor | None:
        """Let the holes have the length that the tokens just committed give them: (1, T') places; None: as before."""
        resize = self.canvas.resize
        places = None
        if resize is not None:
            places = resize.places(self.tokens, self.holes, self.canvas.mask_id)
        if resize is None or places is None:
            return None
        self.release()  # keys and values are those of other positions
        self.tokens = self.tokens[places]
        self.holes = self.holes[places]
        self.places = self.places[places]
        self._committed_by = self._committed_by[places]
        self._confidence = self._confidence[places]
        self._log_prob = self._log_prob[places]
        expanded = self.holes & (self.tokens == resize.expand_id)
        self.tokens = self.tokens.masked_fill(expanded, self.canvas.mask_id)
        self._forget(expanded)
        self._expansions += int(expanded.sum()) // 2
        self._proposed = self.tokens
        self._kept = torch.zeros_like(self.tokens)
        self.entropies = 0  # a trace has them for the same positions in all steps
        self._entropies = []
        self._revoked = []
        if self.verifier is not None:
            self.verifier.move(places)
        if self.constraint is not None:
            self.constraint.move(places)
        left = None if self.params.steps is None else self.params.steps - self.forward_passes
        self._schedule_again(left)
        self._set_sampler()
        return places[None]

    def _schedule_again(self, steps: int | None) -> None:
        """Plan this number of steps for the masks that are left."""
        params = self.params.replace(steps=None if steps is None else max(1, steps))
        self.schedule = schedule_of(params, int(self.masked.sum()))
        self._schedule_began = self.forward_passes

    def _retreat(self, revoked: Tensor) -> Tensor:
        """Mask the positions `revoked` (T,) again, where the model writes in blocks also those after them."""
        first = leftmost(revoked)
        if self.canvas.attention.block is not None:
            revoked = self.holes & ~self.masked & (torch.arange(len(revoked)) >= first)
        if first < self.model_block()[0]:
            self.release()  # its block is at work again
        self._take_back(revoked)
        return revoked

    def _take_back(self, revoked: Tensor) -> None:
        """Mask the positions `revoked` (T,) again."""
        for position in revoked.nonzero()[:, 0].tolist():
            token = int(self.tokens[position])
            made = int(self._committed_by[position])
            self._revoked.append([position - self.first_hole, token, made, self.forward_passes])
        self._forget(revoked)
        self.tokens = self.tokens.masked_fill(revoked, self.canvas.mask_id)
        self._until_saw = min(self._until_saw, self.first_masked)  # other tokens may come there

    def _forget(self, positions: Tensor) -> None:
        """Note that nothing is committed at `positions` (T,) bool."""
        self._committed_by = self._committed_by.masked_fill(positions, -1)
        self._confidence = self._confidence.masked_fill(positions, 0)
        self._log_prob = self._log_prob.masked_fill(positions, 0)

    def _finish_if_over(self) -> None:
        """Set `finish_reason` when nothing before the end of the answer is masked, or `until` returns True.

        The reference preset takes all its steps, whatever it has written.
        """
        first_masked = self.first_masked
        stopped = self.answer_end < first_masked
        over = stopped or first_masked == len(self.tokens)
        if self.sampler.reference:
            over = self.forward_passes == self.schedule.steps
        if self.until is not None and first_masked > self._until_saw:
            self._until_saw = first_masked
            if self.until(self.tokens[self.first_hole : first_masked]):
                over = stopped = True
        if over:
            self.finish_reason = "stop" if stopped else "length"
            if self.canvas.pad_id is not None:
                self.tokens = self.tokens.masked_fill(self.masked, self.canvas.pad_id)
            self.release()

    def trace(self, model: str = "") -> Trace:
        """Return the history so far as a trace. `model` is the name of the model in it."""
        start = self.first_hole
        steps: list[int] = self._committed_by[start:].tolist()
        return Trace(
            tokens=self.tokens.tolist(),
            prompt_length=start,
            steps=steps,
            confidence=[float(f"{value:.4g}") for value in self._confidence[start:].tolist()],
            log_probs=[round(value, 4) for value in self._log_prob[start:].tolist()],
            forward_passes=self.forward_passes if self._schedule_began else max(steps, default=-1) + 1,
            params=self.params.model_dump(mode="json"),
            model=model,
            revoked=self._revoked,
            entropies=pack_entropies([entropy[start:] for entropy in self._entropies]),
        )
