"""GGUF, llama.cpp's one-file format: read an autoregressive parent, write a `dream` model.

For: Llama- and Qwen2-shaped files, quantised or not, and denoisers that llama.cpp can run. Not for: the vocabulary
inside (`gguf_tokenizer`), making the parent a denoiser (`convert`).

transformers reads GGUF files, but silently drops what it does not expect in them (biases, scaled RoPE), so this module
checks that there is nothing of the kind. llama.cpp's `dream` is Qwen2 that attends both ways; its row i-1 is our row i.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

from diffucoder.errors import CheckpointError, ConfigError
from diffucoder.models.checkpoint import dream_can_represent, dream_weights, transformers_silenced
from diffucoder.models.denoiser import Denoiser
from diffucoder.models.gguf_tokenizer import add_tokenizer, read_tokenizer
from diffucoder.tokenizer import Tokenizer

ARCHITECTURES = ("llama", "qwen2")
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
    fields, tensor_names = _read_metadata(path)
    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        known = " or ".join(ARCHITECTURES)
        raise CheckpointError(f"{path}: architecture {architecture!r} is not supported as a parent; use {known}")
    tokenizer = read_tokenizer(path, fields)
    try:
        with transformers_silenced():
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
            _check_metadata(path, architecture, fields, config)
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=dtype
            )
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: metadata and weights do not make a {architecture} model ({reason}); use the parent's own folder"
        ) from error
    _check_tensors(path, model, tensor_names)
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
    if not dream_can_represent(denoiser) or denoiser.config.hidden_act != "silu":
        kind = denoiser.config.model_type
        raise CheckpointError(
            f"a dream GGUF cannot represent this {kind} model (scaled RoPE, other heads or biases, another "
            "activation); export one that is plain Llama or Qwen2"
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
        raise ConfigError('GGUF files need the gguf package; run: pip install "diffucoder[gguf]"') from error
    return gguf


def _read_metadata(path: Path) -> tuple[dict[str, Any], set[str]]:
    """The metadata of a file by key, and the names of its tensors."""
    gguf = _import_gguf()
    if not path.is_file():
        raise CheckpointError(f"GGUF file {str(path)!r} does not exist; check the path")
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError) as error:  # from numpy, wherever the file ends
        raise CheckpointError(f"{path} is damaged, cut short or not a GGUF file ({error}); fetch it again") from error
    return fields, {tensor.name for tensor in reader.tensors}


def _check_metadata(path: Path, architecture: str, fields: Mapping[str, Any], config: Any) -> None:  # Any: transformers
    """CheckpointError unless the config that transformers made contains all that the metadata say about the model.

    transformers ignores keys that it does not know (part of the RoPE, scaling, windows, experts), and replaces missing
    keys by defaults.
    """
    head_size = config.hidden_size // config.num_attention_heads
    if f"{architecture}.attention.key_length" in fields:
        head_size = getattr(config, "head_dim", head_size)
    needed = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
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
            raise CheckpointError(f"{path}: {key}={value!r} is not read from GGUF; use the parent's own folder")
    heads = fields.get(f"{architecture}.attention.head_count_kv", config.num_attention_heads)
    if heads != config.num_key_value_heads:
        raise CheckpointError(f"{path} lacks {architecture}.attention.head_count_kv; use the parent's own folder")


def _check_tensors(path: Path, model: Any, stored: set[str]) -> None:
    """CheckpointError unless the file holds exactly the model's weights: transformers ignores what differs."""
    expected = set(_with_gguf_names(model.state_dict(), model.config.num_hidden_layers))
    if model.config.tie_word_embeddings:
        expected.discard("output.weight")
    for problem, names in (("lacks", expected - stored), ("has unexpected", stored - expected)):
        if names:
            raise CheckpointError(f"{path} {problem} tensor {min(names)}; use the parent's own folder")


def _with_gguf_names(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """`weights` by GGUF's names instead of transformers'; Llama, Qwen2 and Dream have the same ones."""
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
