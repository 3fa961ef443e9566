"""The objective of `pretrain`, `adapt` and `sft`: noise on rows of tokens, cross-entropy on what is hidden.

All noise of a row is keyed by (seed, step, row): how a step is cut into micro-batches and processes changes nothing.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffucoder.diffusion import annealed_attention, corrupt, keyed_generator, loss_weights, sample_time
from diffucoder.training.settings import Normaliser, Times
from diffucoder.training.trainer import Batch, Figures, MicroBatch, Terms

HELD_OUT = -1  # stands for the step in the key of held-out noise, which is the same at every evaluation
_TIME, _ATTENTION, _ROW = range(3)  # the last number of a key: what is drawn


class Row(NamedTuple):
    """One example before noise: `tokens` (L,) int64 and which of them may be hidden, (L,) bool."""

    tokens: Tensor
    maskable: Tensor


class Rows(Protocol):
    """Where a stage's rows come from: functions of the step and the row's number in it, without a state."""

    def width(self, step: int) -> int:
        """How many tokens the rows of `step` are padded to."""

    def row(self, step: int, index: int) -> Row:
        """Row `index` of `step`, at most `width(step)` long."""


@dataclass(frozen=True)
class Objective:
    """How rows are noised; the settings are explained in `DiffusionSettings` and `AdaptSettings`."""

    mask_id: int
    pad_id: int
    seed: int
    batch: int  # rows of a step, over all micro-batches and processes
    first_scorable: int = 1  # tokens before it are never hidden (`Denoiser.first_scorable`)
    eps: float = 1e-3
    time: Times = "stratified"
    normaliser: Normaliser = "length"
    anneal_steps: int = 0
    autoregressive: bool = False  # score every token from its left
    block_causal: bool = False  # each block is noised after the clean text before it


@dataclass(frozen=True)
class MaskedMicro(MicroBatch):
    """A micro-batch, noised: B rows of T tokens, M of them scored."""

    noisy: Tensor  # (B, T) int64
    valid: Tensor | None  # (B, T) bool; None if all rows are T long
    attention: Tensor | None  # (T, T) bool; None if it is full
    clean: Tensor | None  # (B, T) int64, for block-causal models
    prompt_ends: Tensor  # (B,) int64: the first column that may be hidden
    rows: Tensor  # (M, 2) row and position of what is scored
    targets: Tensor  # (M,) int64
    weights: Tensor  # (M,) float32


class MaskedStage:
    """A `trainer.Stage` over `Rows`."""

    shown: tuple[str, ...] = ()

    def __init__(self, objective: Objective, rows: Rows, held_out: Rows | None, held_out_rows: int) -> None:
        """`held_out_rows` is rounded up to whole steps: then every process has as many of them."""
        self.objective = objective
        self.rows = rows
        self.held_out_source = held_out
        self.held_out_rows = 0
        if held_out is not None:
            self.held_out_rows = math.ceil(held_out_rows / objective.batch) * objective.batch

    def begin(self) -> dict[str, Tensor]:
        """No tensors: rows and noise are functions of the step."""
        return {}

    def batches(self, step: int, shares: Sequence[range]) -> Iterator[Batch]:
        yield Batch(self.micro_batches(step, shares))

    def micro_batches(self, step: int, shares: Sequence[range]) -> list[MaskedMicro]:
        """The rows `shares` of a step. Held-out rows always have the same noise and the `length` normaliser."""
        objective = self.objective
        if step == HELD_OUT and self.held_out_source is not None:
            times = self._times(step, self.held_out_rows)
            return [self._noised(self.held_out_source, step, share, times, "length") for share in shares]
        times = self._times(step, objective.batch)
        return [self._noised(self.rows, step, share, times, objective.normaliser) for share in shares]

    def loss(self, model: nn.Module, micro: MaskedMicro) -> Terms:
        """Weighted cross-entropy, summed; the logits exist in chunks only (`Denoiser.forward`)."""

        def score(logits: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
            targets = micro.targets[chunk].to(logits.device)
            logits = logits.float()  # for the argmax too, which is slow in bfloat16
            return F.cross_entropy(logits, targets, reduction="none"), (logits.argmax(-1) == targets).float()  # (m,)

        names = ("valid", "attention", "clean", "prompt_ends", "rows")
        inputs = {name: getattr(micro, name) for name in names}
        cost, right = model(micro.noisy, **inputs, reduce=score)  # (M,) each
        loss = (cost * micro.weights.to(cost.device)).sum()
        scored = len(micro.targets)
        return Terms(loss, {"unweighted": (cost.detach().sum(), scored), "accuracy": (right.detach().sum(), scored)})

    def held_out(self, model: nn.Module, shares: Sequence[range]) -> Iterator[Figures]:
        for micro in self.micro_batches(HELD_OUT, shares):
            terms = self.loss(model, micro)
            yield {"loss": (terms.loss, micro.count), **terms.figures}

    def _times(self, step: int, rows: int) -> Tensor:
        """Noise levels of all rows of the step, (rows,): strata span processes and micro-batches."""
        objective = self.objective
        if objective.autoregressive:
            return torch.ones(rows)
        noise = keyed_generator(objective.seed, step, _TIME)
        return sample_time(rows, generator=noise, eps=objective.eps, method=objective.time)

    def _noised(self, source: Rows, step: int, share: range, times: Tensor, normaliser: str) -> MaskedMicro:
        """The rows `share` of a step as a micro-batch; `times` has the noise levels of all rows of the step."""
        objective = self.objective
        width = source.width(step)
        tokens = torch.full((len(share), width), objective.pad_id)
        maskable = torch.zeros(len(share), width, dtype=torch.bool)
        valid = torch.zeros(len(share), width, dtype=torch.bool)
        for at, index in enumerate(share):
            row = source.row(step, index)
            length = len(row.tokens)
            tokens[at, :length] = row.tokens
            maskable[at, :length] = row.maskable
            valid[at, :length] = True
        maskable[:, : objective.first_scorable] = False  # clean and unscored, as at decoding
        times = times[share.start : share.stop]
        noise = [keyed_generator(objective.seed, step, index, _ROW) for index in share]
        noisy, hidden = corrupt(tokens, maskable, times, objective.mask_id, noise)
        weights, count = loss_weights(hidden, times, maskable, normaliser=normaliser)
        return MaskedMicro(
            count=count,
            tokens=tokens.numel(),
            noisy=tokens if objective.autoregressive else noisy,
            valid=None if valid.all() else valid,
            attention=self._attention(step, width),
            clean=tokens if objective.block_causal else None,
            prompt_ends=maskable.int().argmax(-1),
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
