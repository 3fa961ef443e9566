"""The decoding step: `advance`, the only one there is, and `denoise`, which loops over it.

For: turning sequences, or a canvas, into a stream of `Step`s that everyone reads (text, page, report, rollout, server).
Not for: what belongs to one request (`sequence`), or text (`coder`).

A step has four parts. Each sequence *plans* which positions the pass is fed (`caching`). The pass gives *proposals* for
every open position (`sampling`). Order and rule *choose* what to commit (`policies`). Each sequence *applies* that to
itself, where a constraint may veto and a verifier may take back (`constraints`).

`advance` takes any mix of sequences (lengths, ages, settings) and spends one forward pass, so a sequence comes out the
same alone and in company, up to the rounding of matrix products, which differ in shape. What needs the vocabulary runs
where the model is; everything of shape (R, T), R rows of T positions, is on the host.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Sequences
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diffucoder.decoding.canvas import Canvas
from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.policies import Candidates
from diffucoder.decoding.sampling import Samples
from diffucoder.decoding.sequence import Proposals, Sequence, Step, Until
from diffucoder.errors import PromptError
from diffucoder.models.denoiser import Denoiser

__all__ = ["Sequence", "Step", "Until", "advance", "decode", "denoise"]


@torch.no_grad()
def advance(model: Denoiser, sequences: Sequences[Sequence]) -> list[Step]:
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


def decode(model: Denoiser, sequences: Sequences[Sequence]) -> Iterator[list[tuple[int, Step]]]:
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
        yield Step(index, tokens, committed, revoked, confidence, index + 1, log_prob, entropy)


# --- one pass --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Batch:
    """The R sequences of a pass, left-padded to T positions."""

    sequences: Sequences[Sequence]
    tokens: Tensor  # (R, T)
    valid: Tensor  # (R, T) bool
    feed: Tensor  # (R, T) bool: what the model is fed
    open: Tensor  # (R, T) bool: masks that may be committed
    verified: Tensor  # (R, T) bool: committed tokens that are scored again
    uniform: Tensor  # (2, R, T) random numbers, for tokens and for the order

    @classmethod
    def of(cls, sequences: Sequences[Sequence], model: Denoiser) -> "Batch":
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

    def kinds(self) -> list[list[int]]:
        """Rows that share a call of the model: released arithmetic, with a cache, without."""
        kinds: dict[tuple[bool, bool], list[int]] = {}
        for row, sequence in enumerate(self.sequences):
            kinds.setdefault((sequence.released, sequence.cache_plan.keeps), []).append(row)
        return list(kinds.values())


def _padded(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_side="left")


def propose(model: Denoiser, batch: Batch) -> Proposals:
    """Show the batch to the model, and collect the proposals of all positions that are open or verified."""
    shape = batch.tokens.shape
    wanted = max((s.constraint.candidates for s in batch.sequences if s.constraint is not None), default=0)
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
    for rows in batch.kinds():
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
    scored = batch.open[rows] | batch.verified[rows]  # (r, T)
    parts = []
    samplers = []
    end = 0
    for sampler in dict.fromkeys(sequence.sampler for sequence in sequences):  # positions with one sampler together
        same = torch.tensor([sequence.sampler == sampler for sequence in sequences])
        part = (scored & same[:, None]).nonzero()
        samplers.append((sampler, end, end + len(part)))
        end += len(part)
        parts.append(part)
    where = torch.cat(parts)  # (M, 2)
    at = tuple(where.T)
    known = batch.tokens[rows].masked_fill(batch.open[rows], -1)[at].to(model.device)  # (M,)
    uniform = batch.uniform[0, rows][at].to(model.device)  # (M,)
    with_entropy = any(sequence.wants_entropy for sequence in sequences)

    def sample(logits: Tensor, chunk: slice) -> Samples:
        parts = []
        for sampler, start, end in samplers:
            here = slice(max(start, chunk.start), min(end, chunk.stop))
            if here.start < here.stop or not len(where):
                own = logits[here.start - chunk.start : max(here.start, here.stop) - chunk.start]
                parts.append(
                    sampler.sample(own, uniform[here], known[here], with_entropy=with_entropy, candidates=candidates)
                )
        return Samples(*map(torch.cat, zip(*parts, strict=True)))

    cache_rows = None
    if sequences[0].cache_plan.keeps:
        cache_rows = [sequence.acquire(model) for sequence in sequences]
    results = model.score(
        batch.tokens[rows],
        valid=batch.valid[rows],
        feed=batch.feed[rows],
        wanted=where,
        reduce=sample,
        cache_rows=cache_rows,
        released=sequences[0].released,
    )
    samples = Samples(*(column.cpu() for column in results))
    return torch.stack([torch.tensor(rows)[where[:, 0]], where[:, 1]], -1), samples


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
        candidates = Candidates(
            open=proposals.open[rows],
            priority=first.order.priority(confidence, batch.uniform[1, rows]),
            confidence=confidence,
            probability=proposals.log_prob[rows].exp(),
            due=due[rows],
        )
        chosen[rows] = first.rule.commit(candidates)
    return chosen
