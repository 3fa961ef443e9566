"""GGUF, llama.cpp's one-file format: read an autoregressive parent, write a `dream` model.

For: Llama- and Qwen2-shaped files, quantised or not, and denoisers that llama.cpp can run. Not for: the vocabulary
inside (`gguf_tokenizer`), making the parent a denoiser (`convert`).

transformers reads GGUF files, but silently drops what it does not expect in them (biases, scaled RoPE), so this module
checks that there is nothing of the kind. llama.cpp's `dream` is Qwen2 that attends both ways; its row i-1 is our row i.
"""

import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

from diffucoder.errors import CheckpointError, ConfigError, install
from diffucoder.model_files import one_line, shown
from diffucoder.models.checkpoint import dream_weights, why_not_dream
from diffucoder.models.denoiser import Denoiser
from diffucoder.models.gguf_header import Tensor as StoredTensor
from diffucoder.models.gguf_header import read_header
from diffucoder.models.gguf_tokenizer import add_tokenizer, read_tokenizer
from diffucoder.models.model_config import Layers, validated
from diffucoder.models.weights import check_memory, expected_shapes, transformers_silenced
from diffucoder.tokenizer import Tokenizer

Value = TypeVar("Value")
ARCHITECTURES = ("llama", "qwen2")
_NEEDED = {  # of a config of transformers, and GGUF's names for them
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_SIZES = _NEEDED | {
    "num_key_value_heads": "attention.head_count_kv",
    "rope_theta": "rope.freq_base",
    "head_dim": "attention.key_length",
    "vocab_size": "vocab_size",
}
# dtype of weight matrices -> ggml's name for the number format, and for a file of it
TYPES = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}


def read_gguf(path: str | Path, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Tokenizer]:
    """The causal LM in a GGUF file, dequantised to `dtype` on the CPU, and its tokenizer with a mask token added.

    CheckpointError if the file is missing, damaged or not supported; ConfigError if the `gguf` package is missing.
    """
    path = Path(os.path.expanduser(path))
    gguf = _import_gguf()
    fields, tensors = read_header(path, {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()})
    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        known = " or ".join(ARCHITECTURES)
        raise CheckpointError(f"{path}: architecture {shown(architecture)} is not supported as a parent; use {known}")
    tokenizer = read_tokenizer(path, fields)
    _check_sizes(path, architecture, fields, tensors, dtype)
    try:
        with transformers_silenced(), tempfile.TemporaryDirectory() as folder:  # it reads files beside a GGUF too
            (Path(folder) / "parent.gguf").symlink_to(path.resolve())
            config = AutoConfig.from_pretrained(folder, gguf_file="parent.gguf")
            _check_metadata(path, architecture, fields, config)
            _check_tensors(path, config, tensors)
            model = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file="parent.gguf", quantization_config=GgufConfig(dequantize=True), dtype=dtype
            )
    except CheckpointError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError, OSError) as error:
        raise CheckpointError(
            f"{path}: metadata and weights do not make a {architecture} model ({one_line(error)}); use the parent's "
            "own folder"
        ) from error
    model.name_or_path = model.config.name_or_path = str(path)
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.7g}")  # stored as float32: 9.99999997e-07
    return model.eval(), tokenizer


def write_gguf(
    denoiser: Denoiser, tokenizer: Tokenizer, path: str | Path, *, dtype: str | None = None, causal: bool = False
) -> None:
    """Write `denoiser` and `tokenizer` to `path` as a `dream` GGUF, which replaces an older file once it is whole.

    `causal` writes a `qwen2` file instead, as the parent is. `dtype` is one of `TYPES`, by default that of the weights.
    Norms and biases stay float32; a matrix whose rows do not divide into blocks of q8_0 becomes float16.
    CheckpointError if Dream cannot represent the model, or llama.cpp cannot cut text as the tokenizer does.
    """
    gguf = _import_gguf()
    dtype = dtype or str(denoiser.dtype).removeprefix("torch.")
    if dtype not in TYPES:
        raise ConfigError(f"dtype={dtype!r} is not supported by GGUF export; use one of {', '.join(TYPES)}")
    reason = why_not_dream(denoiser)
    if reason is None and denoiser.config.hidden_act != "silu":
        reason = f"the activation {denoiser.config.hidden_act}"
    if reason:
        kind = denoiser.config.model_type
        raise CheckpointError(
            f"a dream GGUF cannot represent this {kind} model: it has {reason}; export one that is plain Llama or Qwen2"
        )
    tokenizer.check_fits(mask_id=denoiser.mask_id, rows=denoiser.vocab_size)
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    number_format, file_type = TYPES[dtype]
    architecture = "qwen2" if causal else "dream"
    writer = gguf.GGUFWriter(partial, architecture, use_temp_file=True)
    writer.add_name(path.stem)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_sizes(writer, denoiser)
    if not causal:
        writer.add_causal_attention(False)
        writer.add_diffusion_shift_logits(True)
    add_tokenizer(writer, tokenizer, rows=denoiser.vocab_size)
    weights = _with_gguf_names(dream_weights(denoiser), denoiser.config.num_hidden_layers)
    _add_tensors(writer, weights, gguf.GGMLQuantizationType[number_format])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, path)


def _import_gguf() -> Any:  # Any: a module that mypy does not follow
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(f"GGUF files need the gguf package; {install('gguf')}") from error
    return gguf


def _check_sizes(
    path: Path, architecture: str, fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor], dtype: torch.dtype
) -> None:
    """CheckpointError for sizes of the wrong type or larger than any model's, and for weights too large for memory."""
    described = {}
    for name, key in _SIZES.items():
        if f"{architecture}.{key}" in fields:
            described[name] = fields[f"{architecture}.{key}"]
    validated(Layers, described, f"{path} is not a {architecture} model", "fetch it again")
    layers = described.get("num_hidden_layers", 0)
    if layers > len(tensors):
        raise CheckpointError(f"{path}: {architecture}.block_count={layers}, but there are {len(tensors)} tensors")
    numbers = sum(math.prod(tensor.shape) for tensor in tensors.values())
    check_memory(numbers * dtype.itemsize, torch.device("cpu"), str(path))


def _check_metadata(path: Path, architecture: str, fields: Mapping[str, Any], config: Any) -> None:  # Any: transformers
    """CheckpointError unless the config that transformers made contains all that the metadata say about the model.

    transformers ignores keys that it does not know (part of the RoPE, scaling, windows, experts), and replaces missing
    keys by defaults.
    """
    head_size = config.hidden_size // config.num_attention_heads
    if f"{architecture}.attention.key_length" in fields:
        head_size = getattr(config, "head_dim", head_size)
    needed = {key: getattr(config, name) for name, key in _NEEDED.items()}
    further = {
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_size,
        "attention.value_length": head_size,
        "attention.causal": True,
        "rope.dimension_count": head_size,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "rope.scaling.factor": 1,
        "vocab_size": config.vocab_size,
    }
    for name in needed:
        if f"{architecture}.{name}" not in fields:
            raise CheckpointError(f"{path} lacks {architecture}.{name}; use the parent's own folder")
    described = needed | further
    for key, value in fields.items():
        name = key.removeprefix(f"{architecture}.")
        if name == key:  # about other things than the model
            continue
        switched_off = name not in described and (not value or value == "none")
        if not switched_off and value != described.get(name):
            raise CheckpointError(
                f"{path}: {one_line(key)}={shown(value)} is not read from GGUF; use the parent's own folder"
            )
    heads = fields.get(f"{architecture}.attention.head_count_kv", config.num_attention_heads)
    if heads != config.num_key_value_heads:
        raise CheckpointError(f"{path} lacks {architecture}.attention.head_count_kv; use the parent's own folder")


def _check_tensors(path: Path, config: Any, stored: Mapping[str, StoredTensor]) -> None:  # Any: transformers
    """CheckpointError unless the file holds exactly the weights of `config`: transformers ignores what differs."""
    expected = _with_gguf_names(expected_shapes(config), config.num_hidden_layers)
    if config.tie_word_embeddings:
        expected.pop("output.weight", None)
    missing = expected.keys() - stored.keys()
    for problem, names in (("lacks", missing), ("has unexpected", stored.keys() - expected.keys())):
        if names:
            raise CheckpointError(f"{path} {problem} tensor {one_line(min(names))}; use the parent's own folder")
    for name, shape in expected.items():
        if stored[name].shape[::-1] != shape:
            raise ValueError(f"{name} has shape {stored[name].shape[::-1]} instead of {shape}")


def _with_gguf_names(weights: Mapping[str, Value], layers: int) -> dict[str, Value]:
    """`weights`, or what is known of each, by GGUF's names instead of transformers'.

    Llama, Qwen2 and Dream have the same ones.
    """
    gguf = _import_gguf()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DREAM, layers)
    return {names.get_name(name, try_suffixes=(".weight", ".bias")): tensor for name, tensor in weights.items()}


def _add_sizes(writer: Any, denoiser: Denoiser) -> None:
    """Add what llama.cpp must know about the model besides its weights."""
    config = denoiser.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_vocab_size(denoiser.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _add_tensors(writer: Any, weights: Mapping[str, Tensor], matrix_type: Any) -> None:
    """Add the weights, converted; the writer keeps them in a temporary file."""
    gguf = _import_gguf()
    block_size, _ = gguf.GGML_QUANT_SIZES[matrix_type]
    for name, tensor in weights.items():
        if tensor.ndim == 1:
            type_ = gguf.GGMLQuantizationType.F32
        elif tensor.shape[-1] % block_size != 0:
            type_ = gguf.GGMLQuantizationType.F16
        else:
            type_ = matrix_type
        if type_ == gguf.GGMLQuantizationType.F16 and tensor.abs().max() > torch.finfo(torch.float16).max:
            raise ConfigError(f"{name} has numbers over 65504, which float16 cannot hold; use --dtype bfloat16")
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), type_), raw_dtype=type_)
