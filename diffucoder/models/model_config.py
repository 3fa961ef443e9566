"""config.json: what a model's folder says about its layers, checked, as a config of transformers.

For: understanding a config without remote code. Not for: which files there are (`checkpoint`), weights (`weights`).
Only fields that describe layers are read. Others set up remote code, attention kernels or other classes.
"""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffucoder.errors import CheckpointError
from diffucoder.files import Json
from diffucoder.model_files import one_line, shown
from diffucoder.models.families import Family
from diffucoder.models.weights import transformers_silenced

Model = TypeVar("Model", bound=BaseModel)
DTYPES = ("float32", "bfloat16", "float16", "float64")

_Size = Annotated[int, Field(gt=0, le=2**24)] | None
_Number = Annotated[float, Field(gt=0, le=1e18)] | None
_Share = Annotated[float, Field(ge=0, le=1)] | None
_TokenId = Annotated[int, Field(ge=-1, lt=2**31)]


class _Rope(BaseModel):
    """How positions are scaled; all rules of transformers have some of these."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    type: str | None = None
    rope_type: Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"] | None = None
    rope_theta: _Number = None
    factor: _Number = None
    original_max_position_embeddings: _Number = None
    attention_factor: _Number = None
    beta_fast: _Number = None
    beta_slow: _Number = None
    low_freq_factor: _Number = None
    high_freq_factor: _Number = None
    short_factor: Annotated[list[float], Field(max_length=2**16)] | None = None
    long_factor: Annotated[list[float], Field(max_length=2**16)] | None = None


class Layers(BaseModel):
    """The types and bounds of the fields that describe layers: no larger than any model, so that no size overflows."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    vocab_size: _Size = None
    hidden_size: _Size = None
    intermediate_size: _Size = None
    num_hidden_layers: Annotated[int, Field(gt=0, le=1000)] | None = None
    num_attention_heads: _Size = None
    num_key_value_heads: _Size = None
    head_dim: _Size = None
    max_position_embeddings: Annotated[int, Field(gt=0, lt=2**31)] | None = None
    max_window_layers: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    sliding_window: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    pretraining_tp: _Size = None
    hidden_act: Annotated[str, Field(max_length=50)] | None = None
    layer_types: Annotated[list[str], Field(max_length=1000)] | None = None
    rms_norm_eps: _Share = None
    attention_dropout: _Share = None
    initializer_range: _Share = None
    rope_theta: _Number = None
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    use_cache: bool | None = None
    use_sliding_window: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    tie_word_embeddings: bool | None = None
    pad_token_id: _TokenId | None = None
    bos_token_id: _TokenId | None = None
    eos_token_id: _TokenId | Annotated[list[_TokenId], Field(max_length=1000)] | None = None


def transformers_config(family: Family, fields: Json, folder: Path) -> Any:  # Any: mypy does not follow transformers
    """The config as transformers has it. CheckpointError if it does not describe a model that can be loaded."""
    from huggingface_hub.errors import StrictDataclassError  # late: seconds, which decoding alone does not need
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    quantised = fields.get("quantization_config")
    if quantised:
        raise CheckpointError(
            f"{folder}/config.json: the weights are quantised (quantization_config={one_line(quantised)}), which is "
            "not supported; use the model with dense weights"
        )
    kind = CONFIG_MAPPING[family.architecture]
    of_every_kind = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    of_layers = {field.name for field in dataclasses.fields(kind)} - of_every_kind
    described: Json = {"dtype": _named_dtype(fields, folder)}
    place = f"{folder}/config.json is not a {family.title} config"
    for name, needed in family.config_values.items():
        if fields.get(name) not in (None, needed):
            raise CheckpointError(f"{place}: {name}={shown(fields[name])} is not supported; it must be {needed!r}")
    renamed = {ours: fields[theirs] for theirs, ours in family.config_names.items() if fields.get(theirs) is not None}
    for name, value in (fields | renamed).items():
        if name.endswith("_token_id"):
            value = whole_number(value)
        if name in of_layers or (name in ("head_dim", "rope_theta", "rope_scaling") and value is not None):
            described[name] = value
    validated(Layers, described, place, "fetch it again")
    try:
        with transformers_silenced():
            config = kind(**described)
    except (TypeError, ValueError, KeyError, ArithmeticError, StrictDataclassError) as error:
        raise CheckpointError(f"{place}: {one_line(error)}") from error
    _check_heads(config, place)
    turned = fields.get("partial_rotary_factor", config.rope_parameters.get("partial_rotary_factor"))
    if turned not in (None, 1):
        raise CheckpointError(f"{place}: partial_rotary_factor={shown(turned)} is not supported; it must be 1")
    return config


def validated(kind: type[Model], fields: Json, place: str, way_out: str) -> Model:
    """`fields` as a pydantic model; CheckpointError for the first that is wrong."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        wrong = error.errors()[0]
        name = ".".join(map(str, wrong["loc"]))
        raise CheckpointError(f"{place}: {name}={shown(wrong['input'])}: {wrong['msg']}; {way_out}") from None


def _check_heads(config: Any, place: str) -> None:  # Any: mypy does not follow transformers
    """CheckpointError for heads that cannot attend: transformers finds out in the first forward pass."""
    narrow = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if narrow:
        raise CheckpointError(f"{place}: a model with {min(narrow)} layers cannot see a canvas; use full attention")
    heads = config.num_attention_heads
    key_heads = config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if heads % key_heads:
        raise CheckpointError(f"{place}: num_attention_heads={heads} is not a multiple of {key_heads} key heads")
    if size == 0 or size % 2:
        raise CheckpointError(f"{place}: heads of {size} numbers cannot be rotated by their positions; it must be even")


def _named_dtype(fields: Json, folder: Path) -> torch.dtype | None:
    """The dtype that a config.json names, None if it names none. CheckpointError if weights cannot have it."""
    name = fields.get("dtype") or fields.get("torch_dtype")
    if name is None:
        return None
    if str(name).removeprefix("torch.") not in DTYPES:
        raise CheckpointError(f"{folder}/config.json: dtype {shown(name)} is not one of {', '.join(DTYPES)}; write one")
    return getattr(torch, str(name).removeprefix("torch."))  # type: ignore[no-any-return]  # of a module


def whole_number(value: Any) -> Any:  # Any: from a file
    """`value`, an id or a list of ids, with whole numbers such as 2.0 as integers."""
    if isinstance(value, list):
        return [whole_number(each) for each in value]
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    return value
