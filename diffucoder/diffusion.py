"""The forward process and its loss (reference: LLaDA, DiffuLLaMA, DiffuCoder §3): pure functions on tensors.

Absorbing noise: at time t each maskable token is independently the mask with probability t. Sizes: B rows, T positions.
Every draw takes a generator. `keyed_generator` makes one from numbers such as (seed, step, example), so that noise does
not depend on micro-batches or processes.
"""

import struct
from collections.abc import Sequence
from hashlib import blake2b
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from diffucoder.errors import ConfigError

NORMALISERS = ("length", "masked", "masked_micro")
Estimator = Literal["coupled", "decoupled", "full_mask", "d1"]
Noise = Generator | Sequence[Generator]
"""One generator for all rows, or one for each: then the noise of a row does not depend on other rows."""


def keyed_generator(*key: int) -> Generator:
    """Return a CPU generator that depends only on `key`: any number of integers, each in 64 bits, signed."""
    # torch's CPU generator keeps 32 bits of its seed, so close keys must be spread over them first
    digest = blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=4).digest()
    return Generator().manual_seed(int.from_bytes(digest, "little"))


def sample_time(
    batch: int,
    *,
    generator: Generator,
    eps: float = 1e-3,
    method: Literal["uniform", "stratified", "antithetic"] = "stratified",
) -> Tensor:
    """Draw t = eps + (1 - eps) u for each row: (B,) float32 in [eps, 1], each of them uniform.

    `stratified` draws one u from each of B equal slices of [0, 1) and shuffles them; `antithetic` draws pairs u, 1 - u.
    Both reduce the variance of the batch's mean loss. ConfigError for `eps` outside (0, 1).
    """
    if not 0 < eps < 1:
        raise ConfigError(f"eps={eps} is not inside (0, 1); the paper uses 1e-3")
    u = torch.rand(batch, generator=generator)  # (B,)
    if method == "stratified":
        u = (torch.randperm(batch, generator=generator) + u) / batch
    elif method == "antithetic":
        half = u[: (batch + 1) // 2]
        u = torch.stack([half, 1 - half], dim=1).flatten()[:batch]
    return eps + (1 - eps) * u


def corrupt(tokens: Tensor, maskable: Tensor, t: Tensor, mask_id: int, noise: Noise) -> tuple[Tensor, Tensor]:
    """Mask each maskable token (B, T) with probability t (B,) of its row.

    Returns the noisy tokens, (B, T) int64, and which of them are masked, (B, T) bool.
    """
    masked = maskable & (_uniform(torch.ones_like(maskable), noise) < t.to(tokens.device)[:, None])
    return tokens.masked_fill(masked, mask_id), masked


def complementary_masks(maskable: Tensor, t: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
    """Return two disjoint masks that cover `maskable` (B, T). A token is in the first with probability t, (B,).

    DiffuCoder §5 (coupled sampling): the second mask belongs to time 1 - t.
    """
    first = maskable & (_uniform(maskable, noise) < t.to(maskable.device)[:, None])
    return first, maskable & ~first


class View(NamedTuple):
    """One noisy view of B completions: the masked positions, and the weight of each log-probability there."""

    masked: Tensor  # (B, T) bool
    weight: Tensor  # (B, T) float32; 0 where nothing is scored


def score_views(
    completion: Tensor,
    prompt: Tensor,
    ratios: Tensor,
    noise: Sequence[Generator],
    *,
    estimator: Estimator = "coupled",
    prompt_mask: float = 0.15,
) -> list[View]:
    """Return the views whose weighted log-probabilities add up to the score of each token, an estimate of log pi.

    `completion` and `prompt` (B, T) bool are disjoint; the other positions are padding. `ratios` (L, B, 2) are the two
    mask ratios of each of L pairs; `noise` has a generator for each row. Estimators:

    * `coupled` (DiffuCoder §5): everything masked, and L pairs of complementary masks, the second at 1 minus the first
      ratio. Weights are 1/ratio, and all over L + 1. In expectation they add up to (2 L + 1) / (L + 1) for each token.
    * `decoupled`: as many passes, but the two masks of a pair are drawn by themselves, each at its own ratio.
    * `full_mask`: one pass with everything masked. No variance, but each token is scored as if it came first.
    * `d1` (arXiv 2504.12216): as `full_mask`, with each prompt token masked too, with probability `prompt_mask`.
    """
    everything = completion.float()
    if estimator == "full_mask":
        return [View(completion, everything)]
    if estimator == "d1":
        return [View(completion | (_uniform(prompt, noise) < prompt_mask), everything)]
    shares = len(ratios) + 1
    views = [View(completion, everything / shares)]
    for pair in ratios.to(completion.device):
        first, second = pair.unbind(-1)  # (B,) each
        if estimator == "coupled":
            second = 1 - first
            masks = complementary_masks(completion, first, noise)
        else:
            masks = (_uniform(completion, noise) < first[:, None], _uniform(completion, noise) < second[:, None])
        for masked, ratio in zip(masks, (first, second), strict=True):
            views.append(View(masked, masked / (ratio[:, None] * shares)))
    return views


def random_spans(length: int, generator: Generator, *, holes: int = 3) -> Tensor:
    """Draw up to `holes` random spans of a text of `length` tokens, to train infilling: (length,) bool, True inside.

    Both ends of a span are uniform (Bavarian et al., arXiv 2207.14255).
    """
    inside = torch.zeros(length, dtype=torch.bool)
    for _ in range(int(torch.randint(1, holes + 1, (), generator=generator))):
        ends = torch.randint(0, length + 1, (2,), generator=generator)
        inside[int(ends.min()) : int(ends.max())] = True
    return inside


def annealed_attention(length: int, share: float, generator: Generator) -> Tensor:
    """Return causal attention with each key on the right open with probability `share`: (length, length) bool.

    DiffuLLaMA (arXiv 2410.17891, §3.2): `share` grows from 0, the autoregressive parent, to 1, full attention.
    """
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return causal | (torch.rand(length, length, generator=generator) < share)


def loss_weights(masked: Tensor, t: Tensor, maskable: Tensor, *, normaliser: str) -> tuple[Tensor, float]:
    """Return the weight of each masked token's cross-entropy, (M,) float32, and this micro-batch's part of the divisor.

    The loss of a step is the sum of weight times cross-entropy over all its micro-batches and processes, divided by
    the sum of their shares. `masked` and `maskable` are (B, T), `t` is (B,); the M masked positions are in row-major
    order. Every token weighs 1/t of its row; the divisor is

    * `length` (LLaDA): the maskable tokens. The loss is an unbiased bound on the negative log-likelihood per token.
    * `masked`: the masked tokens of the whole step. The loss is up to 2 times larger.
    * `masked_micro` (DiffuLLaMA and DiffuCoder as released): each micro-batch by its own masked tokens, then their
      mean. For micro-batches of one row the loss is 6.9 times larger with eps = 1e-3.
    """
    if normaliser not in NORMALISERS:
        raise ConfigError(f"normaliser={normaliser!r} is not known; use one of {', '.join(NORMALISERS)}")
    row = masked.nonzero()[:, 0]  # (M,)
    weights = 1 / t.to(masked.device)[row]
    if normaliser == "masked_micro":
        return weights / max(1, len(row)), 1.0
    return weights, float(maskable.sum()) if normaliser == "length" else float(len(row))


def _uniform(where: Tensor, noise: Noise) -> Tensor:
    """Draw uniform numbers (B, T) on the device of `where` (B, T). With a generator a row: only there, else 1."""
    if isinstance(noise, Generator):
        return torch.rand(where.shape, generator=noise).to(where.device)
    drawn = torch.ones(where.shape)
    for row, (here, generator) in enumerate(zip(where.cpu(), noise, strict=True)):
        drawn[row, here] = torch.rand(int(here.sum()), generator=generator)
    return drawn.to(where.device)
