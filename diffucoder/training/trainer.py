"""The Trainer: optimiser, schedule, accumulation, averages, metrics and exact resume, for any stage and any number of
processes.

For: running a `Stage` (what is learnt from, and its loss) under accelerate: one process, DDP or FSDP2, as
`accelerate launch` says. Not for: noise and losses (`masked`), data (`data`), files of a checkpoint (`checkpoints`).

Everything is a function of the settings and the step: schedule, data order, noise. So a checkpoint holds weights,
optimiser, averages and the step, and a run that is killed goes on bit for bit (on a CPU, with as many threads).
"""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import torch
from accelerate.state import AcceleratorState
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from diffucoder.errors import ConfigError
from diffucoder.models.denoiser import Denoiser
from diffucoder.training import checkpoints
from diffucoder.training.kernels import training_kernels
from diffucoder.training.processes import reshard, shares, start
from diffucoder.training.settings import TrainSettings

Figures = dict[str, float]


@dataclass(frozen=True)
class Micro:
    """What one forward pass trains on; stages add their tensors."""

    count: float  # this micro-batch's share of the divisor of the step's loss
    tokens: int  # positions the model sees, padding included


@dataclass(frozen=True)
class Terms:
    """What a micro-batch adds: a loss still to be divided by the step's count, and (sum, number) of logged means."""

    loss: Tensor | None  # None: an evaluation without one
    figures: Mapping[str, tuple[Tensor, int]]


class Stage(Protocol):
    """What is trained on. `shares` are one process's rows of the step, a range for each micro-batch."""

    held_out_rows: int
    stride: int  # steps between which a checkpoint may be cut
    shown: tuple[str, ...]  # figures in the progress bar, beside the loss

    def begin(self) -> dict[str, Tensor]: ...  # once, before a checkpoint is read: tensors that checkpoints shall hold

    def prepare(self, step: int, shares: Sequence[range]) -> Sequence[Any]: ...  # Any: the stage's own Micro

    def held_out(self, model: nn.Module, shares: Sequence[range]) -> Iterable[tuple[float, Terms]]: ...  # with counts

    def loss(self, model: nn.Module, micro: Any) -> Terms: ...


class Trainer:
    """Trains `model` in place on `stage`; `train` returns when all steps are done."""

    def __init__(self, model: Denoiser, stage: Stage, settings: TrainSettings) -> None:
        """Claim the run folder and find the checkpoint to go on from. ConfigError where settings do not fit."""
        self.settings, self.stage, self.step = settings, stage, 0
        self.accelerator = start(settings)
        self._shares = shares(settings, self.accelerator)
        checkpoints.claim(settings, write=self.accelerator.is_main_process)  # all look, so that all refuse
        self.accelerator.wait_for_everyone()
        model.train()
        if settings.gradient_checkpointing:
            enable = getattr(model.model, "activation_checkpointing_enable", None)  # its name from transformers 5.20 on
            (enable or model.model.gradient_checkpointing_enable)({"use_reentrant": False})
        self.model, self.optimizer = self.accelerator.prepare(model, _optimizer(model, settings))
        self.average = {n: p.detach().clone() for n, p in self._trained()} if settings.ema else {}
        self._kept = stage.begin()
        self._signal, self._stopping = 0, False  # what this process was sent, what all of them agreed on
        self._window: dict[str, list[float]] = {}
        self._logged_at = time.monotonic()
        if settings.resume:
            self.step = checkpoints.load_newest(settings.run, self._state(), self.accelerator)

    def train(self) -> Denoiser:
        """Run the remaining steps. Returns the trained model, averaged where `ema` says so.

        SIGINT and SIGTERM end the step at hand, write a checkpoint and raise SystemExit.
        """
        settings = self.settings
        self.accelerator.init_trackers("diffucoder", config={name: str(value) for name, value in settings})
        with _signals(self), self._progress() as show:
            while self.step < settings.steps:
                figures = self._train_step()
                self.step += 1
                show(figures)
                self._log(figures)
                stopping = self._stopping and self.step % self.stage.stride == 0
                if stopping or self.step % settings.save_every == 0 or self.step == settings.steps:
                    checkpoints.save(settings.run, self.step, self._state(), self.accelerator, keep=settings.keep)
                if stopping:
                    message = f"stopped at step {self.step} of {settings.steps}; go on with --resume"
                    Console(stderr=True).print(message, soft_wrap=True)
                    raise SystemExit(128 + (self._signal or signal.SIGTERM))
        model: Denoiser = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        self._swap_averages()
        return model

    def _train_step(self) -> Figures:
        settings, accelerator = self.settings, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * schedule(self.step, settings)
        micros = self.stage.prepare(self.step, self._shares)
        # One sum over the processes tells the divisor, the tokens seen, and whether any process was asked to stop
        count, tokens, signals = self._sum([sum(m.count for m in micros), sum(m.tokens for m in micros), self._signal])
        self._stopping |= signals > 0
        sums: dict[str, Tensor] = {}
        for at, micro in enumerate(micros):
            wait = accelerator.no_sync(self.model) if at < len(micros) - 1 else nullcontext()
            with wait, training_kernels(accelerator.device, bf16=settings.bf16):
                terms = self.stage.loss(self.model, micro)
                # gradients are averaged over processes, the loss is a sum over them
                accelerator.backward(terms.loss * (accelerator.num_processes / max(count, 1)))
            _add(sums, terms)
        norm = float(accelerator.clip_grad_norm_(self.model.parameters(), settings.clip))
        if not math.isfinite(norm):  # before it spoils the weights, which the next checkpoint would keep
            raise ConfigError(f"grad_norm={norm} in step {self.step + 1}; begin anew below lr={settings.lr}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(settings.ema, (self.step + 1) / (self.step + 11))
        for name, parameter in self._trained() if settings.ema else ():
            self.average[name].lerp_(parameter.detach(), 1 - decay)
        return self._means(sums, count) | {"grad_norm": norm, "tokens": tokens}

    def held_out_loss(self) -> Figures:
        """The stage's held-out figures, of the averaged weights if there are any and with the same noise every time."""
        batch, rows = self.settings.batch, self.stage.held_out_rows
        shares = [range(at + s.start, at + s.stop) for at in range(0, rows, batch) for s in self._shares]
        if not shares:
            return {}
        sums: dict[str, Tensor] = {}
        divisor = 0.0
        self.model.eval()
        self._swap_averages()
        with torch.no_grad():
            for count, terms in self.stage.held_out(self.model, shares):
                _add(sums, terms)
                divisor += count
        reshard(self.model)
        self._swap_averages()
        self.model.train()
        return {f"held_out_{name}": value for name, value in self._means(sums, *self._sum([divisor])).items()}

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return ((name, p) for name, p in model.named_parameters() if p.requires_grad)

    @torch.no_grad()
    def _swap_averages(self) -> None:
        """Put the averaged weights where the trained ones are, and those into `average`; nothing without averages."""
        for name, parameter in self._trained() if self.average else ():
            trained = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(trained)

    def _sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes."""
        local = torch.tensor(values, dtype=torch.float32, device=self.accelerator.device)
        return [float(value) for value in self.accelerator.reduce(local, "sum").tolist()]

    def _means(self, sums: Mapping[str, Tensor], divisor: float) -> Figures:
        """Means over the step: the loss by its divisor, every other figure by its own number of items."""
        flat = torch.stack([sums[name] for name in sums]).flatten().tolist() if sums else []  # one look at the device
        total = self._sum(flat)
        pairs = {name: (total[2 * at], total[2 * at + 1]) for at, name in enumerate(sums)}
        loss = {"loss": pairs.pop("loss")[0] / max(divisor, 1)} if "loss" in pairs else {}
        return loss | {name: value / max(number, 1) for name, (value, number) in pairs.items()}

    def _log(self, figures: Figures) -> None:
        """Add up figures, and write their means every `log_every` steps."""
        settings = self.settings
        for name, value in figures.items():
            self._window.setdefault(name, []).append(value)
        last = self.step == settings.steps
        evaluate = last or (settings.evaluate_every and self.step % settings.evaluate_every == 0)
        if not (last or evaluate or self.step % settings.log_every == 0):
            return
        now = time.monotonic()
        tokens = self._window.pop("tokens")
        line = {name: sum(values) / len(values) for name, values in self._window.items()}
        line |= {"lr": settings.lr * schedule(self.step - 1, settings), "tokens": sum(tokens)}
        line |= {"tokens_per_second": sum(tokens) / (now - self._logged_at)}
        if evaluate:
            line |= self.held_out_loss()
        self._window, self._logged_at = {}, time.monotonic()
        self.accelerator.log(line, step=self.step)
        if self.accelerator.is_main_process:
            with (settings.run / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **{k: round(v, 6) for k, v in line.items()}}) + "\n")

    def close(self) -> None:
        """End trackers and process group; another Trainer may then begin in this process, with other settings."""
        self.accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)

    def _state(self) -> checkpoints.State:
        return checkpoints.State(self.model, self.optimizer.optimizer, self.average, self._kept)

    @contextmanager
    def _progress(self) -> Iterator[Callable[[Figures], None]]:
        """A bar on a terminal, shown by the first process; elsewhere metrics.jsonl tells."""
        name = self.settings.run.name
        count = TextColumn("{task.completed}/{task.total}")
        console = Console(stderr=True)
        shown = self.accelerator.is_main_process and console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
        with Progress(*columns, console=console, disable=not shown) as bar:
            task = bar.add_task(name, total=self.settings.steps, completed=self.step)

            def show(figures: Figures) -> None:
                told = " ".join(f"{each} {figures[each]:.3f}" for each in ("loss", *self.stage.shown))
                bar.update(task, completed=self.step, description=f"{name} {told}")

            yield show


def schedule(step: int, settings: TrainSettings) -> float:
    """Share of the peak learning rate at `step`: linear warm-up, then a cosine down to `final_lr` at the end."""
    warmup = settings.warmup if settings.warmup >= 1 else settings.warmup * settings.steps
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    done = (step - warmup) / max(1.0, settings.steps - warmup)
    return settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


def _optimizer(model: Denoiser, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, betas=settings.betas, fused=True)


@contextmanager
def _signals(trainer: Trainer) -> Iterator[None]:
    """SIGINT and SIGTERM become a wish that the loop sees; a second one ends the process as ever."""

    def wish(number: int, _frame: FrameType | None) -> None:
        trainer._signal = number
        signal.signal(number, before[number])

    before: dict[int, Any] = {}  # Any: whatever handler was there
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, wish) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _add(sums: dict[str, Tensor], terms: Terms) -> None:
    """Add the (sum, number) pairs of a micro-batch to those of the step: (2,) float32 each."""
    pairs = dict(terms.figures)
    if terms.loss is not None:
        pairs["loss"] = (terms.loss.detach(), 1)
    for name, (value, number) in pairs.items():
        pair = torch.stack([value.float(), torch.full_like(value, number, dtype=torch.float32)])
        sums[name] = sums[name] + pair if name in sums else pair
