"""Checkpoints of a run: written whole or not at all, verified before they are used, a few kept.

A run folder holds `settings.json` (what the run began with), `metrics.jsonl`, `checkpoints/step-00000500/` and, at the
end, `model/`. A checkpoint has safetensors files, which torch's distributed checkpoints write and read: the same for
one process, DDP and FSDP2, so a run may resume with another number of processes. Its `whole.json` lists the files with
sizes and checksums, and is written last.

Anybody may have made the folder: nothing in it is a pickle, and what is read has the sizes of this run's own tensors.
"""

import os
import re
import sys
import warnings
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

from diffucoder.errors import CheckpointError, ConfigError, printable
from diffucoder.files import Json, disk_is_full, open_file, read_json, read_whole_lines, remove, write_json, write_jsonl
from diffucoder.training.settings import MAY_CHANGE, TrainSettings

WHOLE = "whole.json"
MAY_GROW = ("steps", "epochs")  # settings that a resumed run may raise: it is then trained further
LOGS = ("metrics.jsonl", "samples.jsonl")  # files that grow with the steps; each line names its step

_FILE_SIZE = 2**30  # bytes after which a process begins another file: one is copied in memory to be written


@dataclass(frozen=True)
class State:
    """What a checkpoint holds beside its step."""

    model: nn.Module
    optimizer: Optimizer
    average: dict[str, Tensor]  # may be empty, as the next
    stage: dict[str, Tensor]  # of the stage's own


def open_run_folder(settings: TrainSettings, *, write: bool) -> None:
    """Check that the folder is free, or is that of this run, and `write` to it. ConfigError if that is not possible."""
    run = settings.run
    path = run / "settings.json"
    fixed = _fixed_settings(settings)
    try:
        if os.path.lexists(run / "checkpoints") and not (run / "checkpoints").is_dir():
            raise ConfigError(f"run={str(run)!r} has a file in place of its folder checkpoints; name another folder")
        if settings.resume and path.exists():
            _check_unchanged(fixed, read_json(path), run)
        elif settings.resume and checkpoint_steps(run):
            raise ConfigError(f"run={str(run)!r} has checkpoints but no settings.json to check; name another folder")
        elif not settings.resume and (checkpoint_steps(run) or (run / "model").exists()):
            raise ConfigError(f"run={str(run)!r} holds a run already; resume it with --resume, or name another folder")
        if write:
            run.mkdir(parents=True, exist_ok=True)
            write_json(path, fixed)
            if not settings.resume:  # of a run that never reached its first checkpoint
                _trim_logs(run, 0)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"run={str(run)!r} cannot be used ({error}); name another folder") from error


def checkpoint_steps(run: Path) -> list[int]:
    """The steps of the run's checkpoints, whole or torn, in order."""
    names = [re.fullmatch("step-([0-9]{8,15})", folder.name) for folder in (run / "checkpoints").glob("step-*")]
    return sorted(int(name[1]) for name in names if name)


def _fixed_settings(settings: TrainSettings) -> Json:
    """The settings that a resumed run must keep."""
    free = {name for name, field in type(settings).model_fields.items() if MAY_CHANGE in field.metadata}
    if getattr(settings, "normaliser", None) == "masked_micro":  # the one setting that makes micro-batches matter
        free.remove("micro_batch")
    return settings.model_dump(mode="json", exclude=free)


def _check_unchanged(wanted: Json, begun: Json, run: Path, table: str = "") -> None:
    for name, value in wanted.items():
        before = begun.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            _check_unchanged(value, before, run, f"{table}{name}.")
            continue
        grows = f"{table}{name}" in MAY_GROW and isinstance(before, int | float) and value > before
        if before != value and not grows:
            raise ConfigError(
                f"{table}{name}={value} but the run in {str(run)!r} began with {str(before)[:100]}; "
                "set it back, or name another folder with run=..."
            )


def _trim_logs(run: Path, step: int) -> None:
    """Keep the lines of the logs up to `step`; the resumed run writes the later ones again."""
    for path in (run / name for name in LOGS):
        if os.path.lexists(path):  # a link that leads nowhere would lead what is written there
            lines = read_whole_lines(path)
            write_jsonl(path, (line for line in lines if isinstance(line.get("step"), int) and line["step"] <= step))


def save(run: Path, step: int, state: State, accelerator: Accelerator, *, keep: int) -> None:
    """Write the checkpoint of `step`, all processes together, and remove all but the newest `keep`."""
    folder = _folder(run, step)
    partial = folder.with_name(folder.name + ".partial")
    if accelerator.is_main_process:
        for cut_short in folder.parent.glob("step-*.partial"):
            remove(cut_short)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that there is only one process
            tensors, _ = _tensors(state)
            state_dict_saver.save(tensors, storage_writer=_Writer(str(partial), save_distributed=True))
    except CheckpointException as error:  # a BaseException that holds one of each process
        if accelerator.is_main_process:
            remove(partial)
        raise CheckpointError(
            f"checkpoint {folder} cannot be written ({_reason(error)}); free some space and continue with --resume"
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(partial / WHOLE, {"step": step, "files": _sizes_and_checksums(partial)})
        _sync(partial)
        remove(folder)  # a torn checkpoint of this step, found when the run was resumed
        os.replace(partial, folder)
        _sync(folder.parent)
        steps = checkpoint_steps(run)
        kept = [old for old in steps if old <= step][-keep:]  # later ones were torn, and passed over
        for old in set(steps) - set(kept):
            remove(_folder(run, old))
    accelerator.wait_for_everyone()


def load_newest(run: Path, state: State, accelerator: Accelerator) -> int:
    """Fill `state` from the newest whole checkpoint and return its step, or 0; later lines of the logs are removed."""
    step = 0
    if accelerator.is_main_process:
        step = _newest_whole(run)
        _trim_logs(run, step)
    step = int(accelerator.reduce(torch.tensor(step, device=accelerator.device), "sum"))  # only the first looked
    if step:
        tensors, settings = _tensors(state)
        folder = _folder(run, step)
        reader = HuggingFaceStorageReader(str(folder))
        try:
            reader.read_metadata()  # torch would log a traceback
            with warnings.catch_warnings(action="ignore", category=UserWarning):
                state_dict_loader.load(tensors, storage_reader=reader)
        except (CheckpointException, Exception) as error:  # the first is a BaseException; the header may hold anything
            raise CheckpointError(f"checkpoint {folder} cannot be read ({_reason(error)}); delete it") from error
        set_state_dict(
            state.model,
            state.optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict={"state": tensors["optimizer"], "param_groups": settings},
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )
    return step


class _Writer(HuggingFaceStorageWriter):
    """Writes what each process holds as safetensors files of about `_FILE_SIZE` bytes."""

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Number the processes, and in each the file of every tensor."""
        numbered: list[SavePlan] = []
        for process, plan in enumerate(plans, start=1):
            files: dict[str, int] = {}
            size = 0
            for item in plan.items:
                assert item.tensor_data is not None
                files[item.index.fqn] = 1 + size // _FILE_SIZE
                size += item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
            numbered.append(replace(plan, storage_data={"fqn_to_index_mapping": files, "shard_index": process}))
        return numbered


def _newest_whole(run: Path) -> int:
    """The step of the newest checkpoint whose files are as they were written, 0 if there is none; names torn ones."""
    for step in reversed(checkpoint_steps(run)):
        folder = _folder(run, step)
        if (folder / ".metadata").exists():
            raise CheckpointError(
                f"checkpoint {folder} has the format of an earlier version, which can run code when it is read; "
                "finish the run with that version, or begin another from its model"
            )
        fault = _fault(folder)
        if fault is None:
            return step
        print(printable(f"checkpoint {folder} is torn ({fault}); using the one before it"), file=sys.stderr)
    return 0


def _fault(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, None if they are as they were written."""
    try:
        written = read_json(folder / WHOLE).get("files")
        present = _sizes_and_checksums(folder)
    except (OSError, ValueError) as error:
        return str(error)
    if not isinstance(written, dict):
        return f"{WHOLE} lists no files"
    for name in sorted(written.keys() | present.keys()):
        if written.get(name) != present.get(name):
            return name
    return None


def _reason(error: BaseException) -> str:
    """What went wrong, in the first of the processes that failed."""
    failure = error
    if isinstance(error, CheckpointException):
        failure = next(iter(error.failures.values()))[0]
    return "the disk is full" if disk_is_full(failure) else " ".join(str(failure).split())[:200]


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def _tensors(state: State) -> tuple[dict[str, Any], Any]:  # Any: nested, down to tensors
    """What is stored, and the optimiser's settings, which follow from those of the run.

    Loading writes into these very tensors. Of adapters, the weights they adapt are left out; of tied matrices there is
    one.
    """
    options = StateDictOptions(ignore_frozen_params=True)
    model, optimizer = get_state_dict(state.model, state.optimizer, options=options)
    for name in _tied_names(state.model):
        model.pop(name, None)
    stored = {"model": model, "optimizer": optimizer["state"], "average": state.average, "kept": state.stage}
    return stored, optimizer["param_groups"]


def _tied_names(model: nn.Module) -> list[str]:
    """The second names of parameters that have two, as a state dict has them."""
    first = {id(parameter) for parameter in model.parameters()}
    tied = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            first.remove(id(parameter))
        else:
            tied.append(name.removeprefix("module."))  # the prefix of a model in several processes
    return tied


def _sizes_and_checksums(folder: Path) -> dict[str, list[int]]:
    files: dict[str, list[int]] = {}
    for path in folder.glob("*.safetensors"):
        checksum = 0
        with open_file(path) as content:
            while block := content.read(2**24):
                checksum = zlib.crc32(block, checksum)
        files[path.name] = [path.stat().st_size, checksum]
    return files


def _sync(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
