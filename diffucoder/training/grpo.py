"""Stage 4: coupled-GRPO, reinforcement learning on problems with tests (DiffuCoder §5, appendix B.1).

A round (`GrpoStage.batches`): the model writes `group` completions for each problem, and their programs are tested. A
completion's advantage says how much better it is than its group. Then `iterations` optimiser steps raise the scores of
the better ones. The score of a token estimates its log-probability from a few noisy views of the completion
(`diffusion.score_views`). The step, the row and the seed fix the masks. They are the same for the policy, for the
policy that wrote the completion and for the reference. docs/rl.md lists what differs from the released trainer.
"""

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path

import torch
from accelerate.utils import reduce
from torch import Tensor, nn

from diffucoder.decoding.coder import DiffuCoder
from diffucoder.diffusion import View, keyed_generator, score_views
from diffucoder.errors import ConfigError
from diffucoder.grading.asserts import parse_all
from diffucoder.grading.constants import passing_constants
from diffucoder.grading.sandbox import Sandbox
from diffucoder.models.denoiser import Denoiser
from diffucoder.training import objectives
from diffucoder.training.exercises import Exercise, read_exercises
from diffucoder.training.processes import first_process, gathered
from diffucoder.training.rollouts import Completion, Rollouts, write_samples
from diffucoder.training.run import check_length, load_start, train_and_export
from diffucoder.training.settings import GrpoSettings
from diffucoder.training.trainer import (
    Batch,
    Figures,
    MicroBatch,
    Terms,
    copy_of_trained,
    swap_trained,
    trained_parameters,
    training_kernels,
)

_MASKS, _RATIOS = 40, 41  # the last number of a key of noise: what is drawn


@dataclass(frozen=True)
class GrpoMicroBatch(MicroBatch):
    """Completions that one forward pass learns from."""

    batch: objectives.CompletionBatch
    views: list[View]
    advantage: Tensor  # (B,)
    weight: Tensor  # (B, T)
    old: Tensor | None = None  # (B, T) scores of the policy that wrote them; None: the policy's own, in the first step
    reference: Tensor | None = None  # (B, T) scores of the reference, if there is a KL term


@dataclass
class GrpoStage:
    """A `trainer.Stage` that learns from what the model itself has just written."""

    denoiser: Denoiser
    rollouts: Rollouts
    exercises: Sequence[Exercise]
    held_out_exercises: Sequence[Exercise]
    settings: GrpoSettings
    reference: dict[str, Tensor] = field(default_factory=dict)
    shown: tuple[str, ...] = ("reward", "solved")

    def __post_init__(self) -> None:
        self.held_out_exercises = self.held_out_exercises[: self.settings.held_out_rows]
        self.held_out_rows = len(self.held_out_exercises)

    def begin(self) -> dict[str, Tensor]:
        """Make the reference of the KL term: a copy of what is trained, so of the adapters alone if there are any."""
        if self.settings.kl:
            self.reference = copy_of_trained(self.denoiser)
        return self.reference

    def batches(self, step: int, shares: Sequence[range]) -> Iterator[Batch]:
        """One round of coupled-GRPO, which ends with a batch for each of `iterations` updates."""
        rows = [row for share in shares for row in share]
        with self.ready_to_decode():  # roll out and reward
            completions, seconds = self.rollouts.of_round(self.exercises, step // self.settings.iterations, rows)
        advantage = self.advantages(completions, rows)
        began = time.perf_counter()
        updates = self.scored_micro_batches(step, shares, dict(zip(rows, completions, strict=True)), advantage)
        seconds["scoring_seconds"] = time.perf_counter() - began
        figures = self.figures(completions, advantage, seconds)
        figures["scored_share"] = (sum(len(micro.advantage) for micro in updates[0]), len(rows))
        self._write_samples(step, completions, advantage[rows].tolist())
        for iteration, micros in enumerate(updates):
            yield Batch(micros, figures)  # the trainer updates the policy
            self._update_reference(step + iteration + 1)

    def advantages(self, completions: Sequence[Completion], rows: Sequence[int]) -> Tensor:
        """The advantage of every completion of the step, (batch,); `completions` are its `rows`, of this process."""
        settings = self.settings
        rewards = torch.zeros(settings.batch)
        rewards[rows] = torch.tensor([completion.reward.total for completion in completions])
        rewards = reduce(rewards.to(self.denoiser.device), "sum").cpu()  # groups may span processes
        baseline = settings.advantage
        gains = objectives.advantages(rewards, settings.group, baseline=baseline, scale=settings.scale_rewards)
        return gains.where(gains > 0, settings.negative_weight * gains)

    def scored_micro_batches(
        self, step: int, shares: Sequence[range], completions: Mapping[int, Completion], advantage: Tensor
    ) -> list[list[GrpoMicroBatch]]:
        """The micro-batches of each update of a round, with the scores that the loss compares the policy's with."""
        updates = []
        for iteration in range(self.settings.iterations):
            micros = []
            for share in shares:
                micro = self.micro_batch(step + iteration, share, completions, advantage)
                if iteration:  # the first update starts from the very policy that wrote the completions
                    micro = replace(micro, old=self.score_now(micro))
                micros.append(micro)
            updates.append(micros)
        if self.reference:
            swap_trained(self.denoiser, self.reference)
            updates = [[replace(m, reference=self.score_now(m)) for m in micros] for micros in updates]
            swap_trained(self.denoiser, self.reference)
        return updates

    def micro_batch(
        self, step: int, share: range, completions: Mapping[int, Completion], advantage: Tensor
    ) -> GrpoMicroBatch:
        """The rows `share` of the completions; without a KL term, those without an advantage are counted alone."""
        settings = self.settings
        new_tokens = settings.decoding.new_tokens
        lengths = [new_tokens if settings.score_padding else completions[row].length for row in share]
        count = objectives.reduction_count(lengths, new_tokens, reduction=settings.reduction)
        rows = [row for row in share if settings.kl or advantage[row]]
        rows = rows or [share.start]  # the other processes wait for this one
        batch = objectives.collate(
            [completions[row].generation for row in rows],
            pad_id=self.rollouts.coder.tokenizer.pad_id,
            score_padding=settings.score_padding,
        )
        views = self.views(step, rows, batch)
        weight = objectives.reduction_weights(batch.scored, reduction=settings.reduction)
        return GrpoMicroBatch(count, batch.tokens.numel() * len(views), batch, views, advantage[rows], weight)

    def views(self, step: int, rows: Sequence[int], batch: objectives.CompletionBatch) -> list[View]:
        """The masks of an optimiser step, keyed by it and the row, or the row's problem."""
        settings = self.settings
        low, high = settings.mask_ratio
        ratios = []
        masks = []
        for row in rows:
            number = row // settings.group if settings.group_masks else row
            masks.append(keyed_generator(settings.seed, step, number, _MASKS))
            if settings.ratio_per == "step":
                number = -1
            noise = keyed_generator(settings.seed, step, number, _RATIOS)
            ratios.append(low + (high - low) * torch.rand(settings.pairs, 2, generator=noise))  # (L, 2)
        prompt = batch.valid & ~batch.completion
        return score_views(batch.completion, prompt, torch.stack(ratios, 1), masks, estimator=settings.estimator)

    def score(self, model: nn.Module, micro: GrpoMicroBatch) -> Tensor:
        """The scores of a micro-batch's tokens, (B, T)."""
        block_causal = self.denoiser.attention.block is not None
        mask_id = self.denoiser.mask_id
        return objectives.token_scores(model, micro.batch, micro.views, mask_id=mask_id, block_causal=block_causal)

    def score_now(self, micro: GrpoMicroBatch) -> Tensor:
        """As `score`, without gradients, by the kernels that learning uses."""
        with torch.no_grad(), training_kernels(self.denoiser.device, bf16=self.settings.bf16):
            return self.score(self.denoiser, micro)

    def loss(self, model: nn.Module, micro: GrpoMicroBatch) -> Terms:
        """The clipped objective plus the KL term, each token by its weight; the trainer divides by the step's count."""
        settings = self.settings
        score = self.score(model, micro)
        scored = micro.batch.scored.to(score.device)
        loss, logged = objectives.clipped_loss(
            score,
            score.detach() if micro.old is None else micro.old,
            micro.advantage.to(score.device),
            low=settings.epsilon_low,
            high=settings.epsilon_high,
        )
        if micro.reference is not None:
            logged["kl"] = objectives.k3(score, micro.reference)
            loss = loss + settings.kl * logged["kl"]
        tokens = int(scored.sum())
        figures = {name: ((value.detach() * scored).sum(), tokens) for name, value in logged.items()}
        return Terms((loss * micro.weight.to(score.device)).sum(), figures)

    def held_out(self, model: nn.Module, shares: Sequence[range]) -> Iterator[Figures]:
        """Greedy answers to held-out problems: the share solved, and the mean share of tests passed."""
        rows = [row for share in shares for row in share if row < len(self.held_out_exercises)]
        exercises = [self.held_out_exercises[row] for row in rows]
        with self.ready_to_decode():
            completions, _ = self.rollouts.write(exercises, self.rollouts.greedy, rows)
        yield {
            "pass@1": (sum(completion.reward.solved for completion in completions), len(rows)),
            "pass_rate": (sum(completion.reward.pass_rate for completion in completions), len(rows)),
        }

    def figures(
        self, completions: Sequence[Completion], advantage: Tensor, seconds: dict[str, float]
    ) -> dict[str, tuple[float, float]]:
        """What to log of a round: sums and numbers."""
        figures: dict[str, tuple[float, float]] = {name: (value, 1) for name, value in seconds.items()}
        rows = [completion.figures for completion in completions]
        for name in rows[0]:
            values = [row[name] for row in rows if not math.isnan(row[name])]
            figures[name] = (sum(values), len(values))
        flat = (advantage.view(-1, self.settings.group) == 0).all(1)
        figures["zero_variance"] = (float(flat.sum()), len(flat))
        return figures

    @contextmanager
    def ready_to_decode(self) -> Iterator[None]:
        """The model with its fast layers, and whole, since processes take different numbers of forward passes."""
        dtype = torch.bfloat16 if self.settings.bf16 else self.denoiser.dtype
        self.denoiser.eval()
        try:
            with gathered(self.denoiser), self.denoiser.fast_snapshot(dtype):
                yield
        finally:
            self.denoiser.train()

    @torch.no_grad()
    def _update_reference(self, step: int) -> None:
        """Mix the policy into the reference if `step`, which comes next, is due for it."""
        every = self.settings.reference_every
        if self.reference and every and step % every == 0:
            for name, parameter in trained_parameters(self.denoiser):
                self.reference[name].lerp_(parameter.detach(), self.settings.reference_mix)

    def _write_samples(self, step: int, completions: Sequence[Completion], advantages: Sequence[float]) -> None:
        every = self.settings.samples_every
        due = step // every != (step - self.settings.iterations) // every
        if due and first_process():
            write_samples(self.settings.run, step + 1, completions, advantages, self.rollouts.coder.tokenizer)


def usable(exercises: Sequence[Exercise], name: str) -> list[Exercise]:
    """The exercises of the setting `name`, with only the tests that a program cannot tamper with.

    A test that cannot be split into a call and an expected value runs beside the program: its reward could be hacked.
    Left out, too, are exercises that a constant solves. All is counted on stderr. ConfigError if nothing is left.
    """
    kept = []
    dropped = 0
    lost = 0
    solved = 0
    for exercise in exercises:
        tests = tuple(compress(exercise.tests, parse_all(exercise.tests)))
        dropped += len(exercise.tests) - len(tests)
        if not tests:
            lost += 1
        elif passing_constants(tests):
            solved += 1
        else:
            kept.append(replace(exercise, tests=tests))
    if dropped and first_process():
        left_out = f"{dropped:,} tests that a program could tamper with, and {lost:,} problems with no other"
        print(f"{name}: left out {left_out}", file=sys.stderr)
    if solved and first_process():
        print(f"{name}: left out {solved:,} problems whose tests a constant passes", file=sys.stderr)
    if not kept:
        raise ConfigError(f"{name} has no usable test in {len(exercises)} problems; write them as assert f(2) == 4")
    return kept


def grpo(settings: GrpoSettings) -> Path:
    """Run the stage, or resume it, and return the folder of the trained model."""
    exercises = usable(read_exercises(settings.data), "data")
    held_out = usable(read_exercises(settings.held_out), "held_out") if settings.held_out else []
    denoiser, tokenizer = load_start(settings)
    longest = settings.prompt_tokens + settings.decoding.new_tokens
    check_length(denoiser, "prompt_tokens + decoding.new_tokens", longest)
    if denoiser.trained_length is not None:
        denoiser.trained_length = max(longest, denoiser.trained_length)
    with Sandbox(settings.workers or None) as sandbox:
        coder = DiffuCoder(denoiser, tokenizer, name=str(settings.model or "tiny"))
        stage = GrpoStage(denoiser, Rollouts(coder, settings, sandbox), exercises, held_out, settings)
        return train_and_export(denoiser, tokenizer, stage, settings)
