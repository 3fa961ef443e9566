"""A small training run for tests, in this process or as a program of its own: `worker.py RUN.json`.

The JSON file holds `TrainSettings` fields, and `die`, the step in whose middle the process kills itself.
"""

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from diffucoder.diffusion import keyed_generator
from diffucoder.models.denoiser import Denoiser
from diffucoder.tokenizer import Tokenizer
from diffucoder.training import processes
from diffucoder.training.masked import HELD_OUT, MaskedMicro, MaskedStage, Objective, Row
from diffucoder.training.processes import exit_worker
from diffucoder.training.run import train_and_export
from diffucoder.training.settings import TrainSettings
from diffucoder.training.trainer import Terms

VOCABULARY, MASK, PAD, LENGTH = 40, 39, 38, 12
DEFAULTS = {
    **{"steps": 10, "batch": 8, "lr": 1e-2, "bf16": False, "ema": 0.9},
    **{"save_every": 2, "log_every": 1, "export_dtype": "float32"},
}


class CountingRows:
    """Rows that count upwards from a random number, some of them short."""

    def width(self, step: int) -> int:
        return LENGTH

    def row(self, step: int, index: int) -> Row:
        noise = keyed_generator(7, step, index)
        first = int(torch.randint(0, VOCABULARY - LENGTH - 2, (), generator=noise))
        length = LENGTH if step == HELD_OUT or index % 3 else LENGTH - 4
        return Row(torch.arange(first, first + length), torch.ones(length, dtype=torch.bool))


class DyingStage(MaskedStage):
    """Kills its process between two micro-batches of step `die`."""

    die: int | None = None
    step = seen = 0

    def micro_batches(self, step: int, shares: Sequence[range]) -> list[MaskedMicro]:
        self.step, self.seen = step, 0
        return super().micro_batches(step, shares)

    def loss(self, model: nn.Module, micro: MaskedMicro) -> Terms:
        self.seen += 1
        if self.step == self.die and self.seen == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(model, micro)


def model() -> Denoiser:
    """Two layers, always the same weights."""
    config = Qwen2Config(
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
        **{"pad_token_id": PAD, "eos_token_id": PAD, "bos_token_id": None, "tie_word_embeddings": False},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Denoiser.from_causal_lm(Qwen2ForCausalLM(config), mask_id=MASK)


def tokenizer() -> Tokenizer:
    """Letters, enough for a folder that loads."""
    import tokenizers

    vocabulary = {chr(ord("0") + id_): id_ for id_ in range(PAD)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.add_special_tokens(["<|dlm_pad|>", "<|mask|>"])
    return Tokenizer(backend)


def stage(settings: TrainSettings, *, normaliser: str = "masked", die: int | None = None) -> DyingStage:
    objective = Objective(
        mask_id=MASK, pad_id=PAD, seed=settings.seed, batch=settings.batch, normaliser=normaliser, anneal_steps=4
    )
    made = DyingStage(objective, CountingRows(), CountingRows(), held_out_rows=8)
    made.die = die
    return made


def run(fields: dict[str, Any]) -> Path:  # Any: whatever the settings are
    """Train as `fields` say and return the model's folder."""
    die, normaliser = fields.pop("die", None), fields.pop("normaliser", "masked")
    settings = TrainSettings(**{**DEFAULTS, **fields})
    return train_and_export(model(), tokenizer(), stage(settings, normaliser=normaliser, die=die), settings)


def shard_on_cpus() -> None:
    """Let FSDP2 run on CPUs, which torch can do but accelerate leaves out: so tests take the path of many GPUs."""

    class ShardingAccelerator(Accelerator):  # type: ignore[misc]  # accelerate is not followed by mypy
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
            if sharded and self.distributed_type == DistributedType.MULTI_CPU:
                self.state.distributed_type = DistributedType.FSDP
                self.state.fsdp_plugin = FullyShardedDataParallelPlugin()

    processes.Accelerator = ShardingAccelerator  # type: ignore[misc]  # for this process alone


if __name__ == "__main__":
    torch.set_num_threads(1)
    shard_on_cpus()
    run(json.loads(Path(sys.argv[1]).read_text()))
    exit_worker()
