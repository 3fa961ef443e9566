"""Sampling: logits of masked positions → a proposed token for each, how sure it is, and its log-probability.

For: everything that needs the vocabulary axis; it runs in chunks within the forward pass (`Denoiser`'s `reduce`), so
that logits of a whole canvas never exist. Not for: which proposals are committed (`policies`).

Each of M rows, one a masked position, has its own settings (`Rules`); none depends on its neighbours, and a step that
only some rows need (sorting for top-p above all) touches only those. The order of operations is the release's:
bar ids, temperature, top-p, top-k, softmax, proposal, confidence. Confidence is thus judged after tempering and
filtering, which is how temperature changes the order of generation.

Randomness is an argument: one uniform number a row, turned into a token by the inverse of the cumulative distribution.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from diffucoder.decoding.params import POLICIES, DecodingParams

MARGIN, ENTROPY = POLICIES.index("margin"), POLICIES.index("entropy")
COLDEST = 1e-6  # a lower temperature is the same argmax in fp32, but would overflow


@dataclass(frozen=True)
class Rules:
    """How each of M rows is sampled. On the CPU: asking whether any row needs a step must not wait for the device."""

    reference: Tensor  # (M,) bool: the released arithmetic, in the logits' own dtype, instead of fp32
    policy: Tensor  # (M,) index into POLICIES
    temperature: Tensor  # (M,) fp32
    top_p: Tensor  # (M,) fp32, 1 = all
    top_k: Tensor  # (M,) int64, 0 = all
    barred: Tensor  # (M, K) ids never proposed

    @classmethod
    def of(cls, params: Sequence[DecodingParams], barred: Tensor) -> "Rules":
        """One row for each of `params`; `barred` (M, K) ids."""
        return cls(
            reference=torch.tensor([p.preset == "reference" for p in params]),
            policy=torch.tensor([POLICIES.index(p.policy) for p in params]),
            temperature=torch.tensor([p.temperature for p in params]),
            top_p=torch.tensor([1.0 if p.top_p is None else p.top_p for p in params]),
            top_k=torch.tensor([p.top_k or 0 for p in params]),
            barred=barred,
        )

    def __getitem__(self, rows: Tensor | slice) -> "Rules":
        return Rules(*(getattr(self, field.name)[rows] for field in fields(self)))


def propose(
    logits: Tensor, rules: Rules, uniform: Tensor, *, proposable: int | None = None, given: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Propose a token for each row of `logits` (M, V): ids (M,) int64, confidence (M,) and log-probability (M,) fp32.

    `uniform` (M,) in [0, 1) decides for rows with a temperature. Ids from `proposable` on are not proposed, except by
    the reference, which knows of none. The log-probability is under the distribution the token was chosen from.
    Where `given` (M,) is not -1 that token takes the place of the proposal: how sure the model is of it.
    """
    if rules.reference.any() and not rules.reference.all():  # two arithmetics: each kind by itself
        kinds = [rows.nonzero()[:, 0] for rows in (rules.reference, ~rules.reference)]
        parts = [
            propose(
                logits[rows],
                rules[rows],
                uniform[rows],
                proposable=proposable,
                given=None if given is None else given[rows],
            )
            for rows in kinds
        ]
        home = torch.cat(kinds).argsort().to(logits.device)
        tokens, confidence, log_prob = (torch.cat(pair)[home] for pair in zip(*parts, strict=True))
        return tokens, confidence, log_prob
    released = bool(rules.reference.any())
    logits = logits.to(logits.dtype if released else torch.float32, copy=True)  # (M, V), ours to change
    lowest = torch.finfo(logits.dtype).min
    logits.scatter_(1, rules.barred.to(logits.device), lowest)
    if proposable is not None and not released:
        logits[:, proposable:] = lowest
    probabilities = _filtered(logits, rules).softmax(-1)  # (M, V)
    tokens = _choose(probabilities, rules, uniform)
    if given is not None:
        given = given.to(tokens.device)
        tokens = given.where(given >= 0, tokens)
    chosen = probabilities.gather(1, tokens[:, None])[:, 0]  # (M,)
    return tokens, _confidence(probabilities, chosen, rules).float(), chosen.float().log()


def _filtered(logits: Tensor, rules: Rules) -> Tensor:
    """Temper and filter `logits` (M, V) by each row's rules."""

    def temper(rows: Tensor, some: Tensor) -> Tensor:
        return some.float().div_(_column(rules.temperature[rows].clamp(min=COLDEST), some)).to(some.dtype)

    def top_p(rows: Tensor, some: Tensor) -> Tensor:
        return keep_top_p(some, _column(rules.top_p[rows], some))

    def top_k(rows: Tensor, some: Tensor) -> Tensor:
        return keep_top_k(some, _column(rules.top_k[rows], some))

    logits = _where(rules.temperature > 0, logits, temper)
    logits = _where(rules.top_p < 1, logits, top_p)
    return _where(rules.top_k > 0, logits, top_k)


def keep_top_p(logits: Tensor, p: Tensor) -> Tensor:
    """Drop from `logits` (M, V) what lies beyond cumulative probability `p` (M, 1); the crossing token stays."""
    ordered, ids = logits.sort(-1, descending=True)
    dropped = ordered.softmax(-1).cumsum(-1) > p.to(logits.dtype)  # (M, V), by rank
    dropped = torch.nn.functional.pad(dropped[:, :-1], (1, 0))  # one later: the crossing token, and always the first
    return logits.masked_fill(dropped.scatter(1, ids, dropped), torch.finfo(logits.dtype).min)


def keep_top_k(logits: Tensor, k: Tensor) -> Tensor:
    """Drop from `logits` (M, V) what lies below the `k`-th value (M, 1); ties with it stay."""
    k = k.clamp(max=logits.shape[1])
    least = logits.topk(int(k.max()), -1).values.gather(1, k - 1)  # (M, 1)
    return logits.masked_fill(logits < least, torch.finfo(logits.dtype).min)


def _choose(probabilities: Tensor, rules: Rules, uniform: Tensor) -> Tensor:
    """(M,) the likeliest token, or one drawn by inverse CDF where there is a temperature."""
    tokens = probabilities.argmax(-1)
    drawn = rules.temperature > 0  # (M,)
    if not drawn.any():
        return tokens
    some = _rows(probabilities, drawn)
    cdf = some.float().cumsum(-1)
    target = _column(uniform[drawn], some) * cdf[:, -1:]  # below the total, since uniform <= 1 - 2**-24
    draws = torch.searchsorted(cdf, target, right=True).clamp_(max=cdf.shape[1] - 1)  # (m, 1)
    # a parallel cumsum may round upwards over an impossible token: never let that one through
    impossible = some.gather(1, draws) == 0
    tokens[drawn] = torch.where(impossible[:, 0], tokens[drawn], draws[:, 0])
    return tokens


def _confidence(probabilities: Tensor, chosen: Tensor, rules: Rules) -> Tensor:
    """(M,) how sure each row is, by its policy; larger is surer. `chosen` (M,) is the probability of its token."""
    confidence = chosen.clone()
    margin, entropy = rules.policy == MARGIN, rules.policy == ENTROPY
    if margin.any():
        best = _rows(probabilities, margin).topk(2, -1).values  # (m, 2)
        confidence[margin] = best[:, 0] - best[:, 1]
    if entropy.any():
        some = _rows(probabilities, entropy)
        confidence[entropy] = (some + 1e-10).log_().mul_(some).sum(-1)  # negative entropy, as released
    return confidence


def _where(rows: Tensor, logits: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`logits` (M, V) with `change(rows, logits[rows])` in those `rows` (M,) bool; in place where they are some."""
    if not rows.any():
        return logits
    if rows.all():
        return change(rows, logits)
    logits[rows] = change(rows, logits[rows])
    return logits


def _rows(matrix: Tensor, rows: Tensor) -> Tensor:
    """`matrix[rows]`, without a copy where that is all of it."""
    return matrix if rows.all() else matrix[rows]


def _column(values: Tensor, like: Tensor) -> Tensor:
    """(M,) on the CPU → (M, 1) on the device of `like`."""
    return values.to(like.device)[:, None]
