"""Stand-ins for a Denoiser whose scores are written down, and the released sampler to compare with.

`Scripted` refuses to make logits of a whole canvas: it answers only for `rows`, and only in chunks through `reduce`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffucoder.decoding.canvas import Canvas
from diffucoder.models.attention import FULL

MASK, PAD, VOCABULARY = 9, 8, 12
Score = Callable[[Tensor, Tensor], Tensor]  # (tokens (B, T), place in the row (B, T)) -> logits (B, T, V)


class Scripted:
    """Looks like a Denoiser to `advance`; `fed` holds the shape of every batch it was given.

    Like a shifted model it scores a position only if the one to its left is fed too.
    """

    first_scorable = 1
    attention = FULL

    def __init__(self, logits_of: Score, *, dtype: torch.dtype = torch.float32, chunk: int = 5) -> None:
        """`chunk` rows of logits at once: few, so that chunks matter."""
        self.logits_of, self.dtype, self.chunk = logits_of, dtype, chunk
        self.device = torch.device("cpu")
        self.mask_id = MASK
        self.fed: list[tuple[int, ...]] = []

    def needed_for(self, positions: Tensor) -> Tensor:
        return torch.nn.functional.pad(positions[..., 1:], (0, 1))

    def scorable(self, fed: Tensor) -> Tensor:
        return fed & torch.nn.functional.pad(fed[..., :-1], (1, 0))

    def score(
        self,
        tokens: Tensor,
        *,
        valid: Tensor,
        feed: Tensor,
        wanted: Tensor,
        reduce: Callable[[Tensor, slice], tuple[Tensor, ...]],
        prompt_ends: Tensor | None = None,
        cache_rows: None = None,
        reference: bool = False,
    ) -> tuple[Tensor, ...]:
        assert torch.equal(feed, valid), "there is no cache"
        self.fed.append(tuple(tokens.shape))
        logits = self.logits(tokens, valid)[wanted[:, 0], wanted[:, 1]]  # (M, V)
        chunks = [slice(start, start + self.chunk) for start in range(0, max(len(wanted), 1), self.chunk)]
        parts = [reduce(logits[chunk], chunk) for chunk in chunks]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def logits(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, T, V) scores, the same for a row however it is padded."""
        valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
        place = valid.cumsum(-1) - 1
        return self.logits_of(tokens.where(valid, MASK), place).to(self.dtype)  # unknown, as what is beyond the edge


def rugged(tokens: Tensor, place: Tensor) -> Tensor:
    """Scores that look random, and depend on what is known of the two tokens to the left and right, as a model's do."""
    known = torch.nn.functional.pad(torch.where(tokens == MASK, 0, tokens + 1), (2, 2))  # (B, T + 4)
    length = tokens.shape[1]
    around = sum(weight * known[:, at : at + length] for at, weight in enumerate((3, 7, 0, 11, 5)))  # (B, T)
    phase = (place * 1.7 + around * 2.3)[..., None]  # (B, T, 1)
    return 2 * torch.sin(phase + torch.arange(VOCABULARY) ** 2 * 0.7)


def sure_of(
    surest_first: Callable[[Tensor], Tensor], token: Callable[[Tensor], Tensor] = lambda place: place % 8
) -> Score:
    """Scores whose confidence falls with `surest_first(place)`; the proposal is `token(place)`."""

    def score(tokens: Tensor, place: Tensor) -> Tensor:
        height = 8 - 0.05 * surest_first(place).float()
        return torch.nn.functional.one_hot(token(place), VOCABULARY) * height[..., None]

    return score


def canvas(*prompts: list[int], new_tokens: int, pad: int = 0, **ids: object) -> Canvas:
    """A canvas of prompts of any lengths, left-padded to the longest and `pad` further."""
    longest = max(map(len, prompts)) + pad
    tokens = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    valid = torch.tensor([[False] * (longest - len(prompt)) + [True] * len(prompt) for prompt in prompts])
    return Canvas.from_prompts(tokens, valid=valid, new_tokens=new_tokens, **{"mask_id": MASK, "pad_id": PAD, **ids})


def released(
    score: Callable[[Tensor], Tensor],
    tokens: Tensor,
    *,
    steps: int,
    alg: str = "entropy",
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    alg_temp: float | None = None,
    eps: float = 1e-3,
) -> list[Tensor]:
    """The canvas after each step of the sampling loop of the released code, written as plainly as it can be."""
    history, time = [], torch.linspace(1, eps, steps + 1)
    for i in range(steps):
        masked = tokens == MASK
        logits = score(tokens)[masked]  # (M, V)
        logits[:, MASK] = torch.finfo(logits.dtype).min
        s, t = time[i + 1], time[i]
        tokens = tokens.clone()
        if alg == "origin":
            chosen = torch.rand(len(logits)) < (1 - s / t if i < steps - 1 else 1)
            _, proposals = _sample(logits, alg, temperature, top_p, top_k)
            tokens[masked] = proposals.where(chosen, MASK)
        else:
            confidence, proposals = _sample(logits, alg, temperature, top_p, top_k)
            remaining = masked.sum() / len(tokens)
            number = int(remaining * (1 - s / t)) if i < steps - 1 else int(remaining)
            full = torch.full(tokens.shape, -torch.inf, dtype=logits.dtype)
            full[masked] = confidence
            if number > 0:
                if alg_temp:
                    chosen = torch.multinomial((full / alg_temp).softmax(-1), num_samples=number)
                else:
                    chosen = full.topk(number).indices
                proposed = tokens.clone()
                proposed[masked] = proposals
                tokens = tokens.scatter(1, chosen, proposed.gather(1, chosen))
        history.append(tokens)
    return history


def _sample(
    logits: Tensor, alg: str, temperature: float, top_p: float | None, top_k: int | None
) -> tuple[Tensor, Tensor]:
    lowest = torch.finfo(logits.dtype).min
    if temperature > 0:
        logits = logits / temperature
    if top_p is not None and top_p < 1:
        ordered, ids = logits.sort(descending=True)
        drop = ordered.softmax(-1).cumsum(-1) > top_p
        drop[:, 1:] = drop[:, :-1].clone()
        drop[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, ids, drop), lowest)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, lowest)
    probabilities = logits.softmax(-1)
    confidence, proposals = probabilities.max(-1)
    if temperature > 0:
        proposals = torch.distributions.Categorical(probs=probabilities).sample()
        confidence = probabilities.gather(-1, proposals[:, None])[:, 0]
    if alg == "topk_margin":
        ordered = probabilities.sort(descending=True).values
        confidence = ordered[:, 0] - ordered[:, 1]
    if alg == "entropy":
        confidence = (probabilities * torch.log(probabilities + 1e-10)).sum(-1)
    return confidence, proposals
