"""The forward process and its loss (reference: LLaDA, DiffuLLaMA, DiffuCoder §3): pure functions on tensors.

Absorbing noise: at time t each maskable token is independently the mask with probability t. Sizes: B rows, T positions.
Row i of any score here belongs to token i: the shift of adapted models is already hidden by `Denoiser`.
"""

import torch
from torch import Generator, Tensor

from diffucoder.errors import ConfigError

NORMALISERS = ("length", "masked")


def sample_time(batch: int, *, generator: Generator, eps: float = 1e-3, stratified: bool = True) -> Tensor:
    """Draw t = eps + (1 - eps) u for each row: (B,) float32 in [eps, 1].

    `stratified` draws one u from each of B equal slices of [0, 1) and shuffles them: each row is still uniform, and the
    batch's mean loss varies less.
    """
    if not 0 < eps < 1:
        raise ConfigError(f"eps={eps} is not inside (0, 1); the paper uses 1e-3")
    u = torch.rand(batch, generator=generator)  # (B,)
    if stratified:
        u = (torch.randperm(batch, generator=generator) + u) / batch
    return eps + (1 - eps) * u


def corrupt(tokens: Tensor, maskable: Tensor, t: Tensor, mask_id: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Mask each maskable token with probability t of its row.

    `tokens` (B, T) int64, `maskable` (B, T) bool, `t` (B,). Returns the noisy tokens and which of them are masked,
    both (B, T).
    """
    u = torch.rand(tokens.shape, generator=generator).to(tokens.device)  # (B, T)
    masked = maskable & (u < t.to(tokens.device)[:, None])
    return tokens.masked_fill(masked, mask_id), masked


def complementary_masks(maskable: Tensor, t: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Two disjoint masks that together are `maskable` (B, T): a token is in the first with probability t, (B,).

    DiffuCoder §5 (coupled sampling): the second mask belongs to time 1 - t.
    """
    u = torch.rand(maskable.shape, generator=generator).to(maskable.device)  # (B, T)
    first = maskable & (u < t.to(maskable.device)[:, None])
    return first, maskable & ~first


def diffusion_loss(cross_entropy: Tensor, masked: Tensor, t: Tensor, maskable: Tensor, *, normaliser: str) -> Tensor:
    """The 1/t-weighted cross-entropy of the masked tokens: a scalar.

    `cross_entropy` (M,) belongs to the M masked positions in row-major order, `masked` and `maskable` are (B, T), `t`
    is (B,). `length` (LLaDA) divides by the number of maskable tokens, which makes the loss an unbiased bound on the
    negative log-likelihood per token; `masked` (DiffuLLaMA, DiffuCoder) by the number of masked ones, which makes it
    larger: for one row E[1/t] = 6.9 times with eps = 1e-3, and 1/E[t] = 2 times where many rows share the sum.
    """
    if normaliser not in NORMALISERS:
        raise ConfigError(f"normaliser={normaliser!r} is not known; use one of {', '.join(NORMALISERS)}")
    row = masked.nonzero()[:, 0]  # (M,)
    weighted = (cross_entropy / t.to(cross_entropy.device)[row]).sum()
    count = maskable.sum() if normaliser == "length" else masked.sum()
    return weighted / count.clamp(min=1)
