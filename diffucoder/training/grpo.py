"""Stage 4: coupled-GRPO, reinforcement learning on problems with tests (DiffuCoder §5, appendix B.1).

A batch of completions is decoded and graded, `group` for each problem; each is better or worse than its group by its
advantage; then `iterations` optimiser steps raise the scores of the better ones. The score of a token, which stands for
its log-probability, comes from a few noisy looks at the completion (`diffusion.score_views`). The step, the row and the
seed fix its masks: they are the same for the policy, for the policy that wrote the completion and for the reference.

Differences from the released trainer, each a defect there: every optimiser step draws masks of its own; prompts keep
their padding mask, positions and header; generators are private; metrics are means over tokens; a KL weight works with
one iteration; held-out problems are evaluated. `ratio_per="step"`, `advantage="leave_one_out"`, `temperature=1.0` and
`reference_mix=0.6` are as released, the defaults as in the paper or, for `ratio_per`, better.

The first half is pure functions on tensors: B completions of T positions, left padding and prompt included.
"""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from diffucoder.decoding.generate import DiffuCoder
from diffucoder.diffusion import View, keyed_generator, score_views
from diffucoder.errors import ConfigError
from diffucoder.grading.asserts import parse
from diffucoder.grading.sandbox import Sandbox
from diffucoder.models.denoiser import Denoiser, set_causal
from diffucoder.training import samples
from diffucoder.training.exercises import Exercise, read_exercises
from diffucoder.training.kernels import training_kernels
from diffucoder.training.processes import first_process, gathered
from diffucoder.training.rollouts import Completion, Graded, Rollouts
from diffucoder.training.run import check_length, load_start, train_and_export
from diffucoder.training.settings import GrpoSettings
from diffucoder.training.trainer import Micro, Terms

_MASKS, _RATIOS = 40, 41  # the last number of a key of noise: what is drawn


def advantages(rewards: Tensor, group: int, *, baseline: str = "mean", scale: bool = False) -> Tensor:
    """How much better each completion is than its group: (B,) from rewards (B,), `group` consecutive ones at a time.

    `mean` subtracts the group's mean; `leave_one_out` that of the others, which is G/(G-1) times as much. `scale`
    divides by the group's standard deviation (plus 1e-4). They add up to zero in every group.
    """
    grouped = rewards.view(-1, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    # exactly 0 where all are equal, whatever their mean rounds to
    centred = centred.masked_fill((grouped == grouped[:, :1]).all(1, keepdim=True), 0)
    if baseline == "leave_one_out":
        centred = centred * (group / (group - 1))
    if scale:
        centred = centred / (grouped.std(1, keepdim=True) + 1e-4)
    return centred.flatten()


_STEEPEST = 20.0  # of a log-ratio: beyond it the exponential, or its gradient, would be no number


def k3(score: Tensor, reference: Tensor) -> Tensor:
    """Schulman's estimate of KL(policy || reference) from log-probabilities of the policy's samples; never negative."""
    difference = (reference - score).clamp(-_STEEPEST, _STEEPEST)
    return difference.exp() - difference - 1


@dataclass(frozen=True)
class Clipped:
    """The clipped objective of each token, and what it did: (B, T) each."""

    loss: Tensor
    ratio: Tensor
    low: Tensor  # bool: the gradient is cut, a bad completion being unlikely enough
    high: Tensor  # bool: a good one being likely enough


def clipped_loss(
    score: Tensor, old: Tensor, advantage: Tensor, scored: Tensor, *, low: float, high: float, level: str = "token"
) -> Clipped:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A), with ratio = exp(score - old), (B, T) each; `advantage` is (B,).

    With `level="sequence"` the ratio is a completion's: the exponential of the mean over its `scored` (B, T) tokens.
    """
    log_ratio = score - old
    if level == "sequence":
        mean = (log_ratio * scored).sum(-1, keepdim=True) / scored.sum(-1, keepdim=True).clamp(min=1)
        log_ratio = mean.expand_as(log_ratio)
    ratio, gain = log_ratio.clamp(-_STEEPEST, _STEEPEST).exp(), advantage[:, None]
    loss = -torch.minimum(ratio * gain, ratio.clamp(1 - low, 1 + high) * gain)
    return Clipped(loss, ratio, (ratio < 1 - low) & (gain < 0), (ratio > 1 + high) & (gain > 0))


def reduction_weights(scored: Tensor, new_tokens: int, *, reduction: str) -> tuple[Tensor, float]:
    """What each token's loss counts, (B, T), and this micro-batch's share of the divisor of the step's sum."""
    if reduction == "token":
        return scored.float(), float(scored.sum())
    if reduction == "sequence":
        return scored / scored.sum(-1, keepdim=True).clamp(min=1), float(len(scored))
    return scored.float(), float(len(scored) * new_tokens)


def score(model: nn.Module, batch: "Batch", views: Sequence[View], *, mask_id: int, temperature: float = 1.0) -> Tensor:
    """The score of every token that counts, (B, T) float32, 0 elsewhere: one forward pass over all views at once."""
    tokens = torch.cat([batch.tokens.masked_fill(view.masked, mask_id) for view in views])  # (V * B, T)
    weight = torch.cat([view.weight * batch.scored for view in views])  # (V * B, T)
    wanted = weight > 0
    targets = batch.tokens.repeat(len(views), 1)[wanted]  # (M,)

    def log_prob(logits: Tensor, chunk: slice) -> Tensor:
        here = targets[chunk].to(logits.device)
        return -F.cross_entropy(logits.float() / temperature, here, reduction="none")  # (m,)

    found = model(
        tokens,
        valid=None if batch.valid is None else batch.valid.repeat(len(views), 1),
        attention=batch.attention,
        rows=wanted.nonzero(),
        reduce=log_prob,
    )  # (M,)
    weighted = found * weight[wanted].to(found.device)
    sums = torch.zeros(wanted.shape, device=found.device, dtype=torch.float32)
    sums = sums.masked_scatter(wanted.to(found.device), weighted)
    return sums.view(len(views), *batch.tokens.shape).sum(0)


# --- the stage -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Completions behind their prompts, left-padded."""

    tokens: Tensor  # (B, T) int64
    valid: Tensor | None  # (B, T) bool, where some row is padded
    completion: Tensor  # (B, T) bool
    scored: Tensor  # (B, T) bool: up to and including the first terminator, or the pads behind it too
    attention: Tensor | None = None  # (T, T) bool, where it is not full


@dataclass(frozen=True)
class GrpoMicro(Micro):
    """A micro-batch of one inner iteration."""

    batch: Batch
    views: list[View]
    advantage: Tensor  # (B,)
    weight: Tensor  # (B, T)
    figures: dict[str, tuple[Tensor, int]]
    old: Tensor | None = None  # (B, T); None in the first iteration, where it is the policy's own
    reference: Tensor | None = None  # (B, T), with a KL weight


class GrpoStage:
    """A `trainer.Stage`: what is learnt from is what the model itself has just written."""

    shown: tuple[str, ...] = ("reward", "solved")

    def __init__(
        self,
        denoiser: Denoiser,
        rollouts: Rollouts,
        exercises: Sequence[Exercise],
        held_out: Sequence[Exercise],
        settings: GrpoSettings,
    ) -> None:
        self.denoiser, self.rollouts, self.settings = denoiser, rollouts, settings
        self.exercises, self._held_out = exercises, held_out[: settings.held_out_rows]
        self.stride = settings.iterations
        self.held_out_rows = -(-len(self._held_out) // settings.batch) * settings.batch
        self._reference: dict[str, Tensor] = {}
        self._micros: list[list[GrpoMicro]] = []  # of each inner iteration

    def begin(self) -> dict[str, Tensor]:
        """The reference: a copy of what is trained, so of the adapters alone where there are some."""
        if self.settings.kl:
            self._reference = {name: p.detach().clone() for name, p in self._trained()}
        return self._reference

    def prepare(self, step: int, shares: Sequence[range]) -> Sequence[GrpoMicro]:
        """The micro-batches of an optimiser step; at the first of every `iterations` they are written anew."""
        outer, inner = divmod(step, self.settings.iterations)
        every = self.settings.reference_every
        if self._reference and every and step and step % every == 0:
            for name, parameter in self._trained():
                self._reference[name].lerp_(parameter.detach(), self.settings.reference_mix)
        if inner == 0:
            self._micros = self._collect(outer, shares)
        return self._micros[inner]

    def loss(self, model: nn.Module, micro: GrpoMicro) -> Terms:
        """The clipped objective and the KL divergence, weighted; the divisor is the step's."""
        settings = self.settings
        now = self._score(model, micro)
        old = now.detach() if micro.old is None else micro.old
        scored = micro.batch.scored.to(now.device)
        terms = clipped_loss(
            now,
            old,
            micro.advantage.to(now.device),
            scored,
            low=settings.epsilon_low,
            high=settings.epsilon_high,
            level=settings.ratio,
        )
        loss, tokens = terms.loss, int(scored.sum())
        figures = dict(micro.figures)
        for name, value in (("ratio", terms.ratio), ("clip_low", terms.low), ("clip_high", terms.high)):
            figures[name] = ((value.detach() * scored).sum(), tokens)
        if micro.reference is not None:
            kl = k3(now, micro.reference)
            loss = loss + settings.kl * kl
            figures["kl"] = ((kl.detach() * scored).sum(), tokens)
        return Terms((loss * micro.weight.to(now.device)).sum(), figures)

    def held_out(self, model: nn.Module, shares: Sequence[range]) -> Iterator[tuple[float, Terms]]:
        """Greedy answers to held-out problems: the share solved, and the mean share of tests passed."""
        rows = [row for share in shares for row in share if row < len(self._held_out)]
        with self._decoding():
            graded = self.rollouts.of([self._held_out[row] for row in rows], self.rollouts.greedy, rows)
        device = self.denoiser.device
        figures = {
            "pass@1": torch.tensor(float(sum(r.solved for r in graded.rewards)), device=device),
            "pass_rate": torch.tensor(sum(r.pass_rate for r in graded.rewards), device=device),
        }
        yield 0.0, Terms(None, {name: (value, len(rows)) for name, value in figures.items()})

    # --- one batch of completions ---

    def _collect(self, outer: int, shares: Sequence[range]) -> list[list[GrpoMicro]]:
        """Decode, grade and score a batch: the micro-batches of each of its inner iterations."""
        settings = self.settings
        rows = [row for share in shares for row in share]
        with self._decoding():
            graded = self.rollouts.of_step(self.exercises, outer, rows)
        totals = torch.zeros(settings.batch)
        totals[rows] = torch.tensor([given.total for given in graded.rewards])
        totals = summed(totals, self.denoiser.device)  # groups may span processes
        gains = advantages(totals, settings.group, baseline=settings.advantage, scale=settings.scale_rewards)
        gains = gains.where(gains > 0, settings.negative_weight * gains)
        self._write_samples(outer, graded, gains[rows].tolist())
        began, made = time.perf_counter(), []
        for inner in range(settings.iterations):
            step = outer * settings.iterations + inner
            parts = zip(shares, graded.split(shares), strict=True)
            micros = [self._micro(step, share, part, gains) for share, part in parts]
            # the first iteration begins with the very policy that wrote the completions
            made.append([replace(micro, old=self._score_now(micro)) for micro in micros] if inner else micros)
        if self._reference:
            with self._referring():
                made = [[replace(micro, reference=self._score_now(micro)) for micro in each] for each in made]
        flat = (gains.view(-1, settings.group) == 0).all(1).float()
        scored = sum(len(micro.advantage) for micros in made for micro in micros) / (len(made) * len(rows))
        figures = {
            "decoding_seconds": graded.decoding_seconds,
            "waiting_seconds": graded.waiting_seconds,
            "grading_seconds": sum(given.seconds for given in graded.rewards),
            "scoring_seconds": time.perf_counter() - began,
            "zero_variance": float(flat.mean()),
            "scored_share": scored,
        }
        for micros in made:
            micros[0].figures.update({n: (torch.tensor(v, device=self.denoiser.device), 1) for n, v in figures.items()})
        return made

    def _micro(self, step: int, share: range, graded: Graded, gains: Tensor) -> GrpoMicro:
        settings, gains = self.settings, gains[share.start : share.stop]
        batch = collate(
            graded.completions, pad_id=self.rollouts.coder.tokenizer.pad_id, score_padding=settings.score_padding
        )
        if settings.estimator == "causal":
            views = [View(torch.zeros_like(batch.completion), batch.completion.float())]
            length = batch.tokens.shape[1]
            batch = replace(batch, attention=torch.ones(length, length, dtype=torch.bool).tril())
        else:
            views = self._views(step, share, batch)
        weight, count = reduction_weights(batch.scored, settings.new_tokens, reduction=settings.reduction)
        figures = _figures(graded, self.denoiser.device)
        if not settings.kl:  # without a KL term a completion like the rest of its group teaches nothing: leave it out
            kept = gains.nonzero()[:, 0] if gains.any() else torch.tensor([0])  # one row, for processes wait for it
            batch, views = batch_rows(batch, kept), [View(v.masked[kept], v.weight[kept]) for v in views]
            gains, weight = gains[kept], weight[kept]
        return GrpoMicro(
            count=count,
            tokens=batch.tokens.numel() * len(views),
            batch=batch,
            views=views,
            advantage=gains,
            weight=weight,
            figures=figures,
        )

    def _views(self, step: int, share: range, batch: Batch) -> list[View]:
        """The masks of an optimiser step, keyed by it and the row, or the row's problem."""
        settings = self.settings
        low, high = settings.mask_ratio
        numbers = [row // settings.group for row in share] if settings.group_masks else list(share)
        keys = [(settings.seed, step, -1 if settings.ratio_per == "step" else n, _RATIOS) for n in numbers]
        drawn = [torch.rand(settings.pairs, 2, generator=keyed_generator(*key)) for key in keys]  # (L, 2) each
        valid = torch.ones_like(batch.completion) if batch.valid is None else batch.valid
        return score_views(
            batch.completion,
            valid & ~batch.completion,
            low + (high - low) * torch.stack(drawn, 1),  # (L, B, 2)
            [keyed_generator(settings.seed, step, number, _MASKS) for number in numbers],
            estimator=settings.estimator,  # type: ignore[arg-type]  # causal has no masks
            prompt_mask=settings.prompt_mask,
        )

    def _score_now(self, micro: GrpoMicro) -> Tensor:
        """As `_score`, with nothing to learn from it, by the kernels that learning uses."""
        with torch.no_grad(), training_kernels(self.denoiser.device, bf16=self.settings.bf16):
            return self._score(self.denoiser, micro)

    def _score(self, model: nn.Module, micro: GrpoMicro) -> Tensor:
        temperature = self.settings.score_temperature
        return score(model, micro.batch, micro.views, mask_id=self.denoiser.mask_id, temperature=temperature)

    @contextmanager
    def _referring(self) -> Iterator[None]:
        """The reference's weights in the place of the policy's."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._trained():
            policy = parameter.detach().clone()
            parameter.copy_(self._reference[name])
            self._reference[name].copy_(policy)

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """The model as decoding wants it: in one piece, since processes take unlike numbers of passes, and lean."""
        dtype = torch.bfloat16 if self.settings.bf16 else self.denoiser.dtype
        self.denoiser.eval()
        try:
            with gathered(self.denoiser), self.denoiser.lean_snapshot(dtype):
                yield
        finally:
            self.denoiser.train()

    def _trained(self) -> Iterable[tuple[str, Tensor]]:
        return ((name, p) for name, p in self.denoiser.named_parameters() if p.requires_grad)

    def _write_samples(self, outer: int, graded: Graded, gains: Sequence[float]) -> None:
        step, every = outer * self.settings.iterations, self.settings.samples_every
        due = step // every != (step - self.settings.iterations) // every
        if due and first_process():
            tokenizer = self.rollouts.coder.tokenizer
            samples.write(self.settings.run, list(samples.lines(step + 1, graded, gains, tokenizer)))


def collate(completions: Sequence[Completion], *, pad_id: int, score_padding: bool = False) -> Batch:
    """Prompts and completions as tensors, prompts left-padded to the longest.

    What is scored ends with the first terminator, or with `score_padding` at the canvas's end.
    """
    new = len(completions[0].tokens)
    longest = max(len(each.prompt) for each in completions)
    rows = [[pad_id] * (longest - len(c.prompt)) + c.prompt + c.tokens for c in completions]
    prompts = torch.tensor([len(c.prompt) for c in completions])[:, None]  # (B, 1)
    lengths = torch.tensor([c.length for c in completions])[:, None]  # (B, 1)
    position = torch.arange(longest + new)  # (T,)
    valid = position >= longest - prompts  # (B, T)
    completion = (position >= longest).expand_as(valid)
    return Batch(
        tokens=torch.tensor(rows),
        valid=None if valid.all() else valid,
        completion=completion,
        scored=completion if score_padding else completion & (position < longest + lengths),
    )


def batch_rows(batch: Batch, rows: Tensor) -> Batch:
    """Some rows of a batch."""
    return replace(
        batch,
        tokens=batch.tokens[rows],
        valid=None if batch.valid is None else batch.valid[rows],
        completion=batch.completion[rows],
        scored=batch.scored[rows],
    )


def summed(values: Tensor, device: torch.device) -> Tensor:
    """Sums over the processes."""
    if not dist.is_initialized():
        return values
    there = values.to(device)
    dist.all_reduce(there)
    return there.cpu()


def _figures(graded: Graded, device: torch.device) -> dict[str, tuple[Tensor, int]]:
    """Means over completions."""
    rewards, completions = graded.rewards, graded.completions
    orders = [c.ar_ness for c in completions]
    columns: dict[str, list[float]] = {
        "reward": [r.total for r in rewards],
        "format": [r.format for r in rewards],
        "pass_rate": [r.pass_rate for r in rewards],
        "solved": [float(r.solved) for r in rewards],
        "length": [float(c.length) for c in completions],
        "tokens_per_forward": [c.length / max(1, c.forward_passes) for c in completions],
        "local_ar_ness": [local for local, _ in orders if not math.isnan(local)],
        "global_ar_ness": [overall for _, overall in orders if not math.isnan(overall)],
    }
    return {name: (torch.tensor(sum(values), device=device), len(values)) for name, values in columns.items()}


def usable(exercises: Sequence[Exercise], name: str) -> list[Exercise]:
    """The exercises of the setting `name` with the tests that a program cannot tamper with; tells what was left out.

    A test that cannot be split into a call and what is expected of it runs beside the program: a reward to be hacked.
    ConfigError where nothing is left.
    """
    kept, dropped = [], 0
    for each in exercises:
        tests = tuple(test for test in each.tests if parse(test) is not None)
        dropped += len(each.tests) - len(tests)
        if tests:
            kept.append(Exercise(each.id, each.prompt, tests, each.source))
    if dropped and first_process():
        lost = len(exercises) - len(kept)
        message = f"left out {dropped:,} tests that a program could tamper with, and {lost:,} problems with no other"
        Console(stderr=True).print(f"{name}: {message}", soft_wrap=True)
    if not kept:
        raise ConfigError(f"{name} has no usable test in {len(exercises)} problems; write them as assert f(2) == 4")
    return kept


def grpo(settings: GrpoSettings) -> Path:
    """Run the stage, or go on with it, and return the folder of the trained model."""
    exercises = usable(read_exercises(settings.data), "data")
    held_out = usable(read_exercises(settings.held_out), "held_out") if settings.held_out else []
    denoiser, tokenizer = load_start(settings)
    check_length(denoiser, "prompt_tokens + new_tokens", settings.prompt_tokens + settings.new_tokens)
    if settings.estimator == "causal":
        set_causal(denoiser.model, True)
    with Sandbox(settings.workers or None) as sandbox:
        coder = DiffuCoder(denoiser, tokenizer, name=str(settings.model or "tiny"))
        stage = GrpoStage(denoiser, Rollouts(coder, settings, sandbox), exercises, held_out, settings)
        return train_and_export(denoiser, tokenizer, stage, settings, parent=settings.estimator == "causal")
