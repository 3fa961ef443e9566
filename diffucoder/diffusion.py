"""The forward process and its loss (reference: LLaDA, DiffuLLaMA, DiffuCoder §3): pure functions on tensors.

Absorbing noise: at time t each maskable token is independently the mask with probability t. Sizes: B rows, T positions.
Row i of any score here belongs to token i: the shift of adapted models is already hidden by `Denoiser`.

Every draw takes a generator. `keyed_generator` makes one from numbers such as (seed, step, example), so that noise
depends on nothing else: not on how a step is cut into micro-batches, nor on how many processes share it.
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
"""One generator for all rows, or one for each: then a row's noise is the same in any company."""


def keyed_generator(*key: int) -> Generator:
    """A CPU generator that is a function of `key` alone: any number of integers, each in 64 bits, signed."""
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
    """Draw t = eps + (1 - eps) u for each row: (B,) float32 in [eps, 1], each uniform by itself.

    `stratified` draws one u from each of B equal slices of [0, 1) and shuffles them; `antithetic` draws pairs u, 1 - u.
    Both make the batch's mean loss vary less than `uniform`. ConfigError for `eps` outside (0, 1).
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
    """Mask each maskable token with probability t of its row.

    `tokens` (B, T) int64, `maskable` (B, T) bool, `t` (B,). Returns the noisy tokens and which of them are masked,
    both (B, T).
    """
    masked = maskable & (_uniform(torch.ones_like(maskable), noise) < t.to(tokens.device)[:, None])
    return tokens.masked_fill(masked, mask_id), masked


def complementary_masks(maskable: Tensor, t: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
    """Two disjoint masks that together are `maskable` (B, T): a token is in the first with probability t, (B,).

    DiffuCoder §5 (coupled sampling): the second mask belongs to time 1 - t. With a generator a row, a row's masks are
    the same wherever its padding ends.
    """
    first = maskable & (_uniform(maskable, noise) < t.to(maskable.device)[:, None])
    return first, maskable & ~first


class View(NamedTuple):
    """One noisy look at B completions: what is hidden, and what each log-probability found there counts."""

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
    """The forward passes whose weighted log-probabilities add up to the score of each token, a stand-in for log pi.

    `completion` and `prompt` (B, T) bool are disjoint; what is in neither is padding. `ratios` (L, B, 2) are the two
    mask ratios of each of L pairs; `noise` has a generator for each row, and gives a row the same masks wherever its
    padding begins. Estimators:

    * `coupled` (DiffuCoder §5): everything hidden, and L pairs of complementary masks, the second at 1 minus the first
      ratio. Weights are 1/ratio, and all over L + 1: every token is scored in 1 + L of the 1 + 2 L passes. In
      expectation its weights add up to (2 L + 1) / (L + 1): a proxy, not an average.
    * `decoupled`: as many passes, but the two masks of a pair are drawn by themselves, each at its own ratio.
    * `full_mask`: one pass with everything hidden. No variance, but each token is scored as if it came first.
    * `d1` (arXiv 2504.12216): as `full_mask`, with each prompt token hidden too, with probability `prompt_mask`.
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
            masks, second = complementary_masks(completion, first, noise), 1 - first
        else:
            masks = (_uniform(completion, noise) < first[:, None], _uniform(completion, noise) < second[:, None])
        views += [View(m, m / (t[:, None] * shares)) for m, t in zip(masks, (first, second), strict=True)]
    return views


def random_spans(length: int, generator: Generator, *, holes: int = 3) -> Tensor:
    """Up to `holes` random spans of a text of `length` tokens: (length,) bool, True inside. What infilling trains on.

    As in the random-span benchmark of Bavarian et al. (arXiv 2207.14255), both ends of a span are uniform.
    """
    inside = torch.zeros(length, dtype=torch.bool)
    for _ in range(int(torch.randint(1, holes + 1, (), generator=generator))):
        ends = torch.randint(0, length + 1, (2,), generator=generator)
        inside[int(ends.min()) : int(ends.max())] = True
    return inside


def annealed_attention(length: int, share: float, generator: Generator) -> Tensor:
    """Causal attention with each key to the right open with probability `share`: (length, length) bool.

    DiffuLLaMA (arXiv 2410.17891, §3.2): `share` grows from 0, the autoregressive parent, to 1, full attention.
    """
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return causal | (torch.rand(length, length, generator=generator) < share)


def loss_weights(masked: Tensor, t: Tensor, maskable: Tensor, *, normaliser: str) -> tuple[Tensor, float]:
    """What each masked token's cross-entropy counts, (M,) float32, and this micro-batch's share of the divisor.

    The loss of a step is the sum of weight times cross-entropy over all its micro-batches and processes, divided by
    the sum of their shares. `masked` and `maskable` are (B, T), `t` is (B,); the M masked positions stand in row-major
    order. Every token weighs 1/t of its row; the divisor is

    * `length` (LLaDA): the maskable tokens. The loss is an unbiased bound on the negative log-likelihood per token.
    * `masked`: the masked tokens of the whole step. Larger: 1/E[t] = 2 times where many rows share the sum.
    * `masked_micro` (DiffuLLaMA and DiffuCoder as released): each micro-batch by its own masked tokens, then their
      mean. For micro-batches of one row that is E[1/t] = 6.9 times larger with eps = 1e-3.
    """
    if normaliser not in NORMALISERS:
        raise ConfigError(f"normaliser={normaliser!r} is not known; use one of {', '.join(NORMALISERS)}")
    row = masked.nonzero()[:, 0]  # (M,)
    weights = 1 / t.to(masked.device)[row]
    if normaliser == "masked_micro":
        return weights / max(1, len(row)), 1.0
    return weights, float(maskable.sum()) if normaliser == "length" else float(len(row))


def _uniform(where: Tensor, noise: Noise) -> Tensor:
    """Uniform draws (B, T) on the device of `where` (B, T) bool; with a generator a row only there, 1 elsewhere."""
    if isinstance(noise, Generator):
        return torch.rand(where.shape, generator=noise).to(where.device)
    drawn = torch.ones(where.shape)
    for row, (here, generator) in enumerate(zip(where.cpu(), noise, strict=True)):
        drawn[row, here] = torch.rand(int(here.sum()), generator=generator)
    return drawn.to(where.device)
