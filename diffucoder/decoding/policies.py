"""Policies: the order in which masked positions are committed, and how many in each step.

Pure functions of (R, T) tensors, R rows of T positions. A *schedule* says how many tokens are due at each step. An
*order* gives each position a priority. A *rule* commits the tokens that are due in that order, and may commit others
that the model is confident of. To add an order: a class, an entry in `ORDERS`, a name in `params`. To add a rule: a
frozen dataclass, a line in `rule_of`, a setting in `params` and in its `_RULES`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffucoder.decoding.params import DecodingParams

# --- schedules -------------------------------------------------------------------------------------------------------


class Quotas:
    """Equal counts that add up to `masked`, with the remainder in the first steps; at least one in each step."""

    def __init__(self, masked: int, steps: int | None) -> None:
        self.masked = masked
        self.steps = min(steps or masked, masked)

    def due(self, step: int, left: int) -> float:
        """Return how many of the `left` masks `step` must commit to reach the count of the schedule."""
        done = step + 1
        scheduled = self.masked // self.steps * done + min(done, self.masked % self.steps)
        return max(1, min(scheduled, self.masked) - (self.masked - left))


class ReleasedShares:
    """Shares of the remaining masks, as released: 1 - s/t on a time grid from 1 to `eps`; in the last step, all."""

    def __init__(self, masked: int, steps: int | None, eps: float, *, independent: bool) -> None:
        """`independent`: commit each mask with this probability, instead of this share of the masks."""
        self.steps = steps or max(masked, 1)
        self.independent = independent
        time = torch.linspace(1, eps, self.steps + 1)
        self.shares = 1 - time[1:] / time[:-1]  # (steps,)
        self.shares[-1] = 1

    def due(self, step: int, left: int) -> float:
        """Return the probability for each of the `left` masks at `step`, or how many of them it must commit."""
        share = self.shares[step]
        return float(share) if self.independent else float((share * left).floor())


Schedule = Quotas | ReleasedShares


def schedule_of(params: DecodingParams, masked: int) -> Schedule:
    """Return the schedule of `params` for a row with this number of masks."""
    if params.preset == "reference":
        return ReleasedShares(masked, params.steps, params.eps, independent=params.policy == "random")
    return Quotas(masked, params.steps)


# --- orders ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """The most probable token goes first. Base of all orders."""

    temperature: float = 0.0

    def confidence(self, probabilities: Tensor, chosen: Tensor) -> Tensor:
        """Return the confidence (M,), given `probabilities` (M, V) and those of the `chosen` tokens, (M,)."""
        return chosen

    def priority(self, confidence: Tensor, uniform: Tensor) -> Tensor:
        """Return (R, T), where larger goes first, from `confidence` and random numbers in [0, 1), (R, T) each."""
        if not self.temperature:
            return confidence
        return confidence / self.temperature + gumbel(uniform)


class MarginOrder(Order):
    """The position with the widest gap between its two most probable tokens goes first."""

    def confidence(self, probabilities: Tensor, chosen: Tensor) -> Tensor:
        best = probabilities.topk(2, -1).values
        return best[:, 0] - best[:, 1]


class EntropyOrder(Order):
    """The lowest entropy goes first. Confidence is the negative entropy in nats, computed as in the released code."""

    def confidence(self, probabilities: Tensor, chosen: Tensor) -> Tensor:
        return (probabilities + 1e-10).log_().mul_(probabilities).sum(-1)


class RandomOrder(Order):
    """Positions go in random order."""

    def priority(self, confidence: Tensor, uniform: Tensor) -> Tensor:
        return uniform


ORDERS = {"random": RandomOrder, "max_prob": Order, "margin": MarginOrder, "entropy": EntropyOrder}


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise from uniform numbers in [0, 1).

    The n largest of `score + gumbel` are n draws without replacement from softmax(score) (Vieira 2014).
    """
    return -(-uniform.clamp(min=torch.finfo(uniform.dtype).tiny).log()).log()


def ends_last(values: Tensor, open_: Tensor, ends: Tensor) -> Tensor:
    """Lower the `values` (R, T) of open positions that propose an end to the least of the open ones before them.

    Ties go to the left, so an order or rule then takes the end only after, or together with, all of these.
    """
    least = values.masked_fill(~open_, torch.inf).cummin(-1).values  # (R, T), with the position itself
    return least.where(open_ & ends, values)


# --- rules -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RuleInput:
    """Input of a rule: R rows of T positions."""

    open: Tensor  # (R, T) bool: positions that may be committed now
    priority: Tensor  # (R, T) by the order
    confidence: Tensor  # (R, T) by the order, without its noise
    probability: Tensor  # (R, T) of the proposed tokens
    due: Tensor  # (R,) by the schedule: a count, or a probability for each mask
    stable: Tensor  # (R, T) bool: positions that may be committed beyond the schedule


@dataclass(frozen=True)
class Rule:
    """Commit the tokens that are due, by priority. Base of all rules. Sequences with equal rules share a call."""

    def commit(self, given: RuleInput) -> Tensor:
        """Return the positions to commit, (R, T) bool, a part of the open ones."""
        return highest(given.priority, given.open, given.due) | (given.open & given.stable & self.also(given))

    def also(self, given: RuleInput) -> Tensor:
        """Return (R, T) bool: positions to commit beyond the schedule, if they are open."""
        return torch.zeros_like(given.open)


@dataclass(frozen=True)
class ThresholdRule(Rule):
    """Also commit every token of at least this probability, or this confidence (Fast-dLLM's threshold)."""

    least: float
    by_confidence: bool

    def also(self, given: RuleInput) -> Tensor:
        value = given.confidence if self.by_confidence else given.probability
        return value >= self.least


@dataclass(frozen=True)
class FactorRule(Rule):
    """Also commit the n most probable tokens of each row, for the largest n with (n + 1)(1 - p of the nth) < `factor`.

    Fast-dLLM (arXiv 2505.22618, §3.3).
    """

    factor: float

    def also(self, given: RuleInput) -> Tensor:
        ordered = given.probability.masked_fill(~given.open, -1).sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(1, given.open.shape[1] + 1)  # (T,)
        fits = (rank + 1) * (1 - ordered.values) < self.factor  # (R, T) by rank; closed positions have 1 - p = 2
        most = (fits * rank).amax(-1, keepdim=True)  # (R, 1)
        return torch.zeros_like(given.open).scatter(1, ordered.indices, rank <= most)


@dataclass(frozen=True)
class EntropyBoundRule(Rule):
    """Also commit the tokens of lowest entropy in each row while their sum, without the largest, is at most `bound`.

    The entropy-bounded sampler (arXiv 2505.24857): the sum bounds the error of treating tokens as independent.
    """

    bound: float

    def also(self, given: RuleInput) -> Tensor:
        ordered = (-given.confidence).masked_fill(~given.open, torch.inf).sort(dim=-1, stable=True)  # (R, T) by rank
        before = ordered.values.cumsum(-1).roll(1, -1)  # (R, T) sum of those before; the first has none
        before[:, 0] = 0
        return torch.zeros_like(given.open).scatter(1, ordered.indices, before <= self.bound)


@dataclass(frozen=True)
class ReleasedRule(Rule):
    """Commit the tokens that are due, with ties broken by `torch.topk`, as released. Ties are common in bf16."""

    def commit(self, given: RuleInput) -> Tensor:
        priority = given.priority.masked_fill(~given.open, -torch.inf)
        committed = torch.zeros_like(given.open)
        for row, due in enumerate(given.due.long().tolist()):
            committed[row, priority[row].topk(due).indices] = True
        return committed & given.open


@dataclass(frozen=True)
class ReleasedRandomRule(Rule):
    """The released `origin`: each open position is committed independently, with the probability that is due."""

    def commit(self, given: RuleInput) -> Tensor:
        return given.open & (given.priority < given.due[:, None])


def rule_of(params: DecodingParams) -> Rule:
    """Return the rule of `params`."""
    if params.preset == "reference":
        return ReleasedRandomRule() if params.policy == "random" else ReleasedRule()
    if params.threshold is not None:
        return ThresholdRule(params.threshold, by_confidence=params.policy == "margin")
    if params.factor is not None:
        return FactorRule(params.factor)
    if params.entropy_bound is not None:
        return EntropyBoundRule(params.entropy_bound)
    return Rule()


def highest(priority: Tensor, open_: Tensor, count: Tensor) -> Tensor:
    """Return the `count` (R,) open positions of highest `priority` (R, T) of each row, ties to the left: bool."""
    finite = priority.clamp(min=torch.finfo(priority.dtype).min)  # so that every open position precedes the others
    ranked = finite.masked_fill(~open_, -torch.inf).argsort(dim=-1, descending=True, stable=True)  # (R, T)
    chosen = torch.arange(open_.shape[1]) < count[:, None]  # (R, T), by rank
    return open_ & chosen.scatter(1, ranked, chosen)
