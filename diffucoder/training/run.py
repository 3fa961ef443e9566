"""What all stages have in common: load the model, add adapters, train, merge them, gather and write the weights."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from diffucoder.errors import ConfigError
from diffucoder.models.checkpoint import load_with_tokenizer, save_denoiser
from diffucoder.models.denoiser import Denoiser
from diffucoder.tokenizer import Tokenizer
from diffucoder.training.masked import Objective
from diffucoder.training.settings import (
    DiffusionSettings,
    GrpoSettings,
    PretrainSettings,
    TextSettings,
    TrainSettings,
)
from diffucoder.training.trainer import Stage, Trainer


def load_start(settings: DiffusionSettings | GrpoSettings) -> tuple[Denoiser, Tokenizer]:
    """The model that a stage begins with, on the CPU, and its tokenizer.

    Weights are in float32, or in bfloat16 if only adapters are trained. A parent gets the tokenizer's mask.
    """
    dtype = torch.bfloat16 if settings.lora_rank and settings.bf16 else torch.float32
    denoiser, tokenizer = load_with_tokenizer(settings.model, dtype=dtype, device="cpu", add_mask=True)
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


def objective_of(settings: TextSettings, denoiser: Denoiser, tokenizer: Tokenizer) -> Objective:
    """The masked objective of a stage: of its settings those that an `Objective` has too."""
    shared = settings.model_dump(include={field.name for field in fields(Objective)})
    return Objective(
        mask_id=tokenizer.mask_id,
        pad_id=tokenizer.pad_id,
        first_scorable=denoiser.first_scorable,
        autoregressive=isinstance(settings, PretrainSettings),
        **shared,
    )


def train_and_export(
    denoiser: Denoiser, tokenizer: Tokenizer, stage: Stage, settings: TrainSettings, *, parent: bool = False
) -> Path:
    """Train, and write the model to `run/model`: a Dream checkpoint, or with `parent` a plain causal one.

    Called again on a finished run it writes the model again. ConfigError if the settings do not fit the run folder.
    """
    if settings.lora_rank:
        adapters = _with_adapters(denoiser, settings)
    trainer = Trainer(denoiser, stage, settings)
    trained = trainer.train()
    if settings.lora_rank:
        adapters.merge_and_unload()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)  # gathered if it is sharded
    state: dict[str, Any] = get_model_state_dict(trained, options=options)  # tensors, though torch's type is wider
    folder = settings.run / "model"
    if trainer.accelerator.is_main_process:
        dtype = getattr(torch, settings.export_dtype)
        weights = {name.removeprefix("model."): tensor.to(dtype) for name, tensor in state.items()}
        save_denoiser(trained, folder, state=weights, as_parent=parent)
        tokenizer.save(folder)
    trainer.close()
    return folder


def _with_adapters(denoiser: Denoiser, settings: TrainSettings) -> Any:  # Any: mypy does not follow peft
    """Put low-rank adapters into the model's layers, in place, and freeze everything else (peft)."""
    from peft import LoraConfig, get_peft_model

    layers = list(settings.lora_targets)
    config = LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=layers)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)  # peft draws from the global generator
        try:
            return get_peft_model(denoiser.model, config)
        except ValueError as error:
            raise ConfigError(f"lora_targets={settings.lora_targets} are not in this model: {error}") from error
