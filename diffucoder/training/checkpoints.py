"""Checkpoints of a run: written whole or not at all, checked before they are believed, a few kept.

A run folder holds `settings.json` (what the run was begun with), `metrics.jsonl`, `checkpoints/step-00000500/` and, at
the end, `model/`. A checkpoint is torch's distributed format, the same for one process, DDP and FSDP2, so a run may go
on with another number of processes; `whole.json` lists its files with sizes and checksums, and is written last.
"""

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

from diffucoder.errors import ConfigError
from diffucoder.training.settings import TrainSettings

# Settings that change what a run reports or how it is cut up, but not what it learns
FREE = (
    *("run", "resume", "micro_batch", "gradient_checkpointing", "export_dtype", "log_every", "save_every", "keep"),
    *("evaluate_every", "held_out", "held_out_rows", "held_out_at", "trackers", "cache", "workers", "samples_every"),
)
SETTINGS = "settings.json"
LINES = ("metrics.jsonl", "samples.jsonl")  # files that grow with the steps, whose lines name theirs
_OPTIONS = StateDictOptions(ignore_frozen_params=True)  # adapters are saved without what they adapt


@dataclass(frozen=True)
class State:
    """What a checkpoint holds beside its step. `average` and the stage's own `kept` may be empty."""

    model: nn.Module
    optimizer: Optimizer
    average: dict[str, Tensor]
    kept: dict[str, Tensor]


def claim(settings: TrainSettings, *, write: bool) -> None:
    """Make the run folder this run's; only look where not `write`, as every process but the first.

    ConfigError where the folder is another run's, or this one's and `resume` is not said, or cannot be written.
    """
    free = set(FREE)
    if getattr(settings, "normaliser", None) == "masked_micro":  # the one setting under which micro-batches count
        free.remove("micro_batch")
    wanted = settings.model_dump(mode="json", exclude=free)
    path = settings.run / SETTINGS
    try:
        if settings.resume and path.exists():
            _compare(wanted, json.loads(path.read_text(encoding="utf-8")), settings.run)
        elif any(found(settings.run)):
            raise ConfigError(
                f"run={str(settings.run)!r} holds a run already; go on with --resume, or name another folder"
            )
        if write:
            settings.run.mkdir(parents=True, exist_ok=True)
            _write_whole(path, json.dumps(wanted, indent=2) + "\n")
            for name in LINES if not settings.resume else ():
                _trim(settings.run / name, 0)  # of a run that never reached its first checkpoint
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"run={str(settings.run)!r} cannot be used ({error}); name another folder") from error


def _compare(wanted: dict[str, Any], begun: dict[str, Any], run: Path) -> None:
    for name, value in wanted.items():
        if begun.get(name) != value:
            raise ConfigError(
                f"{name}={value} but the run in {str(run)!r} was begun with {begun.get(name)}; "
                "give it back, or name another folder by run=..."
            )


def save(run: Path, step: int, state: State, accelerator: Accelerator, *, keep: int) -> None:
    """Write the checkpoint of `step`, all processes together, and remove all but the newest `keep`."""
    folder = _folder(run, step)
    partial = folder.with_name(folder.name + ".partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    with _alone_is_fine():
        state_dict_saver.save(_tensors(state), checkpoint_id=partial)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files = {file.name: _print(file) for file in sorted(partial.iterdir())}
        _write_whole(partial / "whole.json", json.dumps({"step": step, "files": files}, indent=2) + "\n")
        _sync(partial)
        shutil.rmtree(folder, ignore_errors=True)  # a torn one of this step, found when the run went on
        os.replace(partial, folder)
        _sync(folder.parent)
        kept = sorted(at for at in found(run) if at <= step)[-keep:]  # what is beyond was torn, and passed over
        for old in set(found(run)) - set(kept):
            shutil.rmtree(_folder(run, old))
    accelerator.wait_for_everyone()


def load_newest(run: Path, state: State, accelerator: Accelerator) -> int:
    """Fill `state` from the newest whole checkpoint and return its step; 0 where there is none.

    A torn one is named and passed over. Lines of `LINES` behind the step are removed: they will come again.
    """
    step = 0
    if accelerator.is_main_process:
        step = _newest(run)
        for name in LINES:
            _trim(run / name, step)
    step = int(accelerator.reduce(torch.tensor(step, device=accelerator.device), "sum"))  # the first process found it
    if step:
        tensors = _tensors(state)
        with _alone_is_fine():
            state_dict_loader.load(tensors, checkpoint_id=_folder(run, step))
        set_state_dict(
            state.model,
            state.optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict=tensors["optimizer"],
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )
    return step


def begun(run: Path) -> dict[str, Any] | None:
    """The settings that the run in this folder was begun with; None where it is no run, or none that began in a model.

    ConfigError where they cannot be read.
    """
    path = run / SETTINGS
    if not path.exists():
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); name another run's folder, or a model's") from error
    return settings if isinstance(settings, dict) and "model" in settings else None


def load_model(run: Path, model: nn.Module) -> None:
    """Fill `model` from the run's newest whole checkpoint.

    ConfigError where there is none, or it holds no whole model of this shape: adapters, say, or more tokens.
    """
    step = _newest(run)
    if not step:
        raise ConfigError(f"run {str(run)!r} has no whole checkpoint yet; go on with it, or name a model's folder")
    try:
        with _alone_is_fine():  # into these very tensors
            state_dict_loader.load({"model": model.state_dict()}, checkpoint_id=_folder(run, step), no_dist=True)
    except (CheckpointException, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{_folder(run, step)} holds no whole model of the shape the run began with; "
            f"finish the run, and take {run / 'model'}"
        ) from error


def _newest(run: Path) -> int:
    """The step of the newest whole checkpoint, 0 where there is none; torn ones are named and passed over."""
    return next((step for step in sorted(found(run), reverse=True) if _is_whole(_folder(run, step))), 0)


def found(run: Path) -> Iterator[int]:
    """The steps of the run's checkpoints, whole or torn."""
    for folder in (run / "checkpoints").glob("step-*"):
        if folder.name.removeprefix("step-").isdigit():
            yield int(folder.name.removeprefix("step-"))


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def _tensors(state: State) -> dict[str, Any]:
    """What is stored; loading writes into these very tensors."""
    model, optimizer = get_state_dict(state.model, state.optimizer, options=_OPTIONS)
    return {"model": model, "optimizer": optimizer, "average": state.average, "kept": state.kept}


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """torch warns that one process is all there is, which is how most runs are meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _is_whole(folder: Path) -> bool:
    """Whether every file is as it was written; says so where one is not."""
    try:
        files = json.loads((folder / "whole.json").read_text(encoding="utf-8"))["files"]
        torn = [name for name, print_ in files.items() if _print(folder / name) != print_]
    except (OSError, ValueError, KeyError) as error:
        torn = [str(error)]
    if torn:
        Console(stderr=True).print(f"checkpoint {folder} is torn ({torn[0]}); using the one before it", soft_wrap=True)
    return not torn


def _print(file: Path) -> list[int]:
    """Size and checksum of a file."""
    checksum = 0
    with file.open("rb") as content:
        while block := content.read(2**24):
            checksum = zlib.crc32(block, checksum)
    return [file.stat().st_size, checksum]


def _trim(path: Path, step: int) -> None:
    """Keep the lines of a file up to `step`; a half-written last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    _write_whole(path, "".join(kept))


def _write_whole(path: Path, text: str) -> None:
    """Write a file that is never seen half-written."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _sync(folder: Path) -> None:
    """Have the folder's files on the disk before what comes next."""
    for path in [*(p for p in folder.iterdir() if p.is_file()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
