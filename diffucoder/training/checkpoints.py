"""Checkpoints of a run: written whole or not at all, verified before they are used, a few kept.

A run folder holds `settings.json` (what the run began with), `metrics.jsonl`, `checkpoints/step-00000500/` and, at the
end, `model/`. A checkpoint has torch's distributed format, the same for one process, DDP and FSDP2, so a run may resume
with another number of processes. Its `whole.json` lists the files with sizes and checksums, and is written last.
"""

import io
import json
import os
import pickle
import shutil
import sys
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

from diffucoder.errors import CheckpointError, ConfigError
from diffucoder.files import Json, disk_is_full, read_whole_lines, write_json, write_jsonl
from diffucoder.training.settings import MAY_CHANGE, TrainSettings

WHOLE = "whole.json"
MAY_GROW = ("steps", "epochs")  # settings that a resumed run may raise: it is then trained further
LOGS = ("metrics.jsonl", "samples.jsonl")  # files that grow with the steps; each line names its step

_METADATA = {  # what the index of a checkpoint is made of, and the tensors' dtypes
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",  # from Python 3.13 on
    "torch.Size",
    "torch.serialization._get_layout",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.distributed.checkpoint.metadata.BytesStorageMetadata",
    "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
    "torch.distributed.checkpoint.metadata.Metadata",
    "torch.distributed.checkpoint.metadata.MetadataIndex",
    "torch.distributed.checkpoint.metadata.StorageMeta",
    "torch.distributed.checkpoint.metadata.TensorProperties",
    "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
}


@dataclass(frozen=True)
class State:
    """What a checkpoint holds beside its step."""

    model: nn.Module
    optimizer: Optimizer
    average: dict[str, Tensor]  # may be empty, as the next
    stage: dict[str, Tensor]  # of the stage's own


def open_run_folder(settings: TrainSettings, *, write: bool) -> None:
    """Take the run folder for this run; without `write` only check it, as every process but the first does.

    ConfigError if the folder belongs to another run, or to this one and `resume` is off, or cannot be written.
    """
    run = settings.run
    path = run / "settings.json"
    fixed = _fixed_settings(settings)
    try:
        if settings.resume and path.exists():
            _check_unchanged(fixed, json.loads(path.read_text(encoding="utf-8")), run)
        elif settings.resume and checkpoint_steps(run):
            raise ConfigError(f"run={str(run)!r} has checkpoints but no settings.json to check; name another folder")
        elif not settings.resume and (checkpoint_steps(run) or (run / "model").exists()):
            raise ConfigError(f"run={str(run)!r} holds a run already; resume it with --resume, or name another folder")
        if write:
            run.mkdir(parents=True, exist_ok=True)
            write_json(path, fixed)
            if not settings.resume:  # of a run that never reached its first checkpoint
                _trim_logs(run, 0)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"run={str(run)!r} cannot be used ({error}); name another folder") from error


def checkpoint_steps(run: Path) -> list[int]:
    """The steps of the run's checkpoints, whole or torn, in order."""
    names = [folder.name.removeprefix("step-") for folder in (run / "checkpoints").glob("step-*")]
    return sorted(int(name) for name in names if name.isdigit())


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
        elif before != value and not (f"{table}{name}" in MAY_GROW and before is not None and value > before):
            raise ConfigError(
                f"{table}{name}={value} but the run in {str(run)!r} began with {before}; "
                "set it back, or name another folder with run=..."
            )


def _trim_logs(run: Path, step: int) -> None:
    """Keep the lines of the logs up to `step`; the resumed run writes the later ones again."""
    for path in (run / name for name in LOGS):
        if path.exists():
            write_jsonl(path, [line for line in read_whole_lines(path) if line["step"] <= step])


def save(run: Path, step: int, state: State, accelerator: Accelerator, *, keep: int) -> None:
    """Write the checkpoint of `step`, all processes together, and remove all but the newest `keep`."""
    folder = _folder(run, step)
    partial = folder.with_name(folder.name + ".partial")
    if accelerator.is_main_process:
        for cut_short in folder.parent.glob("*.partial"):
            shutil.rmtree(cut_short)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that there is only one process
            state_dict_saver.save(_tensors(state), checkpoint_id=partial)
    except CheckpointException as error:  # a BaseException that holds one of each process
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {folder} cannot be written ({_reason(error)}); free some space and continue with --resume"
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files = {file.name: _size_and_checksum(file) for file in sorted(partial.iterdir())}
        write_json(partial / WHOLE, {"step": step, "files": files})
        _sync(partial)
        shutil.rmtree(folder, ignore_errors=True)  # a torn checkpoint of this step, found when the run was resumed
        os.replace(partial, folder)
        _sync(folder.parent)
        steps = checkpoint_steps(run)
        kept = [old for old in steps if old <= step][-keep:]  # later ones were torn, and passed over
        for old in set(steps) - set(kept):
            shutil.rmtree(_folder(run, old))
    accelerator.wait_for_everyone()


def load_newest(run: Path, state: State, accelerator: Accelerator) -> int:
    """Fill `state` from the newest whole checkpoint and return its step; 0 if there is none.

    A torn one is named and passed over. Lines of the logs after that step are removed.
    """
    step = 0
    if accelerator.is_main_process:
        step = _newest_whole(run)
        _trim_logs(run, step)
    step = int(accelerator.reduce(torch.tensor(step, device=accelerator.device), "sum"))  # only the first looked
    if step:
        tensors = _tensors(state)
        folder = _folder(run, step)
        try:
            with warnings.catch_warnings(action="ignore", category=UserWarning):
                state_dict_loader.load(tensors, storage_reader=_PlainReader(folder), planner=_PlainPlanner())
        except CheckpointException as error:
            raise CheckpointError(f"checkpoint {folder} cannot be read ({_reason(error)}); delete it") from error
        set_state_dict(
            state.model,
            state.optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict=tensors["optimizer"],
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )
    return step


class _PlainUnpickler(pickle.Unpickler):
    """Makes objects of the few classes that `.metadata` needs, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:  # Any: a class
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if f"{module}.{name}" not in _METADATA and not is_dtype:
            raise pickle.UnpicklingError(f"its .metadata names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class _PlainReader(FileSystemReader):
    """Reads a checkpoint that anybody may have made, and runs no code of it: torch's own unpickles everything."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # Any: as torch has it
        content = Path(self.path, ".metadata").read_bytes()
        _PlainUnpickler(io.BytesIO(content)).load()  # raises, else torch may read it
        return super().read_metadata(*args, **kwargs)


class _PlainPlanner(DefaultLoadPlanner):
    """Reads settings of the optimiser, which are pickled too, as torch reads weights."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # raises, else torch may read it
        value.seek(0)
        super().load_bytes(read_item, value)


def _newest_whole(run: Path) -> int:
    """The step of the newest checkpoint whose files are as they were written, 0 if there is none; names torn ones."""
    for step in reversed(checkpoint_steps(run)):
        folder = _folder(run, step)
        try:
            files = json.loads((folder / WHOLE).read_text(encoding="utf-8"))["files"]
            torn = [name for name, written in files.items() if _size_and_checksum(folder / name) != written]
        except (OSError, ValueError, KeyError) as error:
            torn = [str(error)]
        if not torn:
            return step
        print(f"checkpoint {folder} is torn ({torn[0]}); using the one before it", file=sys.stderr)
    return 0


def _reason(error: CheckpointException) -> str:
    """What went wrong in the first of the processes that failed."""
    failure = next(iter(error.failures.values()))[0]
    return "the disk is full" if disk_is_full(failure) else " ".join(str(failure).split())[:200]


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def _tensors(state: State) -> dict[str, Any]:  # Any: nested dictionaries of tensors
    """What is stored; loading writes into these very tensors. Of adapters, the weights they adapt are left out."""
    options = StateDictOptions(ignore_frozen_params=True)
    model, optimizer = get_state_dict(state.model, state.optimizer, options=options)
    return {"model": model, "optimizer": optimizer, "average": state.average, "kept": state.stage}


def _size_and_checksum(file: Path) -> list[int]:
    checksum = 0
    with file.open("rb") as content:
        while block := content.read(2**24):
            checksum = zlib.crc32(block, checksum)
    return [file.stat().st_size, checksum]


def _sync(folder: Path) -> None:
    """Wait until the disk has the folder and its files."""
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
