"""The Trainer runs a `Stage` (its data and its loss) under accelerate: one process, DDP or FSDP2.

Schedule, data order and noise are functions of the settings and the step. So a checkpoint holds weights, optimiser,
averages and the step, and a killed run resumes bit for bit (on a CPU, with the same number of threads).
"""

import math
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import torch
from accelerate.state import AcceleratorState
from rich.console import Console
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffucoder.errors import ConfigError
from diffucoder.files import append_jsonl
from diffucoder.models.denoiser import Denoiser
from diffucoder.progress import progress
from diffucoder.training import checkpoints
from diffucoder.training.processes import reshard, rows_of_process, start_accelerator
from diffucoder.training.settings import TrainSettings

Figures = Mapping[str, tuple[Tensor | float, float]]
"""What to log: for each name the sum over some items, and their number. The log has the mean."""


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass trains on; stages add their tensors."""

    count: float  # this micro-batch's part of the divisor of the step's loss
    tokens: int  # positions the model sees, padding included


@dataclass(frozen=True)
class Batch:
    """What one optimiser step trains on, in one process."""

    micro_batches: Sequence[Any]  # Any: the stage's own MicroBatch
    figures: Figures = field(default_factory=dict)


@dataclass(frozen=True)
class Terms:
    """What a micro-batch adds to its step: a loss, which is still to be divided by the step's count, and figures."""

    loss: Tensor
    figures: Figures


class Stage(Protocol):
    """What a Trainer trains on. `shares` are this process's rows of a step, a range for each micro-batch."""

    held_out_rows: int
    shown: tuple[str, ...]  # figures in the progress bar, beside the loss

    def begin(self) -> dict[str, Tensor]:
        """Called once, before a checkpoint is read. Returns the tensors of its own that a checkpoint must hold."""

    def batches(self, step: int, shares: Sequence[range]) -> Iterator[Batch]:
        """The batches of the next steps, from `step` on; checkpoints are written only after the last of them."""

    def loss(self, model: nn.Module, micro: Any) -> Terms:
        """The loss of a micro-batch, and what to log of it."""

    def held_out(self, model: nn.Module, shares: Sequence[range]) -> Iterable[Figures]:
        """Figures of the held-out rows `shares`."""


class Trainer:
    """Trains `model` in place on `stage`; `train` returns when all steps are done."""

    def __init__(self, model: Denoiser, stage: Stage, settings: TrainSettings) -> None:
        """Open the run folder and load its newest checkpoint. ConfigError if the settings do not fit."""
        self.settings = settings
        self.stage = stage
        self.step = 0
        self.accelerator = start_accelerator(settings)
        self._shares = rows_of_process(settings, self.accelerator)
        checkpoints.open_run_folder(settings, write=self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()
        model.train()
        if settings.gradient_checkpointing:
            enable = getattr(model.model, "activation_checkpointing_enable", None)  # its name from transformers 5.20 on
            (enable or model.model.gradient_checkpointing_enable)({"use_reentrant": False})
        self.model, self.optimizer = self.accelerator.prepare(model, _optimizer(model, settings))
        self.average: dict[str, Tensor] = {}
        if settings.ema:
            self.average = copy_of_trained(self._whole_model())
        self._state = checkpoints.State(self.model, self.optimizer.optimizer, self.average, stage.begin())
        self._signal = 0  # the signal that this process received
        self._stopping = False  # whether any process received one
        self._window: dict[str, list[float]] = defaultdict(list)  # figures since the last line of the log
        self._logged_at = time.monotonic()
        if settings.resume:
            self.step = checkpoints.load_newest(settings.run, self._state, self.accelerator)
            if self.accelerator.is_main_process:
                print(_resumed(self.step, settings), file=sys.stderr)

    def train(self) -> Denoiser:
        """Run the remaining steps and return the model. A signal stops it after a step: checkpoint and SystemExit."""
        settings = self.settings
        self.accelerator.init_trackers("diffucoder", config={name: str(value) for name, value in settings})
        console = Console(stderr=True, quiet=not self.accelerator.is_main_process)
        heading = settings.run.name
        with (
            _stop_on_signals(self),
            progress(heading, settings.steps, done=self.step, unit="step", console=console) as update,
        ):
            while self.step < settings.steps:
                for batch in self.stage.batches(self.step, self._shares):
                    figures = self._train_step(batch)
                    self.step += 1
                    update(self.step, ", ".join(f"{name} {figures[name]:.3g}" for name in ("loss", *self.stage.shown)))
                    self._log(figures)
                if self._stopping or self.step % settings.save_every == 0 or self.step == settings.steps:
                    checkpoints.save(settings.run, self.step, self._state, self.accelerator, keep=settings.keep)
                if self._stopping:
                    message = f"stopped at step {self.step} of {settings.steps}; continue with --resume"
                    print(message, file=sys.stderr)
                    raise SystemExit(128 + (self._signal or signal.SIGTERM))
        model = self._whole_model()
        swap_trained(model, self.average)
        return model

    def _train_step(self, batch: Batch) -> dict[str, float]:
        settings = self.settings
        accelerator = self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * schedule(self.step, settings)
        micros = batch.micro_batches
        # one message between the processes: the divisor, the tokens seen, and whether anyone was told to stop
        count, tokens, signals = self._sum(
            [sum(micro.count for micro in micros), sum(micro.tokens for micro in micros), self._signal]
        )
        self._stopping |= signals > 0
        figures = [batch.figures]
        for number, micro in enumerate(micros, start=1):
            wait = accelerator.no_sync(self.model) if number < len(micros) else nullcontext()
            with wait, training_kernels(accelerator.device, bf16=settings.bf16):
                terms = self.stage.loss(self.model, micro)
                # gradients are averaged over processes, the loss is a sum over them
                accelerator.backward(terms.loss * (accelerator.num_processes / max(count, 1)))
            figures.append({"loss": (terms.loss.detach(), micro.count), **terms.figures})
        norm = float(accelerator.clip_grad_norm_(self.model.parameters(), settings.clip))
        if not math.isfinite(norm):  # before it spoils the weights, which the next checkpoint would keep
            raise ConfigError(f"grad_norm={norm} in step {self.step + 1}; start again with less than lr={settings.lr}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(settings.ema, (self.step + 1) / (self.step + 11))  # less at first, when weights change much
        if self.average:
            for name, parameter in trained_parameters(self._whole_model()):
                self.average[name].lerp_(parameter.detach(), 1 - decay)
        return self._means(figures) | {"grad_norm": norm, "tokens": tokens}

    def evaluate(self) -> dict[str, float]:
        """The stage's held-out figures, of the averaged weights if there are any."""
        shares = [
            range(first + share.start, first + share.stop)
            for first in range(0, self.stage.held_out_rows, self.settings.batch)
            for share in self._shares
        ]
        if not shares:
            return {}
        self.model.eval()
        swap_trained(self._whole_model(), self.average)
        with torch.no_grad():
            means = self._means(self.stage.held_out(self.model, shares))
        reshard(self.model)
        swap_trained(self._whole_model(), self.average)
        self.model.train()
        return {f"held_out_{name}": value for name, value in means.items()}

    def close(self) -> None:
        """End trackers and process group; another Trainer may then start in this process, with other settings."""
        self.accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)

    def _whole_model(self) -> Denoiser:
        """The model without what accelerate put around it."""
        model: Denoiser = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model

    def _sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes, exact for counts: in float64 on every device that has it."""
        device = self.accelerator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        total = self.accelerator.reduce(torch.tensor(values, dtype=dtype, device=device), "sum")
        return [float(value) for value in total.tolist()]

    def _means(self, collected: Iterable[Figures]) -> dict[str, float]:
        """The mean of each figure over all micro-batches and processes, with one device synchronisation."""
        sums: dict[str, Tensor] = {}
        numbers: dict[str, float] = defaultdict(float)
        for figures in collected:
            for name, (value, number) in figures.items():
                value = torch.as_tensor(value, dtype=torch.float32, device=self.accelerator.device)
                sums[name] = value + sums.get(name, 0)
                numbers[name] += number
        totals = self._sum([*torch.stack(list(sums.values())).tolist(), *numbers.values()])
        return {name: totals[at] / max(totals[len(sums) + at], 1) for at, name in enumerate(sums)}

    def _log(self, figures: Mapping[str, float]) -> None:
        """Keep the figures of a step, and write their means every `log_every` steps; evaluate when it is due."""
        settings = self.settings
        for name, value in figures.items():
            self._window[name].append(value)
        last = self.step == settings.steps
        evaluate = last or (settings.evaluate_every and self.step % settings.evaluate_every == 0)
        if not evaluate and self.step % settings.log_every:
            return
        seconds = time.monotonic() - self._logged_at
        tokens = sum(self._window.pop("tokens"))
        line = {name: sum(values) / len(values) for name, values in self._window.items()}
        line["lr"] = settings.lr * schedule(self.step - 1, settings)
        line["tokens"] = tokens
        line["tokens_per_second"] = tokens / seconds
        if evaluate:
            line |= self.evaluate()
        self._window.clear()
        self._logged_at = time.monotonic()
        self.accelerator.log(line, step=self.step)
        if self.accelerator.is_main_process:
            rounded = {name: round(value, 6) for name, value in line.items()}
            append_jsonl(settings.run / "metrics.jsonl", [{"step": self.step, **rounded}], sync=False)


def _resumed(step: int, settings: TrainSettings) -> str:
    if step == 0:
        return f"run={str(settings.run)!r} has no checkpoint; it starts at step 0"
    if step < settings.steps:
        return f"run={str(settings.run)!r} goes on after step {step} of {settings.steps}"
    return f"run={str(settings.run)!r} has all of its {step} steps; its model is written again (raise steps to go on)"


def schedule(step: int, settings: TrainSettings) -> float:
    """Share of the peak learning rate at `step`: linear warm-up, then a cosine down to `final_lr` at the end."""
    warmup = settings.warmup
    if warmup < 1:
        warmup *= settings.steps
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    done = (step - warmup) / max(1.0, settings.steps - warmup)
    return settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that are trained: all of them, or the adapters alone."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def copy_of_trained(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the trained weights as they are now."""
    return {name: parameter.detach().clone() for name, parameter in trained_parameters(model)}


@torch.no_grad()
def swap_trained(model: nn.Module, other: dict[str, Tensor]) -> None:
    """Exchange the trained weights with `other`, in place; nothing happens if `other` is empty."""
    for name, parameter in trained_parameters(model):
        if name in other:
            current = parameter.detach().clone()
            parameter.copy_(other[name])
            other[name].copy_(current)


def _optimizer(model: Denoiser, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    groups: dict[float, list[nn.Parameter]] = {}
    for _, parameter in trained_parameters(model):
        decay = settings.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault(decay, []).append(parameter)
    described = [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]
    return torch.optim.AdamW(described, lr=settings.lr, betas=settings.betas, fused=True)


@contextmanager
def training_kernels(device: torch.device, *, bf16: bool) -> Iterator[None]:
    """Attend by plain bfloat16 products on a CPU: they beat flash attention (benchmarks/results/training.md)."""
    if device.type != "cpu" or not bf16:
        yield
        return
    flags = torch.backends.cuda  # the flag, of every device, keeps torch from widening them to float32
    before = flags.fp16_bf16_reduction_math_sdp_allowed()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    flags.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        flags.allow_fp16_bf16_reduction_math_sdp(before)


@contextmanager
def _stop_on_signals(trainer: Trainer) -> Iterator[None]:
    """SIGINT and SIGTERM ask the trainer to stop after its step; a second one ends the process as usual."""
    handlers: dict[int, Any] = {}  # Any: whatever handler was there

    def request_stop(number: int, _frame: FrameType | None) -> None:
        trainer._signal = number
        signal.signal(number, handlers[number])

    for stop in (signal.SIGINT, signal.SIGTERM):
        handlers[stop] = signal.signal(stop, request_stop)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
