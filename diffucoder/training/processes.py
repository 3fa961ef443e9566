"""The processes of a run: what `accelerate launch` started, how they share the model, which rows each one takes.

For: `trainer`. One process is the ordinary case and needs no launcher.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from diffucoder.errors import ConfigError
from diffucoder.training.settings import TrainSettings


def start(settings: TrainSettings) -> Accelerator:
    """As `accelerate launch` says; on a CPU where there is no accelerator."""
    known = sorted(str(tracker.value) for tracker in get_available_trackers())
    if missing := set(settings.trackers) - set(known):
        have = ", ".join(known) or "nothing"
        raise ConfigError(f"trackers={sorted(missing)} cannot be used, only {have}; pip install what is missing")
    cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision="bf16" if settings.bf16 else "no",
        log_with=list(settings.trackers) or None,
        project_dir=settings.run,
    )
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if sharded and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate leaves sharding out on CPUs, where torch has it: so the path of many GPUs runs in the tests
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if accelerator.is_fsdp2 and settings.bf16:  # accelerate's own policy would add up gradients in bfloat16
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    return accelerator


def shares(settings: TrainSettings, accelerator: Accelerator) -> list[range]:
    """The rows of a step that this process trains on, a range for each micro-batch."""
    batch, count = settings.batch, accelerator.num_processes
    size = settings.micro_batch or max(1, batch // count)
    if batch % (size * count):
        raise ConfigError(
            f"batch={batch} does not split into micro-batches of {size} rows for {count} processes; "
            f"use a multiple of {size * count}"
        )
    return [range(at, at + size) for at in range(accelerator.process_index * size, batch, size * count)]


def first_process() -> bool:
    """Whether this process is the one that speaks: the first of a distributed run, also before its group exists."""
    return int(os.environ.get("RANK", "0")) == 0


def leave() -> None:
    """End a process of several at once, whose work is done; return where it is the only one.

    Gloo's threads give back the tensors of the last collective when they come to it, for which they need the
    interpreter. One that is being taken down aborts them, and the process with them (seen in 5 % of sharded runs);
    the launcher then ends the others too, which may still be writing the model.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def reshard(model: nn.Module) -> None:
    """Give back what a forward pass without a backward one leaves gathered; nothing where the model is not sharded."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """A sharded model in one piece on every process, so that each may call it as often as it likes."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()
