"""Checkpoints: a folder, a Hub id or the shipped model in; a Dream checkpoint out.

For: understanding a model's config without remote code, checking the weights before reading them, choosing device and
dtype (here and nowhere else), and writing checkpoints that other Dream tools read.
Not for: where models are (`hub`), the forward pass (`denoiser`), text (`tokenizer`), training state.

A Dream model *is* a Qwen2 model attended both ways, so `model_type: "Dream"` loads as transformers' Qwen2 and its
`auto_map` is ignored. Written back the same way wherever Dream can say it; Llama parents get zero q/k/v biases. What
Dream cannot say (Qwen3's q/k norms, scaled RoPE, unshifted rows) keeps its own type, plus `diffucoder.json`.
"""

import functools
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from diffucoder.errors import CheckpointError, ConfigError
from diffucoder.models.denoiser import SUPPORTED_TYPES, Denoiser, set_causal
from diffucoder.models.hub import find
from diffucoder.models.quantize import SHARD, packed, unpacked
from diffucoder.tokenizer import Tokenizer

WEIGHTS, INDEX, EXTRAS = "model.safetensors", "model.safetensors.index.json", "diffucoder.json"
TEXT_FILES = ["*.json", "*.jinja", "merges.txt"]

Json = dict[str, Any]  # Any: whatever a JSON file holds


def load_denoiser(
    source: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    mask_id: int | None = None,
) -> Denoiser:
    """Load a model, ready to score: from a folder, a Hub id, a name of `KNOWN_MODELS`, or the shipped one (None).

    `dtype` and `device` default to what is fast here (`default_device_and_dtype`); files in another dtype are cast.
    `mask_id` makes a denoiser of an autoregressive parent, which names no mask token itself. CheckpointError where
    the model cannot be found, fetched or understood, or its weights do not fit its config.
    """
    description = _describe(find(source, revision=revision, patterns=[*TEXT_FILES, "*.safetensors"]))
    mask_id = description.mask_id if mask_id is None else mask_id
    if mask_id is None:
        raise CheckpointError(
            f"{description.folder} holds an autoregressive model (its config names no mask_token_id); name a free "
            "id as its mask: load_denoiser(folder, mask_id=...), or make a checkpoint of it: diffucoder convert"
        )
    device, dtype = default_device_and_dtype(device, dtype)
    skeleton = _skeleton(description)
    _check_weights(description, skeleton)
    kind, form = type(skeleton), {"config": skeleton.config, "dtype": dtype, "attn_implementation": "sdpa"}
    with quiet():
        if description.int8:
            model = kind.from_pretrained(None, state_dict=_unpacked(description.folder, skeleton, dtype), **form)
        else:
            model = kind.from_pretrained(description.folder, local_files_only=True, **form)
    model.to(device).eval()
    return Denoiser.from_causal_lm(model, mask_id=mask_id, shifted=description.shifted)


def load_tokenizer(source: str | Path | None = None, *, revision: str | None = None) -> Tokenizer:
    """Load the tokenizer beside a model (named as in `load_denoiser`), checked to fit that model's vocabulary.

    An autoregressive parent's tokenizer gets a mask token where it has none. CheckpointError as `load_denoiser`.
    """
    description = describe(source, revision=revision)
    tokenizer = Tokenizer.load(description.folder, add_mask=description.mask_id is None)
    if description.mask_id is not None:
        tokenizer.check_fits(mask_id=description.mask_id, rows=description.config.vocab_size)
    return tokenizer


def save_denoiser(
    denoiser: Denoiser, folder: str | Path, *, state: Mapping[str, Tensor] | None = None, int8: bool = False
) -> None:
    """Write `denoiser` to `folder` as a Dream checkpoint, or its own type plus `diffucoder.json` (module docstring).

    `state` stands in for the model's own weights, by their transformers names: gathered ones where the model is sharded
    over processes, or the same in another dtype. `int8` rounds matrices to eight bits (`quantize`), in files under
    16 MiB; a head that equals the embeddings is then stored once.

    Loading and saving again gives the same bytes. Weights keep their dtype, in safetensors of at most 5 GB. Files are
    replaced whole, so saving over the folder that `denoiser` was loaded from is safe. CheckpointError where the model
    carries weights its config does not explain (adapters: merge them first).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dream = fits_dream(denoiser) and not int8
    state = dream_state(denoiser, state) if dream else _state(denoiser, state)
    dtype = "bfloat16" if int8 else _name(next(iter(state.values())).dtype)
    if dream:
        _write_json(folder / "config.json", _dream_config(denoiser) | {"torch_dtype": dtype})
        ids = {f"{kind}_token_id": getattr(denoiser.config, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
        # the release reads its mask id from here when it generates, and will not load without the file
        _write_json(folder / "generation_config.json", {**ids, "mask_token_id": denoiser.mask_id})
        (folder / EXTRAS).unlink(missing_ok=True)
    else:
        config = json.loads(denoiser.config.to_json_string())
        for name in ("is_causal", "transformers_version"):  # the first would half-convert it for other tools
            config.pop(name, None)
        extras: Json = {"mask_token_id": denoiser.mask_id, "shifted": denoiser.shifted}
        if int8:
            config["tie_word_embeddings"], extras["weights"] = _once(state), "int8"
        _write_json(folder / "config.json", {**config, "dtype": dtype})
        _write_json(folder / EXTRAS, extras)
        (folder / "generation_config.json").unlink(missing_ok=True)
    if int8:
        _write_weights(folder, packed(state), largest=SHARD)
    else:
        _write_weights(folder, state)


def save_parent(denoiser: Denoiser, folder: str | Path, *, state: Mapping[str, Tensor]) -> None:
    """Write `denoiser` as the plain causal model it is while attention is causal; `state` as in `save_denoiser`."""
    set_causal(denoiser.model, True)
    try:
        del denoiser.model.config.is_causal  # the default, so other tools need not meet the word
        with quiet():
            denoiser.model.to(next(iter(state.values())).dtype).save_pretrained(folder, state_dict=dict(state))
    finally:
        set_causal(denoiser.model, False)


def default_device_and_dtype(
    device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> tuple[torch.device, torch.dtype]:
    """The one place that chooses: the accelerator if there is one, and bf16 where it is fast, else fp32.

    What is given is kept. On a CPU bf16 is timed once against fp32: pass a `dtype` where results must not depend on
    the machine. ConfigError for a device that is not here.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(device)
        torch.empty(0, device=device).cpu()  # "meta" is a device, but gives nothing back
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ConfigError(f"device={str(device)!r} is not on this machine; use 'cpu' or leave it out") from error
    if dtype is None:
        fast = _cpu_has_fast_bf16() if device.type == "cpu" else device.type != "cuda" or torch.cuda.is_bf16_supported()
        dtype = torch.bfloat16 if fast else torch.float32
    return device, dtype


@functools.cache
def _cpu_has_fast_bf16() -> bool:
    """Whether bf16 clearly wins a small product: with AMX or AVX512-BF16 it does, emulated it loses tenfold."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(128, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        runs = []
        for _ in range(4):  # the first one warms up; the best one counts
            start = time.perf_counter()
            left @ right
            runs.append(time.perf_counter() - start)
        seconds[dtype] = min(runs)
    return seconds[torch.bfloat16] * 1.3 < seconds[torch.float32]


# ---- finding and understanding ----


@dataclass(frozen=True)
class Description:
    """What a folder says about its model: where it is, its transformers config, its mask (None: autoregressive)."""

    folder: Path
    config: Any  # a transformers config, which mypy does not follow
    mask_id: int | None
    shifted: bool
    int8: bool = False  # weights are stored as `quantize` has them

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the config names for the weights; fp32 where it names none."""
        return self.config.dtype or torch.float32


def describe(source: str | Path | None, *, revision: str | None = None) -> Description:
    """Find and understand a model (named as in `load_denoiser`) without fetching or reading its weights."""
    return _describe(find(source, revision=revision, patterns=TEXT_FILES))


def _describe(folder: Path) -> Description:
    """Read `config.json`, natively for Dream, and `diffucoder.json` where there is one."""
    fields = _read_json(folder / "config.json", "is it a model's folder?")
    extras = _read_json(folder / EXTRAS, "save it again") if (folder / EXTRAS).exists() else {}
    kind = fields.pop("model_type", None)
    if kind not in ("Dream", *SUPPORTED_TYPES):
        known = ", ".join(("Dream", *SUPPORTED_TYPES))
        raise CheckpointError(f"{folder}/config.json: model_type {kind!r} is not understood; use one of {known}")
    mask_id = extras.get("mask_token_id", fields.pop("mask_token_id", None))
    if kind == "Dream" and mask_id is None:
        raise CheckpointError(f"{folder}/config.json: Dream needs a mask_token_id; add it (DiffuCoder's is 151666)")
    # Remote code is never run; what else is dropped describes the file, not the model
    fields = {k: v for k, v in fields.items() if k not in ("auto_map", "architectures", "transformers_version")}
    try:
        # "Dream" is Qwen2 by another name: same layers, same weight names, same config keys
        config = AutoConfig.for_model("qwen2" if kind == "Dream" else kind, **fields)
    except (TypeError, ValueError, KeyError, StrictDataclassError) as error:
        raise CheckpointError(f"{folder}/config.json is not a {kind} config: {_first_line(error)}") from error
    if mask_id is not None and mask_id not in range(config.vocab_size):  # a string is in no range either
        raise CheckpointError(f"{folder}: mask_token_id={mask_id!r} is no id below vocab_size={config.vocab_size}")
    if (weights := extras.get("weights")) not in (None, "int8"):
        raise CheckpointError(f"{folder}/{EXTRAS}: weights {weights!r} are not understood; use 'int8', or no such line")
    return Description(folder, config, mask_id, bool(extras.get("shifted", True)), weights == "int8")


def _skeleton(description: Description) -> Any:
    """The model without memory behind it: knows its class, and the name and shape of every weight."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(description.config)
    except (TypeError, ValueError, KeyError, RuntimeError, AssertionError, ZeroDivisionError) as error:
        message = f"{description.folder}/config.json describes an impossible model: {_first_line(error)}"
        raise CheckpointError(message) from error


def _check_weights(description: Description, skeleton: Any) -> None:
    """Compare what the files hold with what the config wants, reading headers only."""
    folder, tied = description.folder, skeleton.config.tie_word_embeddings
    state = _untied(skeleton) if description.int8 else skeleton.state_dict()
    wanted = {name: tuple(t.shape) for name, t in (packed(state) if description.int8 else state).items()}
    found = {name: shape for name, shape in _stored_shapes(folder).items() if not name.endswith("rotary_emb.inv_freq")}
    spare = {"lm_head.weight"} if tied else set()  # tied: one matrix, stored once
    for problem, names in (
        ("lacks", [name for name in wanted if name not in found and name not in spare]),
        ("has unexpected", [name for name in found if name not in wanted]),
        ("has wrong shapes for", [name for name in wanted if name in found and wanted[name] != found[name]]),
    ):
        if names:
            shapes = f" {found[names[0]]} instead of {wanted[names[0]]}" if "shapes" in problem else ""
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{folder} {problem} {names[0]}{shapes}{more}; config.json and weights do not match")


def _untied(model: Any) -> dict[str, Tensor]:
    """The model's state without a head that is its embeddings."""
    tied = model.config.tie_word_embeddings
    return {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}


def _unpacked(folder: Path, skeleton: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of int8 files in `dtype`; no file is held open, and no weight in any third dtype."""
    places: dict[str, Path] = {}
    for path in _files(folder):
        with safe_open(path, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), path)

    def stored(name: str) -> Tensor:
        with safe_open(places[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        if tensor.dtype not in (torch.int8, torch.bfloat16):
            raise CheckpointError(f"{places[name]}: {name} is {_name(tensor.dtype)}, not int8; fetch it again")
        return tensor

    shapes = {name: tensor.shape for name, tensor in _untied(skeleton).items()}
    return dict(unpacked(shapes, stored, dtype))


def _files(folder: Path) -> list[Path]:
    """The folder's safetensors files; CheckpointError where one is missing."""
    files = [WEIGHTS]
    if not (folder / WEIGHTS).exists() and (folder / INDEX).exists():
        files = sorted(set(_read_json(folder / INDEX, "fetch it again").get("weight_map", {}).values()))
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder} lacks weight file {', '.join(missing)}; fetch it again (safetensors only)")
    return [folder / name for name in files]


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the folder's safetensors files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            message = f"{path} is damaged or cut short ({_first_line(error)}); fetch it again"
            raise CheckpointError(message) from error
    return shapes


# ---- writing ----


def fits_dream(denoiser: Denoiser) -> bool:
    """Whether Dream's config and layers can say everything this model is."""
    config = denoiser.config
    plain_heads = getattr(config, "head_dim", None) in (None, config.hidden_size // config.num_attention_heads)
    biased = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)  # Dream: only q, k, v
    return bool(
        denoiser.shifted
        and config.model_type in ("qwen2", "llama")
        and config.rope_parameters["rope_type"] == "default"
        and plain_heads
        and not biased
    )


def _dream_config(denoiser: Denoiser) -> Json:
    """The release's `config.json`, key for key, for this model."""
    config = denoiser.config
    copied = (
        *("attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "initializer_range"),
        *("intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers"),
        *("num_key_value_heads", "pad_token_id", "rms_norm_eps", "vocab_size"),
    )
    written = {
        "architectures": ["DreamModel"],
        "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
        "mask_token_id": denoiser.mask_id,
        "max_window_layers": config.num_hidden_layers,
        "model_type": "Dream",
        "rope_scaling": None,
        "rope_theta": config.rope_parameters["rope_theta"],
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": False,
        "use_mrope": False,
        "use_sliding_window": False,
    }
    return {name: getattr(config, name) for name in copied} | written


def _state(denoiser: Denoiser, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights by their transformers names, on the CPU; a tied head is left out."""
    weights = denoiser.model.state_dict() if given is None else given
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with torch.device("meta"):
        known = AutoModelForCausalLM.from_config(denoiser.config).state_dict()
    if extra := [name for name in state if name not in known]:
        raise CheckpointError(f"model has {len(extra)} weights no config explains, as {extra[0]}; merge adapters first")
    if denoiser.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state


def dream_state(denoiser: Denoiser, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What Dream stores: an untied head, and q, k, v biases, zero where the parent has none. For what `fits_dream`."""
    state = _state(denoiser, given)
    complete = dict(state)
    complete.setdefault("lm_head.weight", state["model.embed_tokens.weight"].clone())
    for name, weight in state.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            complete.setdefault(name.replace(".weight", ".bias"), weight.new_zeros(weight.shape[0]))
    return complete


def _once(state: dict[str, Tensor]) -> bool:
    """Drop a head that is, or equals, the embeddings; whether there was none of its own."""
    head = state.get("lm_head.weight")
    if head is None or not torch.equal(head, state["model.embed_tokens.weight"]):
        return head is None
    del state["lm_head.weight"]
    return True


def _write_weights(folder: Path, state: dict[str, Tensor], *, largest: int | str = "5GB") -> None:
    """Write `model.safetensors`, or shards of `largest` and their index, and remove what an earlier save left over."""
    shards = split_torch_state_dict_into_shards(state, max_shard_size=largest)
    for file, names in shards.filename_to_tensors.items():
        # never write into a file: it may be the one these very tensors are mapped from
        save_file({name: state[name] for name in names}, folder / f"{file}.new", metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / f"{file}.new")  # safetensors keeps files from everyone else
    for file in shards.filename_to_tensors:
        os.replace(folder / f"{file}.new", folder / file)
    for stale in folder.glob("model*.safetensors"):
        if stale.name not in shards.filename_to_tensors:
            stale.unlink()
    if shards.is_sharded:
        _write_json(folder / INDEX, {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename})
    else:
        (folder / INDEX).unlink(missing_ok=True)


# ---- small helpers ----


def _read_json(path: Path, way_out: str) -> Json:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}; {way_out}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({_first_line(error)}); {way_out}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; {way_out}")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bar and reports out of our output: what they say, we check and say ourselves."""
    shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()
