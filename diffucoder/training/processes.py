"""The processes of a run: what `accelerate launch` started, how they share the model, which rows each one takes."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from diffucoder.errors import ConfigError
from diffucoder.training.settings import TrainSettings


def start_accelerator(settings: TrainSettings) -> Accelerator:
    """The accelerator that `accelerate launch` describes; the CPU on a machine without a GPU."""
    missing = set(settings.trackers) - {str(tracker.value) for tracker in get_available_trackers()}
    if missing:  # accelerate would pass over a tracker that is not installed
        raise ConfigError(f"trackers={sorted(missing)} cannot be used; install what is missing, or correct the name")
    accelerator = Accelerator(
        cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        mixed_precision="bf16" if settings.bf16 else "no",
        log_with=list(settings.trackers) or None,
        project_dir=settings.run,
    )
    if accelerator.is_fsdp2 and settings.bf16:  # accelerate's own policy would add up gradients in bfloat16
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    return accelerator


def rows_of_process(settings: TrainSettings, accelerator: Accelerator) -> list[range]:
    """The rows of a step that this process trains on, a range for each micro-batch."""
    processes = accelerator.num_processes
    size = settings.micro_batch or max(1, settings.batch // processes)
    together = size * processes
    if settings.batch % together:
        raise ConfigError(
            f"batch={settings.batch} does not split into micro-batches of {size} rows for {processes} processes; "
            f"use a multiple of {together}"
        )
    first = accelerator.process_index * size
    return [range(start, start + size) for start in range(first, settings.batch, together)]


def first_process() -> bool:
    """Whether this process prints and writes: the first of a distributed run, also before its group exists."""
    return int(os.environ.get("RANK", "0")) == 0


def exit_worker() -> None:
    """End one of several processes at once: if Gloo's threads abort its shutdown, the launcher ends the others."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def reshard(model: nn.Module) -> None:
    """Free the weights that a forward pass without a backward pass leaves gathered; no effect on an unsharded model."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold a sharded model whole on every process, so that each may call it any number of times."""
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for shard in shards:
        shard.set_reshard_after_forward(False, recurse=False)
        shard.unshard()
    try:
        yield
    finally:
        for shard in shards:
            shard.set_reshard_after_forward(True, recurse=False)
            shard.reshard()
