"""Policies: which masked positions are committed now, and how many.

For: pure functions of (B, T) tensors, from confidence to the set of positions. Not for: how confidence comes about
(`sampling`).

Three ideas a newcomer needs. A *schedule* is laid down when a request begins: what each step commits, as a count
(preset `exact`) or as a share of what is masked (`reference`). A *priority* orders the positions within a step: the
confidence itself, perturbed by Gumbel noise where the order is random, or noise alone. A *rule* lets a step commit more
than the schedule asks for: everything the model is sure enough of.
"""

import torch
from torch import Tensor

from diffucoder.decoding.params import DecodingParams


def schedule(masked: int, params: DecodingParams) -> Tensor:
    """What each step commits of a row with `masked` masks: (steps,) fp32 counts, or shares for the reference preset."""
    steps = max(masked, 1) if params.steps is None else params.steps
    return shares(steps, params.eps) if params.preset == "reference" else quotas(masked, steps)


def quotas(masked: int, steps: int) -> Tensor:
    """(min(steps, masked),) fp32 counts that add up to `masked`: even, the remainder on the first steps."""
    steps = min(steps, masked)
    step = torch.arange(steps)
    return (masked // max(steps, 1) + (step < masked % max(steps, 1))).float()


def shares(steps: int, eps: float) -> Tensor:
    """(steps,) fp32 shares of the remaining masks, as released: 1 - s/t on a time grid from 1 to `eps`; at last, all.

    Rounded down to counts they commit nothing in the first step and several in the last when steps = tokens.
    """
    time = torch.linspace(1, eps, steps + 1)
    share = 1 - time[1:] / time[:-1]
    share[-1] = 1
    return share


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise from uniform numbers in [0, 1).

    The n largest of `score + gumbel` are n draws without replacement from softmax(score): torch.multinomial's
    distribution (Vieira 2014), from one number a position and with n of its own for each row.
    """
    return -(-uniform.clamp(min=torch.finfo(uniform.dtype).tiny).log()).log()


def commit(priority: Tensor, masked: Tensor, budget: Tensor) -> Tensor:
    """Each row's `budget` (B,) masked positions of highest `priority` (B, T), ties to the left: (B, T) bool."""
    finite = priority.clamp(min=torch.finfo(priority.dtype).min)  # so that every masked position precedes the others
    order = finite.masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)  # (B, T)
    chosen = torch.arange(masked.shape[1]) < budget[:, None]  # (B, T), by rank
    return masked & chosen.scatter(1, order, chosen)


def surer_than(probability: Tensor, masked: Tensor, least: Tensor) -> Tensor:
    """Masked positions of at least the probability (or margin) `least` (B,): (B, T) bool. Fast-dLLM's threshold."""
    return masked & (probability >= least[:, None])


def within_factor(probability: Tensor, masked: Tensor, factor: Tensor) -> Tensor:
    """Each row's n most probable masked positions, for the largest n with (n + 1)(1 - p of the nth) < `factor` (B,).

    Fast-dLLM (arXiv 2505.22618, §3.3): with every p above 1 - 1/(n + 1) committing together picks what one after the
    other would.
    """
    ordered = probability.masked_fill(~masked, -1).sort(dim=-1, descending=True, stable=True)  # (B, T) by rank
    rank = torch.arange(1, masked.shape[1] + 1, device=masked.device)  # (T,)
    fits = (rank + 1) * (1 - ordered.values) < factor[:, None]  # (B, T); what is not masked has 1 - p = 2
    most = (fits * rank).amax(-1, keepdim=True)  # (B, 1)
    return masked & torch.zeros_like(masked).scatter(1, ordered.indices, rank <= most)


def within_entropy(entropy: Tensor, masked: Tensor, bound: Tensor) -> Tensor:
    """Each row's masked positions of least `entropy` (B, T), whose sum without the largest is at most `bound` (B,).

    The entropy-bounded sampler (arXiv 2505.24857): the sum bounds what is lost by taking tokens as independent.
    """
    ordered = entropy.masked_fill(~masked, torch.inf).sort(dim=-1, stable=True)  # (B, T) by rank
    before = ordered.values.cumsum(-1).roll(1, -1)  # (B, T) sum of those before; the first has none
    before[:, 0] = 0
    return masked & torch.zeros_like(masked).scatter(1, ordered.indices, before <= bound[:, None])


def commit_released(priority: Tensor, masked: Tensor, budget: Tensor) -> Tensor:
    """As `commit`, but with ties broken by `torch.topk`, as released: they are common in bf16."""
    priority = priority.masked_fill(~masked, -torch.inf)
    committed = torch.zeros_like(masked)
    for count in set(budget.tolist()):  # topk breaks ties differently for each count
        rows = (budget == count).nonzero()  # (b, 1)
        committed[rows, priority[rows[:, 0]].topk(count, -1).indices] = True
    return committed & masked


def commit_randomly(uniform: Tensor, masked: Tensor, share: Tensor) -> Tensor:
    """The released `origin`: every masked position commits by itself, with probability `share` (B,)."""
    return masked & (uniform < share[:, None])
