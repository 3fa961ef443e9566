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
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffucoder.decoding.params import POLICIES, DecodingParams

MARGIN, ENTROPY = POLICIES.index("margin"), POLICIES.index("entropy")
COLDEST = 1e-6  # a lower temperature is the same argmax in fp32, but would overflow


class Needs(NamedTuple):
    """Which rows need a step: all (True), none (False) or some (None).

    Known on the host, so that nobody waits for the device to ask, and a compiled sampler has no branches.
    """

    released: bool | None
    tempered: bool | None
    nucleus: bool | None
    best_few: bool | None
    margin: bool | None
    entropy: bool | None
    most: int  # the largest top_k

    @classmethod
    def of(cls, params: Sequence[DecodingParams]) -> "Needs":
        """What rows sampled by `params` need."""

        def rows(need: Callable[[DecodingParams], bool]) -> bool | None:
            found = {need(p) for p in params}
            return found.pop() if len(found) == 1 else None

        return cls(
            released=rows(lambda p: p.preset == "reference"),
            tempered=rows(lambda p: p.temperature > 0),
            nucleus=rows(lambda p: p.top_p is not None and p.top_p < 1),
            best_few=rows(lambda p: p.top_k is not None),
            margin=rows(lambda p: p.policy == "margin"),
            entropy=rows(lambda p: p.policy == "entropy"),
            most=max(p.top_k or 0 for p in params),
        )


@dataclass(frozen=True)
class Rules:
    """How each of M rows is sampled."""

    reference: Tensor  # (M,) bool: the released arithmetic, in the logits' own dtype, instead of fp32
    policy: Tensor  # (M,) index into POLICIES
    temperature: Tensor  # (M,) fp32
    top_p: Tensor  # (M,) fp32, 1 = all
    top_k: Tensor  # (M,) int64, 0 = all
    barred: Tensor  # (M, K) ids never proposed
    needs: Needs

    @classmethod
    def of(cls, params: Sequence[DecodingParams], barred: Tensor) -> "Rules":
        """One row for each of `params`, at least one; `barred` (M, K) ids."""
        return cls(
            reference=torch.tensor([p.preset == "reference" for p in params]),
            policy=torch.tensor([POLICIES.index(p.policy) for p in params]),
            temperature=torch.tensor([p.temperature for p in params]),
            top_p=torch.tensor([1.0 if p.top_p is None else p.top_p for p in params]),
            top_k=torch.tensor([p.top_k or 0 for p in params]),
            barred=barred,
            needs=Needs.of(params),
        )

    def __getitem__(self, rows: Tensor | slice) -> "Rules":
        """Some of the rows; what some needed may then be needed by none or all."""
        if isinstance(rows, slice) and rows.indices(len(self.policy)) == (0, len(self.policy), 1):
            return self
        return self._each(lambda column: column[rows])

    def expand(self, rows: int) -> "Rules":
        """The one row that there is, for so many."""
        return self._each(lambda column: column.expand(rows, *column.shape[1:]))

    def to(self, device: torch.device) -> "Rules":
        """The same on the device of the logits."""
        if self.policy.device == device:
            return self
        return self._each(lambda column: column.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Rules":
        changed: dict[str, Any] = {f.name: change(getattr(self, f.name)) for f in fields(self) if f.name != "needs"}
        return replace(self, **changed)


def propose(
    logits: Tensor, rules: Rules, uniform: Tensor, *, proposable: int | None = None, given: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Propose a token for each row of `logits` (M, V): ids (M,) int64, confidence (M,) and log-probability (M,) fp32.

    `uniform` (M,) in [0, 1) decides for rows with a temperature. Ids from `proposable` on are not proposed, except by
    the reference, which knows of none. The log-probability is under the distribution the token was chosen from.
    Where `given` (M,) is not -1 that token takes the place of the proposal: how sure the model is of it.
    """
    released = rules.needs.released
    if released is None:  # two arithmetics: each kind by itself
        return _by_kind(logits, rules, uniform, proposable, given)
    logits = logits.to(logits.dtype if released else torch.float32, copy=True)  # (M, V), ours to change
    lowest = torch.finfo(logits.dtype).min
    logits.scatter_(1, rules.barred, lowest)
    if proposable is not None and not released:
        logits[:, proposable:] = lowest
    probabilities = _filtered(logits, rules).softmax(-1)  # (M, V)
    del logits  # as large, and nobody reads it any more
    tokens = _choose(probabilities, rules, uniform)
    if given is not None:
        tokens = given.where(given >= 0, tokens)
    chosen = probabilities.gather(1, tokens[:, None])[:, 0]  # (M,)
    return tokens, _confidence(probabilities, chosen, rules).float(), chosen.float().log()


def entropy(logits: Tensor, barred: Tensor, proposable: int | None = None) -> Tensor:
    """(M,) nats: how unsure the model itself is, whatever the temperature; ids that are never proposed left out.

    `logits` (M, V), `barred` (M, K) ids. So measured, temperatures can be compared; the confidence that a policy goes
    by is of the tempered and filtered distribution.
    """
    allowed = logits.float().scatter(1, barred, -torch.inf)[:, :proposable]
    return torch.special.entr(allowed.softmax(-1)).sum(-1)  # type: ignore[no-any-return]  # torch leaves it untyped


def _by_kind(
    logits: Tensor, rules: Rules, uniform: Tensor, proposable: int | None, given: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`propose` for rows of which some go by the released arithmetic."""
    parts, kinds = [], []
    for released in (True, False):
        rows = (rules.reference == released).nonzero()[:, 0]
        own = replace(rules[rows], needs=rules.needs._replace(released=released))
        there = None if given is None else given[rows]
        parts.append(propose(logits[rows], own, uniform[rows], proposable=proposable, given=there))
        kinds.append(rows)
    home = torch.cat(kinds).argsort()
    tokens, confidence, log_prob = (torch.cat(pair)[home] for pair in zip(*parts, strict=True))
    return tokens, confidence, log_prob


def _filtered(logits: Tensor, rules: Rules) -> Tensor:
    """Temper and filter `logits` (M, V) by each row's rules."""
    needs = rules.needs

    def temper(rows: Tensor | slice, some: Tensor) -> Tensor:
        return (some.float() / rules.temperature[rows, None].clamp(min=COLDEST)).to(some.dtype)

    def top_p(rows: Tensor | slice, some: Tensor) -> Tensor:
        return keep_top_p(some, rules.top_p[rows, None])

    def top_k(rows: Tensor | slice, some: Tensor) -> Tensor:
        return keep_top_k(some, rules.top_k[rows, None], needs.most)

    logits = _where(needs.tempered, rules.temperature > 0, logits, temper)
    logits = _where(needs.nucleus, rules.top_p < 1, logits, top_p)
    return _where(needs.best_few, rules.top_k > 0, logits, top_k)


def keep_top_p(logits: Tensor, p: Tensor) -> Tensor:
    """Drop from `logits` (M, V) what lies beyond cumulative probability `p` (M, 1); the crossing token stays."""
    ordered, ids = logits.sort(-1, descending=True)
    dropped = ordered.softmax(-1).cumsum(-1) > p.to(logits.dtype)  # (M, V), by rank
    dropped = torch.nn.functional.pad(dropped[:, :-1], (1, 0))  # one later: the crossing token, and always the first
    return logits.masked_fill(dropped.scatter(1, ids, dropped), torch.finfo(logits.dtype).min)


def keep_top_k(logits: Tensor, k: Tensor, most: int) -> Tensor:
    """Drop from `logits` (M, V) what lies below the `k`-th value (M, 1), `most` being the largest; ties stay."""
    most = min(most, logits.shape[1])
    least = logits.topk(most, -1).values.gather(1, k.clamp(max=most) - 1)  # (M, 1)
    return logits.masked_fill(logits < least, torch.finfo(logits.dtype).min)


def _choose(probabilities: Tensor, rules: Rules, uniform: Tensor) -> Tensor:
    """(M,) the likeliest token, or one drawn by inverse CDF where there is a temperature."""

    def draw(rows: Tensor | slice, likeliest: Tensor) -> Tensor:
        some = probabilities[rows]
        cdf = some.float().cumsum(-1)
        target = uniform[rows, None] * cdf[:, -1:]  # below the total, since uniform <= 1 - 2**-24
        draws = torch.searchsorted(cdf, target, right=True).clamp_(max=cdf.shape[1] - 1)  # (m, 1)
        # a parallel cumsum may round upwards over an impossible token: never let that one through
        impossible = some.gather(1, draws) == 0
        return torch.where(impossible[:, 0], likeliest, draws[:, 0])

    return _where(rules.needs.tempered, rules.temperature > 0, probabilities.argmax(-1), draw)


def _confidence(probabilities: Tensor, chosen: Tensor, rules: Rules) -> Tensor:
    """(M,) how sure each row is, by its policy; larger is surer. `chosen` (M,) is the probability of its token."""

    def margin(rows: Tensor | slice, _: Tensor) -> Tensor:
        best = probabilities[rows].topk(2, -1).values  # (m, 2)
        return best[:, 0] - best[:, 1]

    def negative_entropy(rows: Tensor | slice, _: Tensor) -> Tensor:
        some = probabilities[rows]
        return (some + 1e-10).log_().mul_(some).sum(-1)  # as released

    confidence = _where(rules.needs.margin, rules.policy == MARGIN, chosen.clone(), margin)
    return _where(rules.needs.entropy, rules.policy == ENTROPY, confidence, negative_entropy)


def _where(
    needed: bool | None, rows: Tensor, values: Tensor, change: Callable[[Tensor | slice, Tensor], Tensor]
) -> Tensor:
    """`values` (M, ...) with `change(rows, values[rows])` in those `rows` (M,) bool, of which it is known whether any.

    In place where they are some; without a copy where they are all.
    """
    if needed is False:
        return values
    if needed:
        return change(slice(None), values)
    if rows.any():
        values[rows] = change(rows, values[rows])
    return values
