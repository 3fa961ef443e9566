"""Low-rank adapters (LoRA, by peft): put into a model, written in peft's format, merged into the weights.

For: `lora_rank` of a run. Not for: rounding and writing the merged weights (`run`).

An update is much smaller than the weight that it is added to, so bfloat16 loses most of it. The sum is therefore
computed in float32, from the weights as they were gathered, and nothing is rounded here.
"""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffucoder.errors import ConfigError
from diffucoder.models.denoiser import Denoiser
from diffucoder.training.settings import TrainSettings

_BASE = ".base_layer."  # peft's name for a layer that has an adapter


def add_adapters(denoiser: Denoiser, settings: TrainSettings) -> Any:  # Any: mypy does not follow peft
    """Put adapters into the model's layers, in place, and freeze all else. ConfigError if they do not fit."""
    from peft import LoraConfig, get_peft_model

    targets = list(settings.lora_targets)
    config = LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=targets)
    # peft draws from the global generator, and warns of tied matrices and of its own old names
    with torch.random.fork_rng(), warnings.catch_warnings(action="ignore"):
        torch.manual_seed(settings.seed)
        try:
            adapters = get_peft_model(denoiser.model, config)
        except ValueError as error:
            raise ConfigError(f"lora_targets={settings.lora_targets} are not in this model: {error}") from error
    source = getattr(settings, "model", None) or denoiser.model.name_or_path
    adapters.peft_config["default"].base_model_name_or_path = source
    if getattr(settings, "tied", False) and adapts_ends(denoiser.model):
        raise ConfigError(
            f"tied=true trains embeddings and head as one matrix, but lora_targets={settings.lora_targets} adapts one "
            "by itself; leave one of the two settings out"
        )
    return adapters


def adapts_ends(model: Any) -> bool:  # Any: as `transformers` has it
    """Whether the embeddings or the head have an adapter."""
    return any(hasattr(end, "base_layer") for end in (model.get_input_embeddings(), model.get_output_embeddings()))


def save_adapters(adapters: Any, state: Mapping[str, Tensor], folder: Path) -> None:  # Any: peft's model
    """Write the adapters for `PeftModel.from_pretrained(model, folder)`; `state` has all weights, by their names."""
    from peft import get_peft_model_state_dict

    whole = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
    tensors = get_peft_model_state_dict(adapters, state_dict=whole, save_embedding_layers=False)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    adapters.peft_config["default"].save_pretrained(folder)


def merged(state: Mapping[str, Tensor], settings: TrainSettings) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, weight before and after training of the model without adapters; the latter is float32 where one was."""
    scale = settings.lora_alpha / settings.lora_rank
    for name, weight in state.items():
        layer, adapted, kind = name.partition(_BASE)
        if ".lora_" in name:
            continue
        if not adapted or kind != "weight":
            yield name.replace(_BASE, "."), weight, weight
            continue
        if f"{layer}.lora_A.default.weight" in state:
            down = state[f"{layer}.lora_A.default.weight"]  # (rank, in)
            up = state[f"{layer}.lora_B.default.weight"]  # (out, rank)
        else:  # of embeddings, which are stored the other way round
            down = state[f"{layer}.lora_embedding_B.default"].T  # (rank, hidden)
            up = state[f"{layer}.lora_embedding_A.default"].T  # (vocabulary, rank)
        yield f"{layer}.weight", weight, weight.float() + scale * (up.float() @ down.float())
