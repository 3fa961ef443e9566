"""The formulas of coupled-GRPO (DiffuCoder §5, appendix B.1), as functions of tensors.

B completions of T positions, with their prompts and left padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffucoder.decoding.requests import Generation
from diffucoder.diffusion import View

_STEEPEST = 20.0  # bound on log-ratios: beyond it the exponential or its gradient would overflow


def advantages(rewards: Tensor, group: int, *, baseline: str = "mean", scale: bool = False) -> Tensor:
    """How much better each completion is than its group: (B,) from rewards (B,), `group` consecutive ones at a time.

    `mean` subtracts the group's mean; `leave_one_out` that of the others. `scale` divides by the group's standard
    deviation (plus 1e-4). Advantages add up to zero in every group.
    """
    grouped = rewards.view(-1, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    equal = (grouped == grouped[:, :1]).all(1, keepdim=True)
    centred = centred.masked_fill(equal, 0)  # exactly, whatever the mean rounds to
    if baseline == "leave_one_out":
        centred = centred * (group / (group - 1))
    if scale:
        centred = centred / (grouped.std(1, keepdim=True) + 1e-4)
    return centred.flatten()


def k3(score: Tensor, reference: Tensor) -> Tensor:
    """Schulman's estimate of KL(policy || reference) from log-probabilities of the policy's samples; never negative."""
    difference = (reference - score).clamp(-_STEEPEST, _STEEPEST)
    return difference.exp() - difference - 1


def clipped_loss(
    score: Tensor, old: Tensor, advantage: Tensor, *, low: float, high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A), ratio = exp(score - old), (B, T) each; `advantage` is (B,).

    Also returns the ratio and where it was clipped, which leaves no gradient, to be logged: (B, T) each.
    """
    ratio = (score - old).clamp(-_STEEPEST, _STEEPEST).exp()
    gain = advantage[:, None]
    loss = -torch.minimum(ratio * gain, ratio.clamp(1 - low, 1 + high) * gain)
    logged = {
        "ratio": ratio.detach(),
        "clip_low": (ratio < 1 - low) & (gain < 0),
        "clip_high": (ratio > 1 + high) & (gain > 0),
    }
    return loss, logged


def reduction_weights(scored: Tensor, *, reduction: str) -> Tensor:
    """The weight of each token's loss, (B, T)."""
    if reduction == "sequence":
        return scored / scored.sum(-1, keepdim=True).clamp(min=1)
    return scored.float()


def reduction_count(lengths: Sequence[int], new_tokens: int, *, reduction: str) -> int:
    """What completions of so many scored tokens add to the divisor of the step's loss."""
    if reduction == "token":
        return sum(lengths)
    if reduction == "sequence":
        return len(lengths)
    return len(lengths) * new_tokens


@dataclass(frozen=True)
class CompletionBatch:
    """Completions after their prompts, left-padded."""

    tokens: Tensor  # (B, T) int64
    valid: Tensor  # (B, T) bool: False on padding
    completion: Tensor  # (B, T) bool
    scored: Tensor  # (B, T) bool: up to and including the first terminator, or the pads after it too


def collate(generations: Sequence[Generation], *, pad_id: int, score_padding: bool = False) -> CompletionBatch:
    """Prompts and canvases as tensors, prompts left-padded to the longest."""
    longest = max(generation.trace.prompt_length for generation in generations)
    rows = []
    starts = []
    ends = []
    for generation in generations:
        padding = longest - generation.trace.prompt_length
        rows.append([pad_id] * padding + generation.trace.tokens)
        starts.append(padding)
        ends.append(longest + len(generation.tokens) + 1)  # the terminator counts, if there is one
    tokens = torch.tensor(rows)
    position = torch.arange(tokens.shape[1])  # (T,)
    valid = position >= torch.tensor(starts)[:, None]  # (B, T)
    completion = (position >= longest).expand_as(valid)
    scored = completion
    if not score_padding:
        scored = completion & (position < torch.tensor(ends)[:, None])
    return CompletionBatch(tokens, valid, completion, scored)


def token_scores(
    model: nn.Module, batch: CompletionBatch, views: Sequence[View], *, mask_id: int, block_causal: bool = False
) -> Tensor:
    """The score of every token that is scored, (B, T) float32, 0 elsewhere: one forward pass over all views at once.

    A `block_causal` model scores the tokens of each block after the completion before it, without masks.
    """
    tokens = torch.cat([batch.tokens.masked_fill(view.masked, mask_id) for view in views])  # (V * B, T)
    weight = torch.cat([view.weight * batch.scored for view in views])  # (V * B, T)
    wanted = weight > 0
    targets = batch.tokens.repeat(len(views), 1)[wanted]  # (M,)

    def log_prob(logits: Tensor, chunk: slice) -> Tensor:
        target = targets[chunk].to(logits.device)
        return -F.cross_entropy(logits.float(), target, reduction="none")  # (m,)

    valid = batch.valid.repeat(len(views), 1)
    inputs = {"valid": valid, "rows": wanted.nonzero()}
    if block_causal:
        inputs["clean"] = batch.tokens.repeat(len(views), 1)
        inputs["prompt_ends"] = batch.completion.int().argmax(-1).repeat(len(views))
    log_probs = model(tokens, **inputs, reduce=log_prob)  # (M,)
    weighted = log_probs * weight[wanted].to(log_probs.device)
    sums = torch.zeros(wanted.shape, device=weighted.device, dtype=torch.float32)
    sums = sums.masked_scatter(wanted.to(weighted.device), weighted)
    return sums.view(len(views), *batch.tokens.shape).sum(0)
