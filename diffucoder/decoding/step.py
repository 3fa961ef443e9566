"""The decoding step `advance`, the only one in the package, and `denoise`, which loops over it.

A step has four parts. Each sequence *plans* which positions the pass is fed (`caching`). The pass gives *proposals* for
every open position (`sampling`). Order and rule *choose* what to commit (`policies`). Each sequence *applies* that to
itself, where a constraint may veto commitments and a verifier may revoke earlier ones (`constraints`).

`advance` takes any mix of sequences (lengths, ages, settings). Their results do not depend on each other, up to the
rounding of matrix products. Tensors with a vocabulary axis are on the model's device; everything of shape (R, T), R
rows of T positions, is on the host.
"""

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diffucoder.decoding.canvas import Canvas
from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.policies import RuleInput, ends_last
from diffucoder.decoding.sampling import Sampler, Samples
from diffucoder.decoding.sequence import Proposals, Sequence, Step, Until
from diffucoder.errors import PromptError
from diffucoder.models.denoiser import Denoiser

__all__ = ["Sequence", "Step", "Until", "advance", "decode", "denoise"]


@torch.no_grad()
def advance(model: Denoiser, sequences: list[Sequence]) -> list[Step]:
    """Run one pass for `sequences`, none of them finished. Return a Step of (1, own length) for each."""
    assert all(sequence.finish_reason is None for sequence in sequences), "a finished sequence has nothing to advance"
    plans = [plan(model, sequence) for sequence in sequences]
    batch = Plan(*map(_padded, zip(*plans, strict=True)))
    proposals = propose(model, sequences, batch)
    chosen = choose(sequences, batch, proposals)  # (R, T)
    steps = []
    for row, sequence in enumerate(sequences):
        length = len(sequence.tokens)
        steps.append(sequence.apply(proposals.of(row, length), chosen[row, -length:]))
    return steps


def decode(model: Denoiser, sequences: list[Sequence]) -> Iterator[list[tuple[Sequence, Step]]]:
    """Advance all sequences until they are finished. After each pass yield those that it advanced, and their Steps."""
    try:
        while going := [sequence for sequence in sequences if sequence.finish_reason is None]:
            yield list(zip(going, advance(model, going), strict=True))
    finally:
        for sequence in sequences:
            sequence.release()


def denoise(
    model: Denoiser,
    canvas: Canvas,
    params: DecodingParams,
    *,
    until: Until | None = None,
    entropies: int = 0,
) -> Iterator[Step]:
    """Fill in a canvas, and yield each step. Rows that are finished cost nothing and do not change.

    Steps have the canvas's own shape and padding, with `params.num_samples` consecutive rows for each of its rows.
    `until` may end any row early; masks that are left there become the canvas's `pad_id`. The first `entropies` steps
    also have the entropy of every position that may be committed (`sampling.entropy`).
    """
    if canvas.mask_id != model.mask_id:
        raise PromptError(
            f"the canvas marks holes with {canvas.mask_id}, the model with {model.mask_id}; use the model's"
        )
    if canvas.resize is not None:
        raise PromptError("the canvas has holes that may change their length; decode it with DiffuCoder.run")
    canvas.check_scorable(model.first_scorable)
    canvas = replace(canvas, attention=model.attention).repeat(params.num_samples)
    rows = range(len(canvas.tokens))
    sequences = [Sequence(canvas, params, row=row, until=until, entropies=entropies) for row in rows]
    yield from steps_of(model, canvas.tokens, sequences, entropies=entropies)


def steps_of(model: Denoiser, tokens: Tensor, sequences: list[Sequence], *, entropies: int = 0) -> Iterator[Step]:
    """Yield each step of `sequences`, which are the rows of a canvas with these `tokens` (B, T). See `denoise`."""
    revokes = any(sequence.takes_back for sequence in sequences)
    for index, steps in enumerate(decode(model, sequences)):
        tokens = tokens.clone()
        whole = Step(
            index=index,
            canvas=tokens,
            committed=torch.zeros_like(tokens, dtype=torch.bool),
            revoked=torch.zeros_like(tokens, dtype=torch.bool) if revokes else None,
            confidence=torch.zeros_like(tokens, dtype=torch.float32),
            log_prob=torch.zeros_like(tokens, dtype=torch.float32),
            entropy=torch.full_like(tokens, torch.nan, dtype=torch.float32) if index < entropies else None,
        )
        for sequence, step in steps:
            for name in ("canvas", "committed", "revoked", "confidence", "log_prob", "entropy"):
                own = getattr(step, name)
                if own is not None:
                    getattr(whole, name)[sequence.row, -own.shape[1] :] = own[0]
        yield whole


class Plan(NamedTuple):
    """The part of R sequences in a pass, left-padded to T positions; without R, that of one sequence."""

    tokens: Tensor  # (R, T)
    valid: Tensor  # (R, T) bool
    feed: Tensor  # (R, T) bool: positions that the model is fed
    open: Tensor  # (R, T) bool: masked positions that may be filled now
    verified: Tensor  # (R, T) bool: committed tokens that a verifier wants scored again
    uniform: Tensor  # (R, T, 2) random numbers, for tokens and for the order


def plan(model: Denoiser, sequence: Sequence) -> Plan:
    """Return the part of one sequence in a pass, (T,) each."""
    feed = sequence.cache_plan.feed(sequence, model)
    scorable = model.scorable(feed)
    start, end = sequence.open_block()
    open_ = torch.zeros_like(scorable)
    open_[start:end] = (sequence.masked & scorable)[start:end]
    verified = torch.zeros_like(scorable)
    if sequence.verifier is not None:
        verified = sequence.verifier.verify(sequence) & ~sequence.masked & scorable
        verified[: sequence.model_block()[0]] = False  # of a finished block nothing is taken back
    return Plan(sequence.tokens, torch.ones_like(feed), feed, open_, verified, sequence.uniform.T)


def _padded(rows: Iterable[Tensor]) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_side="left")


def _alike(keys: Iterable[Hashable]) -> Iterable[list[int]]:
    """Group the rows that have equal keys, given the key of each row."""
    rows: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        rows.setdefault(key, []).append(row)
    return rows.values()


def propose(model: Denoiser, sequences: list[Sequence], batch: Plan) -> Proposals:
    """Run the model on the batch, and collect the proposals of all positions that are open or verified."""
    shape = batch.tokens.shape
    candidates = 0
    for sequence in sequences:
        if sequence.constraint is not None:
            candidates = max(candidates, sequence.constraint.candidates(sequence))
    proposals = Proposals(
        open=batch.open,
        verified=batch.verified,
        tokens=batch.tokens.clone(),
        confidence=torch.zeros(shape),
        log_prob=torch.zeros(shape),
        entropy=torch.full(shape, torch.nan),
        candidates=torch.zeros(*shape, candidates, dtype=torch.long),
        candidate_log_probs=torch.zeros(*shape, candidates),
    )
    # The released code's arithmetic, and passes with a cache, need calls of their own
    for rows in _alike((s.sampler.reference, s.cache_plan.uses_cache) for s in sequences):
        part = Plan(*(column[rows] for column in batch))
        wanted, samples = _score(model, [sequences[row] for row in rows], part, candidates)
        at = (torch.tensor(rows)[wanted[:, 0]], wanted[:, 1])  # rows of the part are other rows of the batch
        for name, values in zip(Samples._fields, samples, strict=True):
            getattr(proposals, name)[at] = values.cpu()
    proposals.entropy[~batch.open] = torch.nan
    return proposals


def _score(model: Denoiser, sequences: list[Sequence], batch: Plan, candidates: int) -> tuple[Tensor, Samples]:
    """Call the model once. Return the (row, position) pairs (M, 2) that it scores, and their samples."""
    wanted, spans = _by_sampler(sequences, batch.open | batch.verified)
    at = tuple(wanted.T)
    known = batch.tokens.masked_fill(batch.open, -1)[at].to(model.device)  # (M,) -1: to be proposed
    uniform = batch.uniform[..., 0][at].to(model.device)  # (M,)
    with_entropy = any(sequence.wants_entropy for sequence in sequences)
    which, masks = _limits(sequences, batch.open)
    which = which[at]  # (M,)

    def sample(logits: Tensor, chunk: slice) -> Samples:
        """Sample from `logits` (C, V) of the pairs `chunk` of `wanted`, each part with its own sampler."""
        parts = []
        if masks is not None:
            barred = ~masks[which[chunk]].to(logits.device)  # (C, V)
            logits = logits.masked_fill(barred, torch.finfo(logits.dtype).min)
        for sampler, span in spans:
            start = max(span.start, chunk.start)
            stop = max(start, min(span.stop, chunk.stop))  # equal to start where the chunk has none of this sampler
            in_chunk = logits[start - chunk.start : stop - chunk.start]
            part = sampler.sample(
                in_chunk, uniform[start:stop], known[start:stop], with_entropy=with_entropy, candidates=candidates
            )
            parts.append(part)
        return Samples(*map(torch.cat, zip(*parts, strict=True)))

    cache_rows = None
    if sequences[0].cache_plan.uses_cache:
        cache_rows = [sequence.acquire(model) for sequence in sequences]
    length = batch.tokens.shape[1]
    prompt_ends = [length - len(sequence.tokens) + sequence.first_hole for sequence in sequences]
    results = model.score(
        batch.tokens,
        valid=batch.valid,
        prompt_ends=torch.tensor(prompt_ends),
        feed=batch.feed,
        wanted=wanted,
        reduce=sample,
        cache_rows=cache_rows,
        reference=sequences[0].sampler.reference,
    )
    return wanted, Samples(*results)


def _limits(sequences: list[Sequence], open_: Tensor) -> tuple[Tensor, Tensor | None]:
    """The rows (R, T) of masks (K, V) of the ids that may be proposed; the first mask allows all. None: no limits."""
    which = torch.zeros_like(open_, dtype=torch.long)
    masks: list[Tensor] = []
    count = 1
    for row, sequence in enumerate(sequences):
        limits = None
        if sequence.constraint is not None:
            limits = sequence.constraint.limits(sequence)
        if limits is not None:
            limited = open_[row, -len(sequence.tokens) :] & (limits.which >= 0)
            which[row, -len(sequence.tokens) :] = (limits.which + count).masked_fill(~limited, 0)
            masks.append(limits.masks)
            count += len(limits.masks)
    return which, torch.cat([torch.ones_like(masks[0][:1]), *masks]) if masks else None


def _by_sampler(sequences: list[Sequence], scored: Tensor) -> tuple[Tensor, list[tuple[Sampler, range]]]:
    """The positions `scored` (R, T) as (row, position) pairs (M, 2) ordered by sampler, and which of the M each has."""
    pairs: list[Tensor] = []
    spans: list[tuple[Sampler, range]] = []
    count = 0
    for rows in _alike(sequence.sampler for sequence in sequences):
        of_sampler = torch.zeros_like(scored)
        of_sampler[rows] = scored[rows]
        pairs.append(of_sampler.nonzero())
        spans.append((sequences[rows[0]].sampler, range(count, count + len(pairs[-1]))))
        count += len(pairs[-1])
    return torch.cat(pairs), spans


def choose(sequences: list[Sequence], batch: Plan, proposals: Proposals) -> Tensor:
    """Return the open positions that each row commits by its order and rule: (R, T) bool."""
    chosen = torch.zeros_like(proposals.open)
    stable = torch.ones_like(chosen)
    ends = torch.zeros_like(chosen)
    for row, sequence in enumerate(sequences):
        proposed = proposals.tokens[row, -len(sequence.tokens) :]
        if sequence.params.stable:
            stable[row, -len(proposed) :] = sequence.stable(proposed)
        if sequence.params.end_last:
            ends[row, -len(proposed) :] = sequence.are_ends(proposed)
    due = torch.tensor([float(sequence.due()) for sequence in sequences])
    for rows in _alike((sequence.sampler.order, sequence.rule) for sequence in sequences):
        first = sequences[rows[0]]
        confidence = proposals.confidence[rows]
        priority = first.sampler.order.priority(confidence, batch.uniform[rows, :, 1])
        probability = proposals.log_prob[rows].exp()
        if ends[rows].any():
            priority = ends_last(priority, proposals.open[rows], ends[rows])
            confidence = ends_last(confidence, proposals.open[rows], ends[rows])
            probability = ends_last(probability, proposals.open[rows], ends[rows])
        rule_input = RuleInput(
            open=proposals.open[rows],
            priority=priority,
            confidence=confidence,
            probability=probability,
            due=due[rows],
            stable=stable[rows],
        )
        chosen[rows] = first.rule.commit(rule_input)
    return chosen
