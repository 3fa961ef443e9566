"""Denoising: `advance`, the only decoding step there is, and `denoise`, which loops over it.

For: turning a canvas into a stream of `Step`s that everyone reads (text, page, report, rollout, server).
Not for: what a row is worth (`sampling`), which positions go first (`policies`), or text (`generate`).

A `DecodeState` is one request and owns all that decides its result: its row without padding, its parameters, its random
numbers. `advance` takes any mix of them (lengths, ages, policies), spends one forward pass, and gives each its Step. A
row therefore comes out the same alone and in company, up to the rounding of matrix products, which differ in shape.

The logits' side of a step runs where the model is; all that is (B, T) runs on the CPU, where rows and generators live,
so that a step costs one transfer to the device and one back.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diffucoder.decoding.canvas import Canvas, leftmost
from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.policies import commit, commit_randomly, commit_released, gumbel, schedule
from diffucoder.decoding.sampling import Rules, propose
from diffucoder.errors import PromptError
from diffucoder.models.denoiser import Denoiser

Until = Callable[[Tensor], bool]
"""Whether to end a row now, given the ids (n,) from its first hole to its first position that is still masked."""


@dataclass(frozen=True, eq=False)
class Step:
    """What one step did to B rows of T positions."""

    index: int  # of this step, from 0
    canvas: Tensor  # (B, T) tokens after this step
    committed: Tensor  # (B, T) bool, unmasked by this step
    revoked: Tensor | None  # (B, T) bool, masked again by this step (revocable policies; there are none yet)
    confidence: Tensor  # (B, T) score behind each commitment, by the row's policy; 0 elsewhere
    forward_passes: int  # spent so far
    log_prob: Tensor  # (B, T) log-probability of each commitment when it was made; 0 elsewhere


class DecodeState:
    """One request: a row of a canvas, and everything that decides what becomes of it."""

    def __init__(self, canvas: Canvas, params: DecodingParams, *, row: int = 0, until: Until | None = None) -> None:
        """Take up one `row` of a canvas. Its random numbers depend on `params.seed` and its sample index alone."""
        self.canvas = canvas
        self.params = params
        self.until = until
        self.tokens = canvas.tokens[row][canvas.valid[row]].cpu()  # (T,) without padding
        masked = self.tokens == canvas.mask_id
        self.schedule = schedule(int(masked.sum()), params)  # (steps,)
        self.first_hole = self.settled = int(leftmost(masked[None]))  # positions; what `until` last saw ended there
        self.end = len(self.tokens)  # position of the first terminator committed so far; the length where none
        self.forward_passes = 0
        self.finish_reason: Literal["stop", "length"] | None = None if masked.any() else "length"
        exact = params.preset == "exact"
        self.barred = torch.tensor([canvas.mask_id, *canvas.forbidden] if exact else [canvas.mask_id])
        self.terminators = torch.tensor(canvas.terminators, dtype=torch.long)
        # SeedSequence mixes (seed, sample), so that neighbouring seeds and samples share nothing
        mixed = np.random.SeedSequence((params.seed, int(canvas.sample[row]))).generate_state(1, np.uint64)
        self.generator = torch.Generator().manual_seed(int(mixed[0]))


@torch.no_grad()
def advance(model: Denoiser, states: Sequence[DecodeState]) -> list[Step]:
    """One step of every request in `states`, none of them finished, for one forward pass; Steps of (1, own length)."""
    assert all(state.finish_reason is None for state in states), "a finished request has nothing to advance"
    tokens = pad_sequence([state.tokens for state in states], batch_first=True, padding_side="left")  # (B, T)
    padding = tokens.shape[1] - torch.tensor([len(state.tokens) for state in states])  # (B,)
    valid = torch.arange(tokens.shape[1]) >= padding[:, None]  # (B, T)
    masked = valid & (tokens == torch.tensor([[state.canvas.mask_id] for state in states]))  # (B, T)
    token_noise, order_noise = _noise(states, tokens.shape[1])  # (B, T) each
    proposed, confidence, log_prob = _propose(model, states, tokens, valid, masked, token_noise)  # (B, T) each
    committed = _choose(states, confidence, masked, order_noise)  # (B, T)
    tokens = proposed.where(committed, tokens)
    tokens = _settle(states, tokens, committed, masked & ~committed, padding)
    confidence, log_prob = confidence.where(committed, 0), log_prob.where(committed, 0)
    steps = []
    for row, (state, start) in enumerate(zip(states, padding.tolist(), strict=True)):
        own = (slice(row, row + 1), slice(start, None))
        state.tokens = tokens[own][0]
        state.forward_passes += 1
        passes = state.forward_passes
        steps.append(Step(passes - 1, tokens[own], committed[own], None, confidence[own], passes, log_prob[own]))
    return steps


def denoise(model: Denoiser, canvas: Canvas, params: DecodingParams, *, until: Until | None = None) -> Iterator[Step]:
    """Fill in a canvas, step by step, until every row is finished; finished rows cost nothing and stay as they are.

    Steps have the canvas's own shape and padding, with `params.num_samples` consecutive rows for each of its rows.
    `until` may end any row early; what is still masked there is filled with the canvas's `pad_id`.
    """
    if canvas.mask_id != model.mask_id:
        raise PromptError(
            f"the canvas marks holes with {canvas.mask_id}, the model with {model.mask_id}; use the model's"
        )
    canvas = canvas.repeat(params.num_samples)
    states = [DecodeState(canvas, params, row=row, until=until) for row in range(len(canvas.tokens))]
    tokens = canvas.tokens
    nothing = torch.zeros_like(tokens, dtype=torch.float32)
    for index in count():
        rows = [row for row, state in enumerate(states) if state.finish_reason is None]
        if not rows:
            return
        steps = advance(model, [states[row] for row in rows])
        tokens = _laid_over(tokens, rows, [step.canvas for step in steps])
        yield Step(
            index=index,
            canvas=tokens,
            committed=_laid_over(nothing.bool(), rows, [step.committed for step in steps]),
            revoked=None,
            confidence=_laid_over(nothing, rows, [step.confidence for step in steps]),
            forward_passes=index + 1,
            log_prob=_laid_over(nothing, rows, [step.log_prob for step in steps]),
        )


def _laid_over(matrix: Tensor, rows: list[int], parts: list[Tensor]) -> Tensor:
    """A copy of `matrix` (B, T) with each part (1, t) laid over the right end of its row."""
    matrix = matrix.clone()
    for row, part in zip(rows, parts, strict=True):
        matrix[row, matrix.shape[1] - part.shape[1] :] = part[0]
    return matrix


def _noise(states: Sequence[DecodeState], length: int) -> Tensor:
    """(2, B, T) uniform numbers in [0, 1) for tokens and order, each row's own; 0 where a row needs none."""
    noise = torch.zeros(2, len(states), length)
    for row, state in enumerate(states):
        if state.params.stochastic:
            own = len(state.tokens)  # a number for every position, masked or not: padding and past do not matter
            noise[:, row, length - own :] = torch.rand(2, own, generator=state.generator)
    return noise


def _propose(
    model: Denoiser, states: Sequence[DecodeState], tokens: Tensor, valid: Tensor, masked: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A token, its confidence and its log-probability for every masked position: (B, T) each, 0 elsewhere."""
    rows = masked.nonzero()  # (M, 2)
    barred = pad_sequence([state.barred for state in states], batch_first=True, padding_value=-1)  # (B, K)
    barred = barred.where(barred >= 0, barred[:, :1])  # fewer ids than others: the mask again
    rules = Rules.of([state.params for state in states], barred)[rows[:, 0]]
    uniform = uniform[masked]  # (M,)

    def sample(logits: Tensor, chunk: slice) -> tuple[Tensor, Tensor, Tensor]:
        return propose(logits, rules[chunk], uniform[chunk], proposable=model.proposable)

    device = model.device
    seen = None if valid.all() else valid.to(device)
    results = model(tokens.to(device), valid=seen, rows=rows.to(device), reduce=sample)  # (M,) each
    proposed, confidence, log_prob = (
        torch.zeros_like(masked, dtype=result.dtype).masked_scatter(masked, result.cpu()) for result in results
    )
    return proposed, confidence, log_prob


def _choose(states: Sequence[DecodeState], confidence: Tensor, masked: Tensor, uniform: Tensor) -> Tensor:
    """The masked positions that each row commits now: (B, T) bool."""
    reference = torch.tensor([[state.params.preset == "reference"] for state in states])  # (B, 1)
    random = torch.tensor([[state.params.policy == "random"] for state in states])  # (B, 1)
    heat = torch.tensor([[state.params.policy_temperature] for state in states])  # (B, 1)
    due = torch.stack([state.schedule[state.forward_passes] for state in states])  # (B,) counts or shares
    noisy = confidence / heat.where(heat > 0, 1) + gumbel(uniform)
    priority = uniform.where(random, noisy.where(heat > 0, confidence))  # (B, T)
    budget = (due * masked.sum(-1)).floor().where(reference[:, 0], due).long()  # (B,)
    committed = commit(priority, masked, budget)
    if reference.any():
        released = commit_released(priority, masked, budget)
        released = commit_randomly(uniform, masked, due).where(random, released)
        committed = released.where(reference, committed)
    return committed


def _settle(
    states: Sequence[DecodeState], tokens: Tensor, committed: Tensor, masked: Tensor, padding: Tensor
) -> Tensor:
    """Finish the rows that are done, by setting `finish_reason`; (B, T) tokens, with what they leave masked filled.

    A row stops once nothing is masked before the first terminator that decoding put there, or when its `until` says so;
    otherwise its length ends it. The reference preset knows no terminators: it takes all its steps.
    """
    terminators = pad_sequence([state.terminators for state in states], batch_first=True, padding_value=-1)  # (B, K)
    ends = leftmost(committed & (tokens[:, :, None] == terminators[:, None]).any(-1))  # (B,)
    ends = ends.minimum(padding + torch.tensor([state.end for state in states]))
    settled = leftmost(masked)  # (B,) position of the first mask
    stopped = ends < settled  # (B,)
    over = stopped | ~masked.any(-1)
    for row, (state, start) in enumerate(zip(states, padding.tolist(), strict=True)):
        state.end, now_settled = int(ends[row]) - start, int(settled[row]) - start
        if state.params.preset == "reference":
            over[row] = state.forward_passes + 1 == len(state.schedule)
        if state.until is not None and now_settled > state.settled:
            state.settled = now_settled
            if state.until(tokens[row, start + state.first_hole : start + now_settled]):
                over[row] = stopped[row] = True
        if over[row]:
            state.finish_reason = "stop" if stopped[row] else "length"
    left = [state.canvas.mask_id if state.canvas.pad_id is None else state.canvas.pad_id for state in states]
    return torch.tensor(left)[:, None].where(over[:, None] & masked, tokens)
