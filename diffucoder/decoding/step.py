"""The decoding step: `advance`, the only one there is, and `denoise`, which loops over it.

For: turning sequences, or a canvas, into a stream of `Step`s that everyone reads (text, page, report, rollout, server).
Not for: what belongs to one request (`sequence`), or text (`coder`).

A step has four parts. Each sequence *plans* which positions the pass is fed (`caching`). The pass gives *proposals* for
every open position (`sampling`). Order and rule *choose* what to commit (`policies`). Each sequence *applies* that to
itself, where a constraint may veto and a verifier may take back (`constraints`).

`advance` takes any mix of sequences (lengths, ages, settings) and spends one forward pass, so a sequence comes out the
same alone and in company, up to the rounding of matrix products, which differ in shape. Tensors with a vocabulary axis
are on the model's device; everything of shape (R, T), R rows of T positions, is on the host.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diffucoder.decoding.canvas import Canvas
from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.policies import RuleInput
from diffucoder.decoding.sampling import Sampler, Samples
from diffucoder.decoding.sequence import Proposals, Sequence, Step, Until
from diffucoder.errors import PromptError
from diffucoder.models.denoiser import Denoiser

__all__ = ["Sequence", "Step", "Until", "advance", "decode", "denoise"]


@torch.no_grad()
def advance(model: Denoiser, sequences: list[Sequence]) -> list[Step]:
    """One pass for `sequences`, none of them finished; a Step of (1, own length) for each."""
    assert all(sequence.finish_reason is None for sequence in sequences), "a finished sequence has nothing to advance"
    batch = Batch.of(sequences, model)
    proposals = propose(model, batch)
    chosen = choose(batch, proposals)  # (R, T)
    steps = []
    for row, sequence in enumerate(sequences):
        length = len(sequence.tokens)
        steps.append(sequence.apply(proposals.of(row, length), chosen[row, -length:]))
    return steps


def decode(model: Denoiser, sequences: list[Sequence]) -> Iterator[list[tuple[int, Step]]]:
    """Advance all sequences until they are finished. After each pass: which ones it advanced, and their Steps."""
    try:
        while True:
            going = [index for index, sequence in enumerate(sequences) if sequence.finish_reason is None]
            if not going:
                return
            steps = advance(model, [sequences[index] for index in going])
            yield list(zip(going, steps, strict=True))
    finally:
        for sequence in sequences:
            sequence.release()


def denoise(
    model: Denoiser, canvas: Canvas, params: DecodingParams, *, until: Until | None = None, entropies: int = 0
) -> Iterator[Step]:
    """Fill in a canvas, step by step, until every row is finished; finished rows cost nothing and stay as they are.

    Steps have the canvas's own shape and padding, with `params.num_samples` consecutive rows for each of its rows.
    `until` may end any row early; what is still masked there is filled with the canvas's `pad_id`. The first
    `entropies` steps also have the entropy of every position that may be committed (`sampling.entropy`).
    """
    if canvas.mask_id != model.mask_id:
        raise PromptError(
            f"the canvas marks holes with {canvas.mask_id}, the model with {model.mask_id}; use the model's"
        )
    canvas.check_scorable(model.first_scorable)
    canvas = canvas.repeat(params.num_samples)
    rows = range(len(canvas.tokens))
    sequences = [Sequence(canvas, params, row=row, until=until, entropies=entropies) for row in rows]
    tokens = canvas.tokens
    nothing = torch.zeros_like(tokens, dtype=torch.float32)
    for index, steps in enumerate(decode(model, sequences)):
        tokens = tokens.clone()
        committed = nothing.bool()
        confidence = nothing.clone()
        log_prob = nothing.clone()
        revoked = nothing.bool() if params.revoke else None
        entropy = torch.full_like(nothing, torch.nan) if index < entropies else None
        for row, step in steps:
            own = slice(tokens.shape[1] - step.canvas.shape[1], None)  # without padding
            tokens[row, own] = step.canvas[0].to(tokens.device)
            committed[row, own] = step.committed[0].to(tokens.device)
            confidence[row, own] = step.confidence[0].to(tokens.device)
            log_prob[row, own] = step.log_prob[0].to(tokens.device)
            if revoked is not None and step.revoked is not None:
                revoked[row, own] = step.revoked[0].to(tokens.device)
            if entropy is not None and step.entropy is not None:
                entropy[row, own] = step.entropy[0].to(tokens.device)
        yield Step(
            index=index,
            canvas=tokens,
            committed=committed,
            revoked=revoked,
            confidence=confidence,
            forward_passes=index + 1,
            log_prob=log_prob,
            entropy=entropy,
        )


# --- one pass --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Batch:
    """The R sequences of a pass, left-padded to T positions."""

    sequences: list[Sequence]
    tokens: Tensor  # (R, T)
    valid: Tensor  # (R, T) bool
    feed: Tensor  # (R, T) bool: what the model is fed
    open: Tensor  # (R, T) bool: masked positions that may be filled now
    verified: Tensor  # (R, T) bool: committed tokens that are scored again
    uniform: Tensor  # (2, R, T) random numbers, for tokens and for the order

    @classmethod
    def of(cls, sequences: list[Sequence], model: Denoiser) -> "Batch":
        """Lay out what `sequences` bring to a pass."""
        feeds = [sequence.cache_plan.feed(sequence, model) for sequence in sequences]
        opens = []
        verifications = []
        for sequence, fed in zip(sequences, feeds, strict=True):
            scorable = model.scorable(fed)
            start, end = sequence.block_bounds()
            open_ = torch.zeros_like(scorable)
            open_[start:end] = (sequence.masked & scorable)[start:end]
            verify = torch.zeros_like(scorable)
            if sequence.verifier is not None:
                verify = sequence.verifier.verify(sequence) & ~sequence.masked & scorable
            opens.append(open_)
            verifications.append(verify)
        return cls(
            sequences,
            tokens=_padded([sequence.tokens for sequence in sequences]),
            valid=_padded([torch.ones_like(sequence.holes) for sequence in sequences]),
            feed=_padded(feeds),
            open=_padded(opens),
            verified=_padded(verifications),
            uniform=_padded([sequence.uniform.T for sequence in sequences]).permute(2, 0, 1),
        )

    def rows_by_call(self) -> list[list[int]]:
        """Rows that share a call of the model: the released code's arithmetic, with a cache, without."""
        calls: dict[tuple[bool, bool], list[int]] = {}
        for row, sequence in enumerate(self.sequences):
            calls.setdefault((sequence.as_reference, sequence.cache_plan.uses_cache), []).append(row)
        return list(calls.values())

    def top_tokens(self) -> int:
        """How many of the most probable tokens of a position rules and constraints look at."""
        wanted = 0
        for sequence in self.sequences:
            wanted = max(wanted, sequence.rule.top_tokens)
            if sequence.constraint is not None:
                wanted = max(wanted, sequence.constraint.candidates)
        return wanted


def _padded(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_side="left")


def propose(model: Denoiser, batch: Batch) -> Proposals:
    """Show the batch to the model, and collect the proposals of all positions that are open or verified."""
    shape = batch.tokens.shape
    wanted = batch.top_tokens()
    proposals = Proposals(
        open=batch.open,
        verified=batch.verified,
        tokens=batch.tokens.clone(),
        confidence=torch.zeros(shape),
        log_prob=torch.zeros(shape),
        entropy=torch.full(shape, torch.nan),
        candidates=torch.zeros(*shape, wanted, dtype=torch.long),
        candidate_log_probs=torch.zeros(*shape, wanted),
    )
    for rows in batch.rows_by_call():
        position, samples = _score(model, batch, rows, wanted)
        at = tuple(position.T)
        proposals.tokens[at] = samples.tokens
        proposals.confidence[at] = samples.confidence
        proposals.log_prob[at] = samples.log_prob
        proposals.entropy[at] = samples.entropy.where(batch.open[at], torch.nan)
        proposals.candidates[at] = samples.candidates
        proposals.candidate_log_probs[at] = samples.candidate_log_probs
    return proposals


def _score(model: Denoiser, batch: Batch, rows: list[int], candidates: int) -> tuple[Tensor, Samples]:
    """One call for some rows of a batch: the (row, position) pairs (M, 2) that it scores, and their samples."""
    sequences = [batch.sequences[row] for row in rows]
    where, spans = _by_sampler(sequences, batch.open[rows] | batch.verified[rows])
    at = tuple(where.T)
    given = batch.tokens[rows].masked_fill(batch.open[rows], -1)[at].to(model.device)  # (M,) -1: to be proposed
    uniform = batch.uniform[0, rows][at].to(model.device)  # (M,)
    with_entropy = any(sequence.wants_entropy for sequence in sequences)

    def sample(logits: Tensor, chunk: slice) -> Samples:
        parts = []
        for sampler, span in spans:
            start = max(span.start, chunk.start)
            stop = min(span.stop, chunk.stop)
            if start < stop or not len(where):  # no position at all is still one, empty, chunk
                here = slice(start, stop)
                own = logits[start - chunk.start : stop - chunk.start]
                parts.append(
                    sampler.sample(own, uniform[here], given[here], with_entropy=with_entropy, candidates=candidates)
                )
        return Samples(*map(torch.cat, zip(*parts, strict=True)))

    cache_rows = None
    if sequences[0].cache_plan.uses_cache:
        cache_rows = [sequence.acquire(model) for sequence in sequences]
    results = model.score(
        batch.tokens[rows],
        valid=batch.valid[rows],
        feed=batch.feed[rows],
        wanted=where,
        reduce=sample,
        cache_rows=cache_rows,
        reference=sequences[0].as_reference,
    )
    samples = Samples(*(column.cpu() for column in results))
    return torch.stack([torch.tensor(rows)[where[:, 0]], where[:, 1]], -1), samples


def _by_sampler(sequences: list[Sequence], scored: Tensor) -> tuple[Tensor, list[tuple[Sampler, range]]]:
    """The positions `scored` (r, T) as (row, position) pairs (M, 2), and which of the M each sampler has.

    Positions of sequences with equal samplers are next to each other, so that they are sampled in one go.
    """
    pairs: list[Tensor] = []
    spans: list[tuple[Sampler, range]] = []
    count = 0
    for sampler in dict.fromkeys(sequence.sampler for sequence in sequences):
        same = torch.tensor([sequence.sampler == sampler for sequence in sequences])
        pairs.append((scored & same[:, None]).nonzero())
        spans.append((sampler, range(count, count + len(pairs[-1]))))
        count += len(pairs[-1])
    return torch.cat(pairs), spans


# --- what a step commits ---------------------------------------------------------------------------------------------


def choose(batch: Batch, proposals: Proposals) -> Tensor:
    """The open positions that each row commits, by its order and rule: (R, T) bool."""
    chosen = torch.zeros_like(proposals.open)
    due = torch.tensor([float(sequence.due()) for sequence in batch.sequences])
    alike: dict[object, list[int]] = {}
    for row, sequence in enumerate(batch.sequences):
        alike.setdefault((sequence.order, sequence.rule), []).append(row)
    for rows in alike.values():
        first = batch.sequences[rows[0]]
        confidence = proposals.confidence[rows]
        given = RuleInput(
            open=proposals.open[rows],
            priority=first.order.priority(confidence, batch.uniform[1, rows]),
            confidence=confidence,
            probability=proposals.log_prob[rows].exp(),
            due=due[rows],
            top_probabilities=proposals.candidate_log_probs[rows].exp(),
        )
        chosen[rows] = first.rule.commit(given)
    return chosen
