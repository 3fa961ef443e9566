"""Denoising: `advance`, the only decoding step there is, and `denoise`, which loops over it.

For: turning a canvas into a stream of `Step`s that everyone reads (text, page, report, rollout, server).
Not for: what a position is worth (`sampling`), which go first (`policies`), what a pass sees (`passes`), or text.

A `DecodeState` is one request and owns all that decides its result: its row without padding, its parameters, its random
numbers. `advance` takes any mix of them (lengths, ages, policies), spends one forward pass, and gives each its Step. A
row therefore comes out the same alone and in company, up to the rounding of matrix products, which differ in shape.

A request may bring several canvases to a pass: the one it has come to, and guesses of what may come next. With
`drafts` these are the canvases after the next steps as this step foresees them: each one that comes true has been
scored already, so one pass makes several steps, the very steps that single passes would have made (self-speculation).
With `branches` they differ from each other by one token, and the request goes on with the surest (LoPA).

The logits' side of a step runs where the model is; all that is (R, T) runs on the CPU, where rows and generators live,
so that a step costs one transfer to the device and one back.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diffucoder.decoding.canvas import Canvas, leftmost
from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.passes import Found, Rows, score
from diffucoder.decoding.policies import (
    commit,
    commit_randomly,
    commit_released,
    gumbel,
    surer_than,
    within_entropy,
    within_factor,
)
from diffucoder.decoding.state import DecodeState, Until
from diffucoder.decoding.tuning import tuned
from diffucoder.errors import PromptError
from diffucoder.models.denoiser import Denoiser

__all__ = ["DecodeState", "Step", "Until", "advance", "denoise"]


@dataclass(frozen=True, eq=False)
class Step:
    """What one step did to B rows of T positions."""

    index: int  # of this step, from 0
    canvas: Tensor  # (B, T) tokens after this step
    committed: Tensor  # (B, T) bool, unmasked by this step
    revoked: Tensor | None  # (B, T) bool, masked again by this step; None where no row revokes
    confidence: Tensor  # (B, T) score behind each commitment, by the row's policy; 0 elsewhere
    forward_passes: int  # spent so far
    log_prob: Tensor  # (B, T) log-probability of each commitment when it was made; 0 elsewhere
    entropy: Tensor | None = None  # (B, T) nats, of each position before this step; nan where none was scored, or asked


@torch.no_grad()
def advance(model: Denoiser, states: Sequence[DecodeState]) -> list[Step]:
    """One pass for every request in `states`, none of them finished; Steps of (1, own length)."""
    assert all(state.finish_reason is None for state in states), "a finished request has nothing to advance"
    rows = Rows.of(states)
    found = score(model, rows)
    committed = _choose(rows, found)  # (R, T)
    revoked = _revoke(rows, found, committed)  # (R, T)
    after = found.tokens.where(committed, rows.tokens).where(~revoked, model.mask_id)
    made = Made(committed, revoked, after, *_ends(rows, after))
    steps, at = [], 0
    for state in states:
        own = range(at, at + 1 + len(state.guesses))
        at = own.stop
        taken = _taken(state, own, rows, found, made)
        steps.append(_step(state, taken, rows, found, made))
        state.guesses = [] if state.finish_reason else _guesses(state, taken[-1], rows, found)
    return steps


def denoise(
    model: Denoiser, canvas: Canvas, params: DecodingParams, *, until: Until | None = None, entropies: int = 0
) -> Iterator[Step]:
    """Fill in a canvas, step by step, until every row is finished; finished rows cost nothing and stay as they are.

    Steps have the canvas's own shape and padding, with `params.num_samples` consecutive rows for each of its rows.
    `until` may end any row early; what is still masked there is filled with the canvas's `pad_id`. The first
    `entropies` steps also tell how unsure the model is of every position that may be committed (`sampling.entropy`).
    """
    if canvas.mask_id != model.mask_id:
        raise PromptError(
            f"the canvas marks holes with {canvas.mask_id}, the model with {model.mask_id}; use the model's"
        )
    params = tuned(params, model, canvas)
    canvas = canvas.repeat(params.num_samples)
    rows = range(len(canvas.tokens))
    states = [DecodeState(canvas, params, row=row, until=until, entropies=entropies) for row in rows]
    tokens = canvas.tokens
    nothing = torch.zeros_like(tokens, dtype=torch.float32)
    for index in count():
        going = [row for row, state in enumerate(states) if state.finish_reason is None]
        if not going:
            return
        steps = advance(model, [states[row] for row in going])
        tokens = _laid_over(tokens, going, [step.canvas for step in steps])
        revoked = [step.revoked for step in steps if step.revoked is not None]
        entropy = [step.entropy for step in steps if step.entropy is not None]  # of all rows or of none
        yield Step(
            index=index,
            canvas=tokens,
            committed=_laid_over(nothing.bool(), going, [step.committed for step in steps]),
            revoked=_laid_over(nothing.bool(), going, revoked) if revoked else None,
            confidence=_laid_over(nothing, going, [step.confidence for step in steps]),
            forward_passes=index + 1,
            log_prob=_laid_over(nothing, going, [step.log_prob for step in steps]),
            entropy=_laid_over(nothing / nothing, going, entropy) if entropy else None,
        )


def _laid_over(matrix: Tensor, rows: list[int], parts: list[Tensor]) -> Tensor:
    """A copy of `matrix` (B, T) with each part (1, t) laid over the right end of its row."""
    matrix = matrix.clone()
    for row, part in zip(rows, parts, strict=True):
        matrix[row, matrix.shape[1] - part.shape[1] :] = part[0]
    return matrix


# --- what a step commits ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Made:
    """What a step makes of its rows, if it is taken by them."""

    committed: Tensor  # (R, T) bool
    revoked: Tensor  # (R, T) bool
    after: Tensor  # (R, T) tokens
    ends: Tensor  # (R,) the first terminator that decoding put there; T where none
    settled: Tensor  # (R,) the first mask; T where none


def _choose(rows: Rows, found: Found) -> Tensor:
    """The open positions that each row commits now: (R, T) bool."""
    priority, left = _priority(rows.states, found.confidence, rows.uniform[1]), rows.masked.sum(-1)  # (R, T), (R,)
    owed = [s.owed(ahead, n) for s, ahead, n in zip(rows.states, rows.ahead, left.tolist(), strict=True)]
    committed = commit(priority, found.open, torch.tensor(owed)) | _sure(rows, found)
    if any(state.params.preset == "reference" for state in rows.states):
        reference = rows.column(lambda state: state.params.preset == "reference")[:, None]  # (R, 1)
        random = rows.column(lambda state: state.params.policy == "random")[:, None]  # (R, 1)
        share = rows.column(lambda s: float(s.schedule[s.age]) if s.params.preset == "reference" else 0.0)  # (R,)
        released = commit_released(priority, found.open, (share * left).floor().long())
        released = commit_randomly(rows.uniform[1], found.open, share).where(random, released)
        committed = released.where(reference, committed)
    return committed


def _priority(states: Sequence[DecodeState], confidence: Tensor, uniform: Tensor) -> Tensor:
    """(R, T) which position goes first: the surest, perturbed by noise, or noise alone."""
    if all(state.params.policy != "random" and not state.params.policy_temperature for state in states):
        return confidence
    random = torch.tensor([[state.params.policy == "random"] for state in states])  # (R, 1)
    heat = torch.tensor([[state.params.policy_temperature] for state in states])  # (R, 1)
    noisy = confidence / heat.where(heat > 0, 1) + gumbel(uniform)
    return uniform.where(random, noisy.where(heat > 0, confidence))


def _sure(rows: Rows, found: Found) -> Tensor:
    """The positions that each row's rule commits, whatever its schedule says: (R, T) bool."""
    sure, params = torch.zeros_like(found.open), [state.params for state in rows.states]
    probability = found.log_prob.exp()  # (R, T)
    if any(p.threshold is not None or p.adaptive for p in params):
        least = torch.tensor([_least(state) for state in rows.states])  # (R,)
        by_margin = torch.tensor([[p.policy == "margin" and not p.adaptive] for p in params])  # (R, 1)
        sure |= surer_than(found.confidence.where(by_margin, probability), found.open, least)
    if any(p.factor is not None for p in params):
        factor = torch.tensor([p.factor or 0.0 for p in params])  # with 0 nothing fits
        sure |= within_factor(probability, found.open, factor)
    bounds = [_bound(state) for state in rows.states]
    if any(bound is not None for bound in bounds):
        bounded = torch.tensor([[bound is not None] for bound in bounds])  # (R, 1)
        bound = torch.tensor([bound or 0.0 for bound in bounds])
        sure |= within_entropy(-found.confidence, found.open & bounded, bound)
    return sure


def _bound(state: DecodeState) -> float | None:
    """What the entropies of a step's tokens may add up to; None where there is no such rule.

    With `ar_bound` it is wide as long as tokens come one behind the other, and narrows as they scatter.
    """
    if state.params.ar_bound is not None:
        return state.params.ar_bound * state.ar_ness
    return state.params.entropy_bound


def _least(state: DecodeState) -> float:
    """The probability from which on tokens are committed; 2, which none has, where there is no such rule."""
    if state.params.adaptive:
        committed = state.last_seen[state.holes & (state.tokens != state.canvas.mask_id)]
        return float(committed.exp().mean()) if len(committed) else 2.0
    return 2.0 if state.params.threshold is None else state.params.threshold


def _revoke(rows: Rows, found: Found, committed: Tensor) -> Tensor:
    """Earlier commitments that are masked again, those that lost most; fewer than are committed: (R, T) bool."""
    revoked = torch.zeros_like(committed)
    for row, state in enumerate(rows.states):
        if state.params.revoke:
            own = rows.own(row)
            lost = (state.last_seen - found.log_prob[row, own]).masked_fill(~found.looked_at[row, own], 0)[None]
            most = torch.tensor([int(state.params.revoke * int(committed[row].sum()))])
            revoked[row, own] = commit(lost, lost > 0, most)[0]
    return revoked


# --- where a request goes from here ----------------------------------------------------------------------------------


def _ends(rows: Rows, after: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row ends, and up to where it is settled: (R,) each, as in `Made`."""
    states = rows.states
    if len(states) == 1:  # (R, K), (R, T)
        terminators, holes = states[0].terminators[None], states[0].holes[None]
    else:
        terminators = pad_sequence([state.terminators for state in states], batch_first=True, padding_value=-1)
        holes = pad_sequence([state.holes for state in states], batch_first=True, padding_side="left")
    ends = leftmost(holes & (after[:, :, None] == terminators[:, None]).any(-1))
    masks = torch.tensor([[state.canvas.mask_id] for state in states])
    return ends, leftmost(rows.valid & (after == masks))


def _taken(state: DecodeState, own: range, rows: Rows, found: Found, made: Made) -> list[int]:
    """The rows of a request that it goes on by, in order; sets `finish_reason` where the last of them ends it.

    A row stops once nothing is masked before the first terminator that decoding put there, or when `until` says so;
    otherwise its length ends it. The reference preset knows no terminators: it takes all its steps.
    """
    if state.params.branches > 1:
        best = _surest(own, found)
        own = range(best, best + 1)
    taken = []
    for row in own:
        taken.append(row)
        after, settled = made.after[row, rows.own(row)], int(made.settled[row] - rows.padding[row])
        stopped = bool(made.ends[row] < made.settled[row])
        over = stopped or settled == len(after)
        if state.params.preset == "reference":
            over = state.age + 1 == len(state.schedule)
        if state.until is not None and settled > state.settled:
            state.settled = settled
            if state.until(after[state.first_hole : settled]):
                over = stopped = True
        if over:
            state.finish_reason = "stop" if stopped else "length"
            break
        came_true = row + 1 < own.stop and torch.equal(made.after[row], rows.tokens[row + 1])
        if not came_true or (state.cached and state.stale(len(taken), state.block_of(after))):
            break
    return taken


def _surest(own: range, found: Found) -> int:
    """The branch whose open positions are surest on average, the first of equals (LoPA's branch confidence)."""
    here = slice(own.start, own.stop)
    counts = found.open[here].sum(-1)  # (K,)
    sums = (found.log_prob.exp() * found.open)[here].sum(-1)  # (K,)
    return own.start + int((sums / counts.clamp(min=1)).where(counts > 0, 1).argmax())


def _step(state: DecodeState, taken: list[int], rows: Rows, found: Found, made: Made) -> Step:
    """Bring the request to where the last of the rows it goes on by is, and say what was done."""
    last, own = taken[-1], rows.own(taken[-1])
    committed = made.committed[taken]  # (n, T')
    new = committed.any(0)[own]  # (T,)
    # not by products: what is looked at and has become impossible is minus infinity
    confidence, log_prob = (
        each[taken].masked_fill(~committed, 0).sum(0)[own] for each in (found.confidence, found.log_prob)
    )
    if state.worth is not None:  # what the branch had guessed
        guessed = rows.tokens[last, own] != state.tokens
        new = new | guessed
        confidence, log_prob = (w.where(guessed, v) for w, v in zip(state.worth, (confidence, log_prob), strict=True))
    state.last_seen = log_prob.where(new, found.log_prob[last, own].where(found.looked_at[last, own], state.last_seen))
    state.tokens, state.slot = made.after[last, own], found.slots[last]
    entropy = found.entropy[taken[0], own][None] if state.tells_entropy else None
    state.pass_by(len(taken))
    if state.finish_reason is not None:
        left = state.canvas.mask_id if state.canvas.pad_id is None else state.canvas.pad_id
        state.tokens = torch.where(state.tokens == state.canvas.mask_id, left, state.tokens)
    revoked = made.revoked[last, own][None] if state.params.revoke else None
    passes = state.forward_passes
    return Step(passes - 1, state.tokens[None], new[None], revoked, confidence[None], passes, log_prob[None], entropy)


def _guesses(state: DecodeState, row: int, rows: Rows, found: Found) -> list[Tensor]:
    """The canvases that the next pass looks at beside the request's own, by what this pass has found: (T,) each."""
    params, own = state.params, rows.own(row)
    if (params.branches == 1 and not params.drafts) or (state.cached and state.stale()):
        return []  # a pass that computes keys and values anew looks at nothing else
    proposed, confidence, log_prob = (each[row, own] for each in (found.tokens, found.confidence, found.log_prob))
    remaining = found.open[row, own] & (state.tokens == state.canvas.mask_id)  # (T,)
    if params.branches > 1:
        state.worth = confidence, log_prob
        ranked = log_prob.masked_fill(~remaining, -torch.inf).argsort(descending=True, stable=True)
        most = min(params.branches - 1, int(remaining.sum()))
        return [state.tokens.scatter(0, at[None], proposed[at, None]) for at in ranked[:most]]
    guesses, guess, left = list[Tensor](), state.tokens, int((state.tokens == state.canvas.mask_id).sum())
    for ahead in range(params.drafts):
        priority = _priority([state], confidence[None], state.uniform(ahead)[1:])  # as far as it is known by now
        chosen = commit(priority, remaining[None], torch.tensor([state.owed(ahead, left)]))[0]
        left -= (made := int(chosen.sum()))
        if not made or not left:
            break
        guess, remaining = proposed.where(chosen, guess), remaining & ~chosen
        guesses.append(guess)
    return guesses
