"""Sampling: logits of masked positions → a proposed token for each, its confidence and its log-probability.

Everything that needs the vocabulary axis runs here, in chunks within the forward pass (`Denoiser`'s `reduce`), so that
logits of a whole canvas never exist.

The order of operations is that of the release: bar ids, temperature, top-p, top-k, softmax, proposal, confidence. So
confidence is computed after temperature and filters, and temperature changes the order of generation.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.policies import ORDERS, Order

COLDEST = 1e-6  # a lower temperature is the same argmax in fp32, but would overflow


class Samples(NamedTuple):
    """The proposals of M positions."""

    tokens: Tensor  # (M,) int64
    confidence: Tensor  # (M,) fp32, by the order; larger is more confident
    log_prob: Tensor  # (M,) fp32, under the distribution that the token was chosen from
    entropy: Tensor  # (M,) fp32 nats of the model's own distribution, see `entropy`; nan if it is not wanted
    candidates: Tensor  # (M, k) int64, the most probable ids, best first; k = 0 if they are not wanted
    candidate_log_probs: Tensor  # (M, k) fp32


@dataclass(frozen=True)
class Sampler:
    """How the positions of a request are sampled. Requests with equal samplers are sampled together."""

    order: Order
    temperature: float
    top_p: float | None
    top_k: int | None
    barred: tuple[int, ...]  # ids never proposed
    proposable: int | None  # ids from this one on are never proposed either
    ends: tuple[int, ...]  # ids that end a row
    end_penalty: float  # taken off their logits
    reference: bool  # the arithmetic of the released code, in the logits' own dtype instead of fp32

    @classmethod
    def of(
        cls,
        params: DecodingParams,
        *,
        mask_id: int,
        forbidden: tuple[int, ...] = (),
        proposable: int | None = None,
        terminators: tuple[int, ...] = (),
    ) -> "Sampler":
        """Return the sampler of `params`. That of the preset `reference` bars only the mask."""
        reference = params.preset == "reference"
        return cls(
            order=ORDERS[params.policy](params.policy_temperature),
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            barred=(mask_id,) if reference else (mask_id, *forbidden),
            proposable=None if reference else proposable,
            ends=terminators,
            end_penalty=params.end_penalty,
            reference=reference,
        )

    def sample(
        self, logits: Tensor, uniform: Tensor, given: Tensor, *, with_entropy: bool = False, candidates: int = 0
    ) -> Samples:
        """Propose a token for each row of `logits` (M, V), with `uniform` (M,) in [0, 1) if there is a temperature.

        A token of `given` (M,) that is not -1 replaces the proposal, and gets a confidence as if it were proposed.
        """
        barred = torch.tensor(self.barred, device=logits.device)
        entropies = torch.full((len(logits),), torch.nan, device=logits.device)
        if with_entropy:
            entropies = entropy(logits, barred, self.proposable)
        logits = logits.to(logits.dtype if self.reference else torch.float32, copy=True)
        lowest = torch.finfo(logits.dtype).min
        logits[:, barred] = lowest
        if self.proposable is not None:
            logits[:, self.proposable :] = lowest
        if self.end_penalty:
            logits[:, torch.tensor(self.ends, device=logits.device)] -= self.end_penalty
        probabilities = self._filter(logits).softmax(-1)  # (M, V)
        del logits  # as large as the probabilities, and not read again
        tokens = draw(probabilities, uniform) if self.temperature > 0 else probabilities.argmax(-1)
        tokens = given.where(given >= 0, tokens)
        chosen = probabilities.gather(1, tokens[:, None])[:, 0]  # (M,)
        best = probabilities.topk(min(candidates, probabilities.shape[1]), -1)
        return Samples(
            tokens=tokens,
            confidence=self.order.confidence(probabilities, chosen).float(),
            log_prob=chosen.float().log(),
            entropy=entropies,
            candidates=best.indices,
            candidate_log_probs=best.values.float().log(),
        )

    def _filter(self, logits: Tensor) -> Tensor:
        """Apply temperature and filters to `logits` (M, V)."""
        if self.temperature > 0:
            logits = (logits.float() / max(self.temperature, COLDEST)).to(logits.dtype)
        if self.top_p is not None and self.top_p < 1:
            logits = keep_top_p(logits, self.top_p)
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        return logits


def entropy(logits: Tensor, barred: Tensor, proposable: int | None = None) -> Tensor:
    """(M,) nats of `logits` (M, V) before temperature and filters, without the ids that are never proposed."""
    allowed = logits.float().index_fill(1, barred, -torch.inf)[:, :proposable]
    return torch.special.entr(allowed.softmax(-1)).sum(-1)  # type: ignore[no-any-return]  # torch leaves it untyped


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Drop tokens of `logits` (M, V) beyond the cumulative probability `p`. The token that crosses it stays."""
    ordered, ids = logits.sort(-1, descending=True)
    limit = torch.tensor(p, dtype=torch.float32).to(logits.dtype)
    dropped = ordered.softmax(-1).cumsum(-1) > limit.to(logits.device)  # (M, V), by rank
    dropped = torch.nn.functional.pad(dropped[:, :-1], (1, 0))  # one later: the crossing token, and always the first
    return logits.masked_fill(dropped.scatter(1, ids, dropped), torch.finfo(logits.dtype).min)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Drop tokens of `logits` (M, V) below the `k`-th value. Ties stay."""
    least = logits.topk(min(k, logits.shape[1]), -1).values[:, -1:]  # (M, 1)
    return logits.masked_fill(logits < least, torch.finfo(logits.dtype).min)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Draw tokens (M,) from `probabilities` (M, V), with one uniform number (M,) each."""
    cdf = probabilities.float().cumsum(-1)
    target = uniform[:, None] * cdf[:, -1:]  # below the total, since uniform <= 1 - 2**-24
    draws = torch.searchsorted(cdf, target, right=True).clamp_(max=cdf.shape[1] - 1)  # (M, 1)
    # A parallel cumsum may round upwards over an impossible token: never let that one through
    impossible = probabilities.gather(1, draws) == 0
    return torch.where(impossible[:, 0], probabilities.argmax(-1), draws[:, 0])
