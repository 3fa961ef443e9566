"""Adapters (LoRA) in peft's format, merged into the weights of their base when it is loaded.

For: adapter folders that anybody may have made, without peft. Not for: training them (`training.adapters`).
A merged weight is W + scale * B @ A, computed in float32.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffucoder.errors import CheckpointError
from diffucoder.model_files import one_line, read_json, shown
from diffucoder.models.families import Family
from diffucoder.models.hub import KNOWN_MODELS, find
from diffucoder.models.weights import ADAPTER_WEIGHTS, read_tensors, stored_tensors

CONFIG = "adapter_config.json"
_Nothing = Annotated[dict[str, Any] | list[Any] | None, Field(max_length=0)]  # Any: of no items


class _Config(BaseModel):
    """The settings of an adapter: those that change what is merged."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    peft_type: Literal["LORA"]
    base_model_name_or_path: Annotated[str, Field(min_length=1)]
    r: Annotated[int, Field(gt=0, le=2**16)]
    lora_alpha: Annotated[float, Field(gt=0, le=1e6)]
    use_rslora: bool = False
    use_dora: Literal[False] = False
    fan_in_fan_out: Literal[False] = False
    lora_bias: Literal[False] = False
    bias: Literal["none"] = "none"
    rank_pattern: _Nothing = None
    alpha_pattern: _Nothing = None
    modules_to_save: _Nothing = None
    layer_replication: _Nothing = None


@dataclass(frozen=True)
class Adapter:
    """An adapter whose settings are understood and whose weights are not read yet."""

    source: str | Path | None
    revision: str | None
    base: str  # as its config names it
    rank: int
    scale: float


def read_adapter(folder: Path, source: str | Path | None, revision: str | None) -> Adapter:
    """The adapter in `folder`, which was found as `source`. CheckpointError if it cannot be merged."""
    try:
        config = _Config.model_validate(read_json(folder / CONFIG))
    except ValidationError as error:
        wrong = error.errors()[0]
        name = ".".join(map(str, wrong["loc"]))
        raise CheckpointError(
            f"{folder / CONFIG}: {name}={shown(wrong['input'])} is not supported ({wrong['msg']}); "
            "use a plain LoRA adapter, or merge this one with peft"
        ) from None
    divisor = math.sqrt(config.r) if config.use_rslora else config.r
    return Adapter(source, revision, config.base_model_name_or_path, config.r, config.lora_alpha / divisor)


def base_of(adapter: Adapter, folder: Path) -> str | Path:
    """What to load as the base of the adapter in `folder`.

    The name in the file may be anybody's, so only known models are fetched from the Hub. A path that is not here means
    the known model of that name. CheckpointError if the base is not on this machine.
    """
    for known in KNOWN_MODELS:
        if known.hub_id.rpartition("/")[2] == os.path.basename(adapter.base) and not os.path.isdir(adapter.base):
            return known.hub_id
    try:
        find(adapter.base, fetch=False)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder / CONFIG}: base {shown(adapter.base)} is not on this machine; fetch it, or write its folder or "
            "Hub id as base_model_name_or_path"
        ) from error
    return adapter.base


@torch.no_grad()
def merge(adapter: Adapter, folder: Path, model: Any, family: Family) -> None:  # Any: a transformers model
    """Add the adapter in `folder` to the weights of its base, in place. CheckpointError unless all of it fits them."""
    stored = stored_tensors(folder, [ADAPTER_WEIGHTS])
    weights = dict(model.named_parameters())
    targets = {}
    for name in stored:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")
        down = stored.get(f"base_model.model.{module}.lora_A.weight")  # (rank, in)
        up = stored.get(f"base_model.model.{module}.lora_B.weight")  # (out, rank)
        weight = weights.get(family.weight_name(f"{module}.weight"))
        fits = weight is not None and weight.ndim == 2 and down is not None and up is not None
        if not fits or (*up.shape, *down.shape) != (weight.shape[0], adapter.rank, adapter.rank, weight.shape[1]):
            raise CheckpointError(
                f"{folder / ADAPTER_WEIGHTS}: {one_line(name)} does not fit a matrix of the base; use the base that "
                f"the adapter was trained on, with rank {adapter.rank}"
            )
        targets[module] = weight
    tensors = read_tensors(stored)
    for module, weight in targets.items():
        a, b = (tensors[f"base_model.model.{module}.lora_{part}.weight"].float().to(weight.device) for part in "AB")
        weight.copy_(weight.float() + adapter.scale * (b @ a))
