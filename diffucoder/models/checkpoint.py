"""Checkpoints: load models from a folder, the Hub or the package, and write them.

For: finding and loading models, choosing device and dtype, saving. Not for: where models are (`hub`), families
(`families`), reading a config (`model_config`) or weights (`weights`), the forward pass (`denoiser`), training state.

A model of another family than Dream is written as it was read, with its own names. Others are written as Dream if Dream
can represent them; Llama parents get zero q/k/v biases. The rest (Qwen3's q/k norms, scaled RoPE, unshifted rows,
blocks) keep the type of their layers. `diffucoder.json` has what a config.json does not say.
"""

import json
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffucoder.errors import CheckpointError, ConfigError
from diffucoder.files import Json, write_json
from diffucoder.model_files import read_json, shown
from diffucoder.models.adapters import Adapter, merge, read_adapter
from diffucoder.models.attention import Attention
from diffucoder.models.denoiser import Denoiser
from diffucoder.models.families import Published, Signs, attention_of, family_of
from diffucoder.models.hub import find
from diffucoder.models.model_config import transformers_config, whole_number
from diffucoder.models.plain import PlainModel
from diffucoder.models.weights import INDEX, WEIGHTS, expected_shapes, load_causal_lm, weight_names
from diffucoder.tokenizer import Tokenizer
from diffucoder.tokenizer_files import read_config

EXTRAS = "diffucoder.json"
TRAINED_LENGTH = "trained_length"  # of config.json, where training has written it
_DREAM_SIZES = (
    *("attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "initializer_range"),
    *("intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers"),
    *("num_key_value_heads", "pad_token_id", "rms_norm_eps", "vocab_size"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A model on this machine whose config is understood and whose weights are not read yet."""

    source: str | Path | None
    revision: str | None
    folder: Path
    config: Any  # a transformers config, which mypy does not follow
    mask_id: int | None  # None: an autoregressive model
    shifted: bool  # row i - 1 of the model scores token i
    attention: Attention
    published: Published
    trained_length: int | None = None  # tokens of the longest rows it was trained on, where config.json has that
    adapter: tuple[Adapter, str | Path | None, str | None] | None = None  # to be merged, with its source and revision

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the config names for the weights; float32 if it names none."""
        return self.config.dtype or torch.float32


Source = str | Path | Checkpoint | None
"""A folder, a Hub id, a name of `known_models`, a checkpoint found before, or the shipped model (None)."""


def load_denoiser(
    source: Source = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    mask_id: int | None = None,
) -> Denoiser:
    """Load a model, ready to score.

    `dtype` and `device` default to what is fast here. `mask_id` makes a denoiser of an autoregressive parent.
    CheckpointError if the model cannot be found, fetched or understood, or its weights do not fit its config.
    """
    checkpoint = find_checkpoint(source, revision=revision)
    if mask_id is None:
        mask_id = checkpoint.mask_id
    if mask_id is None:
        raise CheckpointError(
            f"{checkpoint.folder} holds an autoregressive model (its config names no mask_token_id); name a free id "
            "as its mask: load_denoiser(folder, mask_id=...), or make a checkpoint of it: diffucoder convert"
        )
    device, dtype = default_device_and_dtype(device, dtype)
    folder = find(checkpoint.source, revision=checkpoint.revision, weights=True)
    model = load_causal_lm(folder, checkpoint.config, checkpoint.published, dtype=dtype, device=device)
    if checkpoint.adapter is not None:
        adapter, source, revision = checkpoint.adapter
        merge(adapter, find(source, revision=revision, weights=True), model, checkpoint.published.family)
    denoiser = Denoiser.from_causal_lm(
        model, mask_id=mask_id, shifted=checkpoint.shifted, attention=checkpoint.attention
    )
    denoiser.published = checkpoint.published
    denoiser.trained_length = checkpoint.trained_length
    return denoiser


def load_tokenizer(source: Source = None) -> Tokenizer:
    """Load the tokenizer beside a model; a parent's gets a mask token. CheckpointError if it is damaged or unfit."""
    checkpoint = find_checkpoint(source)
    family = checkpoint.published.family
    mask_id = None if family.title == "Dream" else checkpoint.mask_id
    try:
        tokenizer = Tokenizer.load(
            checkpoint.folder, add_mask=checkpoint.mask_id is None, mask_id=mask_id, end_ids=family.end_ids
        )
        if checkpoint.mask_id is not None:
            tokenizer.check_fits(mask_id=checkpoint.mask_id, rows=checkpoint.config.vocab_size)
    except CheckpointError as error:
        if str(checkpoint.folder) in str(error):
            raise
        raise CheckpointError(f"{checkpoint.folder}: {error}") from error
    return tokenizer


def load_with_tokenizer(
    source: Source = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    add_mask: bool = False,
) -> tuple[Denoiser, Tokenizer]:
    """As `load_denoiser`, with the tokenizer; `add_mask` makes a denoiser of a parent, with its tokenizer's mask."""
    checkpoint = find_checkpoint(source)
    tokenizer = load_tokenizer(checkpoint)  # first: it is quick, and fails for most of the same reasons
    mask_id = tokenizer.mask_id if add_mask else None
    return load_denoiser(checkpoint, dtype=dtype, device=device, mask_id=mask_id), tokenizer


def load_shipped(
    *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> tuple[Denoiser, Tokenizer]:
    """As `load_with_tokenizer`, the shipped model for decoding, without importing transformers."""
    folder = find(None)
    config = SimpleNamespace(**read_json(folder / "config.json"), is_causal=False)
    device, dtype = default_device_and_dtype(device, dtype)
    model = PlainModel(config, lambda: load_denoiser(None, dtype=dtype, device=device).model)
    model.load_state_dict(load_file(folder / WEIGHTS), assign=True)
    denoiser = Denoiser(model.to(device, dtype).eval(), mask_id=config.mask_token_id)
    denoiser.trained_length = config.trained_length
    return denoiser, Tokenizer.load(folder)


def default_device_and_dtype(
    device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> tuple[torch.device, torch.dtype]:
    """Choose what is not given: the accelerator if there is one, and bfloat16 where the device multiplies it fast.

    ConfigError for a device that is not on this machine.
    """
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        device = torch.device(device)
        torch.empty(0, device=device).cpu()  # "meta" is a device, but returns nothing
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ConfigError(f"device={str(device)!r} is not on this machine; use 'cpu' or leave it out") from error
    if dtype is None:
        dtype = torch.bfloat16 if _has_fast_bf16(device) else torch.float32
    return device, dtype


def _has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices natively; emulated ones are many times slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    if device.type != "cpu":
        return True
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    if not has_onednn or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine() == "aarch64":
        return True
    # on x86 oneDNN also supports bfloat16 where it has to emulate it: on AVX-512 without these two
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def find_checkpoint(source: Source, *, revision: str | None = None) -> Checkpoint:
    """Find and understand a model without fetching or reading its weights; errors as for `load_denoiser`."""
    if isinstance(source, Checkpoint):
        return source
    folder = find(source, revision=revision)
    if os.path.lexists(folder / "adapter_config.json"):
        return _find_base(source, folder, revision)
    if not os.path.lexists(folder / "config.json"):
        if os.path.lexists(folder / "settings.json"):
            raise CheckpointError(
                f"{folder} is the folder of a training run; name its finished model: {folder / 'model'}"
            )
        raise CheckpointError(f"{folder} has no config.json; is it a model's folder?")
    fields = read_json(folder / "config.json")
    extras = read_json(folder / EXTRAS)
    mask_token = read_config(folder).get("mask_token")
    if isinstance(mask_token, Mapping):
        mask_token = mask_token.get("content")
    signs = Signs(folder, fields, mask_token, weight_names(folder))
    family = family_of(signs, extras.get("family"))
    config = transformers_config(family, fields, folder)
    mask_id = whole_number(extras.get("mask_token_id", fields.get("mask_token_id")))
    if mask_id is None and family.diffusion:
        mask_id = Tokenizer.load(folder).mask_id if mask_token else family.mask_id
    if mask_id is None and family.diffusion:
        kind = family.title
        raise CheckpointError(f"{folder}/config.json: {kind} needs a mask_token_id; add it (DiffuCoder's is 151666)")
    if mask_id is not None and (type(mask_id) is not int or mask_id not in range(config.vocab_size)):
        raise CheckpointError(
            f"{folder}: mask_token_id={shown(mask_id)} is not an id below vocab_size={config.vocab_size}"
        )
    shifted = extras.get("shifted", family.shifted)
    if not isinstance(shifted, bool):
        raise CheckpointError(f"{folder / EXTRAS}: shifted={shown(shifted)} is not true or false; fetch it again")
    attention = attention_of(signs, extras, family.attention)
    trained = fields.get(TRAINED_LENGTH)
    if type(trained) is not int or trained < 1:
        trained = None
    return Checkpoint(source, revision, folder, config, mask_id, shifted, attention, Published(family, fields), trained)


def _find_base(source: str | Path | None, folder: Path, revision: str | None) -> Checkpoint:
    """The base of the adapter in `folder`, with the adapter to be merged and the attention that it was trained for."""
    if os.path.lexists(folder / "config.json"):  # transformers would add it to the model
        raise CheckpointError(f"{folder} holds an adapter (adapter_config.json); merge it, or move it elsewhere")
    is_local = os.path.isdir(os.path.expanduser(source or ""))
    adapter, place = read_adapter(folder, fetch=not is_local)
    if os.path.lexists(find(place) / "adapter_config.json"):
        raise CheckpointError(f"{folder}: base {place} is an adapter itself; merge that one first")
    base = find_checkpoint(place)
    signs = Signs(folder, {})
    trained = Attention(32, "prompt") if signs.name.startswith("d2f") else base.attention
    attention = attention_of(signs, read_json(folder / EXTRAS), trained)
    return replace(base, attention=attention, adapter=(adapter, source, revision))


def save_denoiser(
    denoiser: Denoiser, folder: str | Path, *, state: Mapping[str, Tensor] | None = None, as_parent: bool = False
) -> None:
    """Write `denoiser` to `folder` in the format of its family (module docstring).

    `state` replaces the model's own weights, by their transformers names. `as_parent` writes the plain causal model
    that it is with causal attention. Saving over the folder that `denoiser` was loaded from is safe. CheckpointError
    if the model has weights that its config does not explain (adapters: merge them first).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = _named_weights(denoiser, state)
    dtype = str(weights["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    published = denoiser.published
    if as_parent:
        files = {"config.json": _own_config(denoiser, dtype)}
    elif published is not None and published.family.keeps_format:
        files = {"config.json": _published_config(denoiser, published, dtype), EXTRAS: _extras(denoiser)}
        weights = {published.family.stored_name(name): tensor for name, tensor in weights.items()}
    elif why_not_dream(denoiser):
        files = {"config.json": _own_config(denoiser, dtype), EXTRAS: _extras(denoiser)}
    else:
        weights = dream_weights(denoiser, state)
        files = _dream_files(denoiser, dtype)
    if not as_parent and denoiser.trained_length is not None:
        files["config.json"][TRAINED_LENGTH] = denoiser.trained_length
    for name, fields in files.items():
        write_json(folder / name, dict(sorted(fields.items())))
    for name in {"generation_config.json", EXTRAS} - files.keys():  # of an earlier save
        (folder / name).unlink(missing_ok=True)
    _write_weights(folder, weights)


def why_not_dream(denoiser: Denoiser) -> str | None:
    """What Dream's config and layers cannot describe of this model; None if they describe it completely."""
    config = denoiser.config
    size = config.hidden_size // config.num_attention_heads
    strange = {
        "rows that are not shifted": not denoiser.shifted,
        "block-causal attention": denoiser.attention.block is not None,
        "norms of queries and keys": config.model_type not in ("qwen2", "llama"),
        "scaled RoPE": config.rope_parameters["rope_type"] != "default",
        "biases elsewhere than at q, k, v": any(
            getattr(config, name, False) for name in ("attention_bias", "mlp_bias")
        ),
        "heads of another size": getattr(config, "head_dim", None) not in (None, size),
    }
    return next((what for what, there in strange.items() if there), None)


def dream_weights(denoiser: Denoiser, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights of a model that Dream can represent, as Dream stores them: with an untied head and q, k, v biases."""
    weights = _named_weights(denoiser, state)
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"].clone())
    for name, weight in list(weights.items()):
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            weights.setdefault(name.replace(".weight", ".bias"), weight.new_zeros(weight.shape[0]))
    return weights


def _named_weights(denoiser: Denoiser, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """`state`, or the model's own weights, by their transformers names, on the CPU; a tied head is left out."""
    if state is None:
        state = denoiser.model.state_dict()
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    extra = sorted(weights.keys() - expected_shapes(denoiser.config).keys())
    if extra:
        raise CheckpointError(
            f"model has {len(extra)} weights that its config does not explain, as {extra[0]}; merge adapters first"
        )
    if denoiser.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return weights


def _dream_files(denoiser: Denoiser, dtype: str) -> dict[str, Json]:
    """The JSON files of a Dream checkpoint, key for key as the release has them."""
    config = denoiser.config
    fields: Json = {name: getattr(config, name) for name in _DREAM_SIZES}
    fields |= {
        "architectures": ["DreamModel"],
        "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
        "mask_token_id": denoiser.mask_id,
        "max_window_layers": config.num_hidden_layers,
        "model_type": "Dream",
        "rope_scaling": None,
        "rope_theta": config.rope_parameters["rope_theta"],
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": False,
        "use_mrope": False,
        "use_sliding_window": False,
    }
    # the release reads its mask id from the second file when it generates, and does not load without it
    names = ("bos_token_id", "eos_token_id", "mask_token_id", "pad_token_id")
    return {"config.json": fields, "generation_config.json": {name: fields[name] for name in names}}


def _own_config(denoiser: Denoiser, dtype: str) -> Json:
    """The config.json of a model that keeps the type of its layers."""
    fields: Json = json.loads(denoiser.config.to_json_string())
    fields |= {"architectures": [type(denoiser.model).__name__], "dtype": dtype}
    for name in ("is_causal", "transformers_version"):  # the first would half-convert it for other tools
        fields.pop(name, None)
    return fields


def _published_config(denoiser: Denoiser, published: Published, dtype: str) -> Json:
    """The config.json that a model was published with, and what has changed since."""
    fields = dict(published.fields)
    for name in ("vocab_size", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(denoiser.config, name)
        if fields.get(published.key(name)) != value:
            fields[published.key(name)] = value
    fields["dtype" if "dtype" in fields else "torch_dtype"] = dtype
    if "mask_token_id" in fields:
        fields["mask_token_id"] = denoiser.mask_id
    return fields


def _extras(denoiser: Denoiser) -> Json:
    """What is needed to use a model and is not in its config.json."""
    fields: Json = {"mask_token_id": denoiser.mask_id, "shifted": denoiser.shifted}
    if denoiser.attention.block is not None:
        fields |= {"block_size": denoiser.attention.block, "block_origin": denoiser.attention.origin}
    if denoiser.published is not None and denoiser.published.family.keeps_format:
        fields |= {"block_size": denoiser.attention.block, "family": denoiser.published.family.title}
    return fields


def _write_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    """Write `model.safetensors`, or shards and their index, in place of the files of an earlier save."""
    from huggingface_hub import split_torch_state_dict_into_shards  # late: reading a folder does not need it

    partial = folder / "partial"  # never write into an old file: these tensors may be mapped from it
    shutil.rmtree(partial, ignore_errors=True)  # of a save that was cut short
    partial.mkdir()
    shards = split_torch_state_dict_into_shards(weights, max_shard_size="5GB")
    for file, names in shards.filename_to_tensors.items():
        save_file({name: weights[name] for name in names}, partial / file, metadata={"format": "pt"})
    if shards.is_sharded:
        weight_map = dict(sorted(shards.tensor_to_filename.items()))
        write_json(partial / INDEX, {"metadata": shards.metadata, "weight_map": weight_map})
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    for path in partial.iterdir():
        shutil.copymode(folder / "config.json", path)  # safetensors keeps files from everyone else
        path.replace(folder / path.name)
    partial.rmdir()
