"""Adapters (LoRA) in peft's format, merged into the weights of their base when it is loaded.

For: adapter folders that anybody may have made, without peft. Not for: training them (`training.adapters`).
A merged weight is W + scale * B @ A, computed in float32.
"""

import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from diffucoder.errors import CheckpointError
from diffucoder.model_files import one_line, read_json, shown
from diffucoder.models.families import Family
from diffucoder.models.hub import find, known_models
from diffucoder.models.model_config import validated
from diffucoder.models.weights import ADAPTER_WEIGHTS, read_tensors, stored_tensors

CONFIG = "adapter_config.json"
_Nothing = Annotated[dict[str, Any] | list[Any] | None, Field(max_length=0)]  # Any: of no items


class Adapter(BaseModel):
    """The settings of an adapter that change what is merged; its weights are not read yet."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    peft_type: Literal["LORA"]
    base_model_name_or_path: Annotated[str, Field(min_length=1)]
    r: Annotated[int, Field(gt=0, le=2**16)]
    lora_alpha: Annotated[float, Field(gt=0, le=1e6)]
    init_lora_weights: Literal[True, False, "gaussian", "eva", "orthogonal"] = True  # others change the base
    use_rslora: bool = False
    use_dora: Literal[False] = False
    use_qalora: Literal[False] = False
    fan_in_fan_out: Literal[False] = False
    lora_bias: Literal[False] = False
    bias: Literal["none"] = "none"
    rank_pattern: _Nothing = None
    alpha_pattern: _Nothing = None
    modules_to_save: _Nothing = None
    layer_replication: _Nothing = None


def read_adapter(folder: Path, *, fetch: bool) -> tuple[Adapter, str | Path]:
    """The adapter in `folder`, and what to load as its base: the folder that it names, or a model of that name.

    The name may be anybody's: `fetch` allows that a known model is downloaded, nothing else is. CheckpointError if the
    adapter cannot be merged, or its base is not on this machine.
    """
    adapter = validated(Adapter, read_json(folder / CONFIG), str(folder / CONFIG), "use a plain LoRA adapter")
    named = adapter.base_model_name_or_path
    base: str = named
    if os.path.isabs(named) and not os.path.isdir(named):  # on the machine of its authors
        base = os.path.basename(named)
    for known in known_models():
        if base in (known.hub_id, os.path.basename(known.hub_id)):
            base = known.hub_id
            if fetch:
                return adapter, base
    try:
        return adapter, find(base, fetch=False)
    except CheckpointError as error:
        message = f"base_model_name_or_path={shown(named)} is not on this machine; fetch it, or write where it is"
        raise CheckpointError(f"{folder / CONFIG}: {message}") from error


@torch.no_grad()
def merge(adapter: Adapter, folder: Path, model: Any, family: Family) -> None:  # Any: a transformers model
    """Add the adapter in `folder` to the weights of its base, in place. CheckpointError unless all of it fits them."""
    stored = stored_tensors(folder, [ADAPTER_WEIGHTS])
    if not stored:
        raise CheckpointError(f"{folder / ADAPTER_WEIGHTS} has no weights; fetch it again")
    weights = dict(model.named_parameters())
    rank = adapter.r
    targets = {}
    for name in stored:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")
        down = stored.get(f"base_model.model.{module}.lora_A.weight")  # (rank, in)
        up = stored.get(f"base_model.model.{module}.lora_B.weight")  # (out, rank)
        weight = weights.get(family.weight_name(f"{module}.weight"))
        shapes = [tensor.shape for tensor in (up, down) if tensor is not None]
        if weight is None or shapes != [(*weight.shape[:1], rank), (rank, *weight.shape[1:])]:
            raise CheckpointError(
                f"{folder / ADAPTER_WEIGHTS}: {one_line(name)} does not fit a matrix of the base; use the base that "
                f"the adapter was trained on, with rank {rank}"
            )
        targets[module] = weight
    scale = adapter.lora_alpha / (math.sqrt(rank) if adapter.use_rslora else rank)
    tensors = read_tensors(stored)
    for module, weight in targets.items():
        a, b = (tensors[f"base_model.model.{module}.lora_{part}.weight"].float().to(weight.device) for part in "AB")
        weight.copy_(weight.float() + scale * (b @ a))
