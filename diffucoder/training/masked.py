"""The objective of the first three stages: rows of tokens in, noise on them, cross-entropy on what is hidden.

For: `pretrain`, `adapt` and `sft`, which bring rows (`Rows`) and share everything else. Not for: where rows come from,
optimisers (`trainer`), the formulas (`diffusion`).

All noise of a row is keyed by (seed, step, row): how a step is cut into micro-batches and processes changes nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffucoder.diffusion import annealed_attention, corrupt, keyed_generator, loss_weights, sample_time
from diffucoder.training.trainer import Micro, Terms

HELD_OUT = -1  # stands for the step in the key of held-out noise, which is the same at every evaluation
_TIME, _ATTENTION, _ROW, _CUT = range(4)  # the last number of a key: what is drawn
_CUTS = 3  # of each held-out row: a token a pass is little to go by


class Row(NamedTuple):
    """One example before noise: `tokens` (L,) int64 and which of them may be hidden, (L,) bool."""

    tokens: Tensor
    maskable: Tensor


class Rows(Protocol):
    """Where a stage's rows come from: functions of the step and the row's number in it, so nothing has a position."""

    def width(self, step: int) -> int:
        """How many tokens the rows of `step` are padded to."""
        ...

    def row(self, step: int, index: int) -> Row:
        """Row `index` of `step`, at most `width(step)` long."""
        ...


@dataclass(frozen=True)
class Objective:
    """How rows are noised. `anneal_steps` as in `AdaptSettings`; `autoregressive` scores every token from its left."""

    mask_id: int
    pad_id: int
    seed: int
    batch: int  # rows of a step, over all micro-batches and processes
    eps: float = 1e-3
    time: str = "stratified"
    normaliser: str = "length"
    anneal_steps: int = 0
    autoregressive: bool = False


@dataclass(frozen=True)
class MaskedMicro(Micro):
    """A micro-batch, noised: B rows of T tokens, M of them scored."""

    noisy: Tensor  # (B, T) int64
    valid: Tensor | None  # (B, T) bool, where some row ends before T
    attention: Tensor | None  # (T, T) bool, where it is not full
    rows: Tensor  # (M, 2) row and position of what is scored
    targets: Tensor  # (M,) int64
    weights: Tensor  # (M,) float32


class MaskedStage:
    """A `trainer.Stage` over `Rows`."""

    stride = 1
    shown: tuple[str, ...] = ()

    def __init__(
        self,
        objective: Objective,
        rows: Rows,
        held_out: Rows | None,
        held_out_rows: int,
        held_out_at: Sequence[float] = (),
    ) -> None:
        """`held_out_rows` is rounded up to whole steps: then every process has as many of them."""
        self.objective, self._rows, self._held_out, self._held_out_at = objective, rows, held_out, held_out_at
        self.held_out_rows = 0 if held_out is None else -(-held_out_rows // objective.batch) * objective.batch

    def prepare(self, step: int, shares: Sequence[range]) -> list[MaskedMicro]:
        """The micro-batches of one process: `shares` are their rows within the step."""
        times = self._times(step, self.objective.batch)
        return [self._micro(self._rows, step, share, times, self.objective.normaliser) for share in shares]

    def begin(self) -> dict[str, Tensor]:
        """Nothing but weights and optimiser is to be kept: rows and noise are functions of the step."""
        return {}

    def held_out_micros(self, shares: Sequence[range]) -> list[MaskedMicro]:
        """As `prepare`, over held-out rows: always the same noise, full attention and the `length` normaliser."""
        if self._held_out is None:
            return []
        times = self._times(HELD_OUT, self.held_out_rows)
        return [self._micro(self._held_out, HELD_OUT, share, times, "length") for share in shares]

    def held_out(self, model: nn.Module, shares: Sequence[range]) -> Iterator[tuple[float, Terms]]:
        """The loss of each held-out micro-batch, behind its share of the divisor; then its figures by noise level."""
        for micro in self.held_out_micros(shares):
            yield micro.count, self.loss(model, micro)
        for name, micro in self.by_level(shares):
            yield 0.0, Terms(None, {name: self.loss(model, micro).figures["unweighted"]})

    def by_level(self, shares: Sequence[range]) -> Iterator[tuple[str, MaskedMicro]]:
        """Held-out rows at each of the wanted noise levels, and behind clean prefixes: the parent's own task."""
        if self._held_out is None:
            return
        for level in self._held_out_at:
            times = torch.full((self.held_out_rows,), level)
            for share in shares:
                yield f"at_{level:g}", self._micro(self._held_out, HELD_OUT, share, times, "length")
        for cut in range(_CUTS if self._held_out_at else 0):
            for share in shares:
                yield "after_prefix", self._after_prefix(self._held_out, share, cut)

    def loss(self, model: nn.Module, micro: MaskedMicro) -> Terms:
        """Weighted cross-entropy, summed; the logits exist in chunks only (`Denoiser.forward`)."""

        def score(logits: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
            targets = micro.targets[chunk].to(logits.device)
            logits = logits.float()  # for the argmax too, which is slow in bfloat16
            return F.cross_entropy(logits, targets, reduction="none"), (logits.argmax(-1) == targets).float()  # (m,)

        cost, right = model(
            micro.noisy, valid=micro.valid, attention=micro.attention, rows=micro.rows, reduce=score
        )  # (M,) each
        loss = (cost * micro.weights.to(cost.device)).sum()
        scored = len(micro.targets)
        return Terms(loss, {"unweighted": (cost.detach().sum(), scored), "accuracy": (right.detach().sum(), scored)})

    def _after_prefix(self, source: Rows, share: range, number: int) -> MaskedMicro:
        """Held-out rows with all hidden from some place on, of which that first token alone is scored."""
        micro = self._micro(source, HELD_OUT, share, torch.ones(self.held_out_rows), "length")  # all that may be, is
        noisy, kept = micro.noisy.clone(), []
        for at, index in enumerate(share):
            hidden = (micro.rows[:, 0] == at).nonzero()[:, 0]  # (h,) of the row's hidden tokens, which of all
            noise = keyed_generator(self.objective.seed, number, index, _CUT)
            cut = int(torch.randint(len(hidden), (), generator=noise))
            noisy[at, micro.rows[hidden[:cut], 1]] = micro.targets[hidden[:cut]]
            kept.append(hidden[cut])
        first = torch.stack(kept)
        return replace(
            micro, noisy=noisy, rows=micro.rows[first], targets=micro.targets[first], weights=micro.weights[first]
        )

    def _times(self, step: int, rows: int) -> Tensor:
        """Noise levels of all rows of the step, (rows,): strata span processes and micro-batches."""
        objective = self.objective
        if objective.autoregressive:
            return torch.ones(rows)
        noise = keyed_generator(objective.seed, step, _TIME)
        return sample_time(rows, generator=noise, eps=objective.eps, method=objective.time)  # type: ignore[arg-type]

    def _micro(self, source: Rows, step: int, share: range, times: Tensor, normaliser: str) -> MaskedMicro:
        objective, width = self.objective, source.width(step)
        tokens = torch.full((len(share), width), objective.pad_id)
        maskable, valid = torch.zeros(2, len(share), width, dtype=torch.bool)
        for at, index in enumerate(share):
            row = source.row(step, index)
            tokens[at, : len(row.tokens)], maskable[at, : len(row.tokens)] = row.tokens, row.maskable
            valid[at, : len(row.tokens)] = True
        # Position 0 has no left neighbour that could predict it: it stays clean and unscored, as it is at decoding
        maskable[:, 0] = False
        noise = [keyed_generator(objective.seed, step, index, _ROW) for index in share]
        noisy, hidden = corrupt(tokens, maskable, times[share.start : share.stop], objective.mask_id, noise)
        weights, count = loss_weights(hidden, times[share.start : share.stop], maskable, normaliser=normaliser)
        return MaskedMicro(
            count=count,
            tokens=tokens.numel(),
            noisy=tokens if objective.autoregressive else noisy,
            valid=None if valid.all() else valid,
            attention=self._attention(step, width),
            rows=hidden.nonzero(),
            targets=tokens[hidden],
            weights=weights,
        )

    def _attention(self, step: int, width: int) -> Tensor | None:
        """Causal for a parent; annealed from causal to full over `anneal_steps`, one draw for all rows of a step."""
        objective = self.objective
        if objective.autoregressive:
            return torch.ones(width, width, dtype=torch.bool).tril()
        if step == HELD_OUT or step + 1 >= objective.anneal_steps:
            return None
        noise = keyed_generator(objective.seed, step, _ATTENTION)
        return annealed_attention(width, (step + 1) / objective.anneal_steps, noise)
