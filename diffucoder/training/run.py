"""What all stages have in common: load the model, add adapters, train, gather, merge, round and write the weights."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from diffucoder.errors import CheckpointError, ConfigError
from diffucoder.files import written_folder
from diffucoder.models.checkpoint import find_checkpoint, load_with_tokenizer, save_denoiser
from diffucoder.models.denoiser import Denoiser
from diffucoder.tokenizer import Tokenizer
from diffucoder.training.adapters import adapts_ends, add_adapters, merged, save_adapters
from diffucoder.training.masked import MaskedStage, Objective, Rows
from diffucoder.training.settings import DiffusionSettings, GrpoSettings, PretrainSettings, TextSettings, TrainSettings
from diffucoder.training.trainer import Stage, Trainer


def load_start(settings: DiffusionSettings | GrpoSettings) -> tuple[Denoiser, Tokenizer]:
    """The model that a stage begins with, on the CPU, and its tokenizer. Frozen bfloat16 weights stay so."""
    checkpoint = find_checkpoint(settings.model)
    frozen_bf16 = settings.lora_rank and settings.bf16 and checkpoint.dtype == torch.bfloat16
    dtype = torch.bfloat16 if frozen_bf16 else torch.float32
    denoiser, tokenizer = load_with_tokenizer(checkpoint, dtype=dtype, device="cpu", add_mask=True)
    if isinstance(settings, DiffusionSettings) and settings.shifted is not None:
        denoiser.shifted = settings.shifted
    if settings.tied:  # one matrix again, as in the parent: Dream's format stores two
        embeddings = denoiser.model.get_input_embeddings()
        head = denoiser.model.get_output_embeddings()
        if not torch.equal(embeddings.weight, head.weight):
            raise ConfigError("tied=true but the model's embeddings and head differ; leave it out")
        head.weight = embeddings.weight
        denoiser.config.tie_word_embeddings = True
    return denoiser, tokenizer


def check_length(denoiser: Denoiser, name: str, tokens: int) -> None:
    """ConfigError if rows of the setting `name` are longer than the model's canvas."""
    longest = denoiser.max_length
    if tokens > longest:
        raise ConfigError(f"{name}={tokens} exceeds the model's context of {longest}; lower it to {longest} or less")


def masked_stage(
    settings: TextSettings, denoiser: Denoiser, tokenizer: Tokenizer, rows: Rows, held_out: Rows | None
) -> MaskedStage:
    """A stage over `rows`, with the masked objective: of the settings those that an `Objective` has too."""
    shared = settings.model_dump(include={field.name for field in fields(Objective)})
    objective = Objective(
        mask_id=tokenizer.mask_id,
        pad_id=tokenizer.pad_id,
        first_scorable=denoiser.first_scorable,
        block_causal=denoiser.attention.block is not None,
        autoregressive=isinstance(settings, PretrainSettings),
        **shared,
    )
    return MaskedStage(objective, rows, held_out, settings.held_out_rows)


def train_and_export(
    denoiser: Denoiser, tokenizer: Tokenizer, stage: Stage, settings: TrainSettings, *, parent: bool = False
) -> Path:
    """Train, and write the model to `run/model`: a Dream checkpoint, or with `parent` a plain causal one.

    Adapters are merged, and also written to `run/adapter` in peft's format. Called again on a finished run it writes
    the model again. ConfigError if the settings do not fit the run folder.
    """
    adapters = add_adapters(denoiser, settings) if settings.lora_rank else None
    trainer = Trainer(denoiser, stage, settings)
    trained = trainer.train()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)  # gathered if it is sharded
    gathered: dict[str, Any] = get_model_state_dict(trained, options=options)  # tensors, though torch's type is wider
    folder = settings.run / "model"
    if trainer.accelerator.is_main_process:
        state = {name.removeprefix("model."): tensor for name, tensor in gathered.items()}
        changes = compared_with_start(state, settings)
        if adapters is not None:
            with written_folder(settings.run / "adapter") as partial:
                save_adapters(adapters, state, partial)
            changes = merged(state, settings)
            if adapts_ends(trained.model):  # the two are no longer equal
                trained.config.tie_word_embeddings = False
        weights, kept = rounded(changes, getattr(torch, settings.export_dtype))
        with written_folder(folder) as partial:
            save_denoiser(trained, partial, state=weights, as_parent=parent)
            tokenizer.save(partial)
        if kept is not None:
            report_rounding(kept, settings)
    trainer.close()
    return folder


def compared_with_start(
    state: Mapping[str, Tensor], settings: TrainSettings
) -> Iterator[tuple[str, Tensor | None, Tensor]]:
    """Name, weight before (None if it is not known) and weight after training of all weights."""
    start: dict[str, Tensor] = {}
    if isinstance(settings, DiffusionSettings | GrpoSettings) and settings.export_dtype != "float32":
        try:
            checkpoint = find_checkpoint(settings.model)
            denoiser, _ = load_with_tokenizer(checkpoint, dtype=checkpoint.dtype, device="cpu", add_mask=True)
            start = denoiser.model.state_dict()
        except CheckpointError:  # removed meanwhile: the report is not worth the run
            pass
    for name, weight in state.items():
        yield name, start.get(name), weight


def rounded(
    changes: Iterable[tuple[str, Tensor | None, Tensor]], dtype: torch.dtype
) -> tuple[dict[str, Tensor], float | None]:
    """The weights after training in `dtype`, and the share of the update that they keep; None if nothing changed.

    The share is the component of the rounded update in the direction of the exact one: 1 if rounding only adds noise, 0
    if all weights are what they were. Vocabulary that was added since the start does not count. ConfigError for a
    weight that `dtype` cannot hold.
    """
    weights = {}
    kept = 0.0
    whole = 0.0
    for name, before, after in changes:
        weights[name] = after.to(dtype)
        if dtype == torch.float16 and not weights[name].isfinite().all():
            raise ConfigError(
                f"export_dtype=float16 holds numbers up to 65504, and {name} has {float(after.abs().max()):.6g}; use "
                "--resume --set export_dtype=bfloat16"
            )
        if before is not None and before is not after:
            old = before.float()
            update = after[: len(old)].float() - old
            rounded_update = weights[name][: len(old)].float() - old.to(dtype).float()
            kept += float((update * rounded_update).sum(dtype=torch.float64))
            whole += float(update.square().sum(dtype=torch.float64))
    return weights, kept / whole if whole else None


def report_rounding(kept: float, settings: TrainSettings) -> None:
    """Print how much of the update the exported model has, and the way out if that is little."""
    share = max(0.0, min(kept, 1.0))
    message = f"export_dtype={settings.export_dtype} keeps {share:.0%} of what training changed in the weights"
    if kept < 0.9:
        message += "; for all of it use --resume --set export_dtype=float32, and load the model with --dtype float32"
        if settings.lora_rank:
            message += f", or load {settings.run / 'adapter'} with peft"
    print(message, file=sys.stderr)
