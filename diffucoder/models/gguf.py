"""GGUF, llama.cpp's one-file format: an autoregressive parent in, a `dream` model out.

For: reading a Llama- or Qwen2-shaped file, quantised or not, as a dense causal LM with the tokenizer that llama.cpp has
for it, and writing a denoiser so that llama.cpp runs it. Not for: the vocabulary inside (`gguf_tokenizer`), making the
parent a denoiser (`convert`).

A newcomer needs two ideas. transformers reads GGUF files, but reads over what it does not expect in them (biases,
scaled RoPE), so we check that there is nothing of the kind. And llama.cpp's `dream` is Qwen2 attended both ways whose
rows are unshifted: its row i-1 is our row i.

The `gguf` package comes with `pip install "diffucoder[gguf]"` and is imported where it is needed.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GgufConfig

from diffucoder.errors import CheckpointError, ConfigError
from diffucoder.models.checkpoint import dream_state, fits_dream, quiet
from diffucoder.models.denoiser import Denoiser
from diffucoder.models.gguf_tokenizer import add_tokenizer, read_tokenizer
from diffucoder.tokenizer import Tokenizer

ARCHITECTURES = ("llama", "qwen2")
# what a weight matrix is written as: ggml's name for the numbers, and for a file of them
TYPES = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}


def read_gguf(path: str | Path, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Tokenizer]:
    """The causal LM in a GGUF file, dequantised to `dtype` on the CPU, and its tokenizer, with a mask token added.

    CheckpointError where the file is missing, damaged, or of an architecture or tokenizer not understood here;
    ConfigError where the `gguf` package is missing.
    """
    file = Path(os.path.expanduser(path))
    fields, tensors = _contents(file)
    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        known = " or ".join(ARCHITECTURES)
        raise CheckpointError(f"{file}: architecture {architecture!r} is no parent we can read; use one of {known}")
    for key in (f"{architecture}.rope.scaling.type", f"{architecture}.attention.sliding_window"):
        if fields.get(key) not in (None, "none"):  # transformers would read over it
            raise CheckpointError(f"{file}: {key}={fields[key]!r} is not read from GGUF; use the parent's own folder")
    tokenizer = read_tokenizer(file, fields)
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=dtype
            )
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        message = f"{file} describes no {architecture} model that fits its weights ({' '.join(str(error).split())})"
        raise CheckpointError(f"{message}; use the parent's own folder") from error
    _check_tensors(file, model, tensors)
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.7g}")  # stored as float32: 9.99999997e-07
    return model.eval(), tokenizer


def write_gguf(
    denoiser: Denoiser, tokenizer: Tokenizer, path: str | Path, *, dtype: str | None = None, causal: bool = False
) -> None:
    """Write `denoiser` and `tokenizer` to `path` as a `dream` GGUF, replacing what was there once it is whole.

    `causal` writes a `qwen2` one instead: the same weights attending to the left, as a parent does. `dtype` is one of
    `TYPES` and is the weights' own where left out; norms and biases stay float32, and a matrix whose rows do not divide
    into blocks of q8_0 becomes float16. CheckpointError where Dream cannot say what the model is, or llama.cpp cannot
    cut text as the tokenizer does; ConfigError for an unknown `dtype` or a missing package.
    """
    gguf = _package()
    dtype = dtype or str(denoiser.dtype).removeprefix("torch.")
    if dtype not in TYPES:
        raise ConfigError(f"dtype={dtype!r} is not known to GGUF export; use one of {', '.join(TYPES)}")
    if not fits_dream(denoiser) or denoiser.config.hidden_act != "silu":
        kind = denoiser.config.model_type
        raise CheckpointError(
            f"this {kind} model is more than a dream GGUF can say (scaled RoPE, other heads or biases, another "
            "activation); export one that is plain Llama or Qwen2"
        )
    tokenizer.check_fits(mask_id=denoiser.mask_id, rows=denoiser.vocab_size)
    path = Path(path)
    part = path.with_name(f"{path.name}.new")
    architecture = gguf.MODEL_ARCH.QWEN2 if causal else gguf.MODEL_ARCH.DREAM
    writer = gguf.GGUFWriter(part, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_name(path.stem)
    writer.add_file_type(gguf.LlamaFileType[TYPES[dtype][1]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_sizes(writer, denoiser)
    if not causal:
        writer.add_causal_attention(False)
        writer.add_diffusion_shift_logits(True)
    add_tokenizer(writer, tokenizer, rows=denoiser.vocab_size)
    state = _renamed(dream_state(denoiser), denoiser.config.num_hidden_layers)
    _write_tensors(writer, state, gguf.GGMLQuantizationType[TYPES[dtype][0]])
    os.replace(part, path)


# ---- reading ----


def _package() -> Any:  # Any: a module that mypy does not follow
    try:
        import gguf
    except ImportError as error:
        raise ConfigError('GGUF files need the gguf package; run: pip install "diffucoder[gguf]"') from error
    return gguf


def _contents(file: Path) -> tuple[dict[str, Any], set[str]]:
    """The metadata of `file` by key, and the names of its tensors."""
    gguf = _package()
    if not file.is_file():
        raise CheckpointError(f"GGUF file {str(file)!r} is not here; check the path")
    try:
        reader = gguf.GGUFReader(file)
        return {name: field.contents() for name, field in reader.fields.items()}, {t.name for t in reader.tensors}
    except (ValueError, IndexError, KeyError, OverflowError) as error:  # whatever numpy finds where numbers lie
        raise CheckpointError(f"{file} is damaged, cut short or no GGUF file ({error}); fetch it again") from error


def _check_tensors(file: Path, model: Any, found: set[str]) -> None:
    """CheckpointError unless `file` holds this model's weights, all and none besides: transformers reads over both."""
    wanted = set(_renamed(model.state_dict(), model.config.num_hidden_layers))
    if model.config.tie_word_embeddings:
        wanted.discard("output.weight")
    for problem, other in (("lacks", wanted - found), ("has unexpected", found - wanted)):
        if other:
            raise CheckpointError(f"{file} {problem} tensor {min(other)}; use the parent's own folder")


def _renamed(state: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """`state` by GGUF's names in place of transformers'; Llama, Qwen2 and Dream have the same ones."""
    gguf = _package()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DREAM, layers)
    return {names.get_name(name, try_suffixes=(".weight", ".bias")): tensor for name, tensor in state.items()}


# ---- writing ----


def _add_sizes(writer: Any, denoiser: Denoiser) -> None:
    """What llama.cpp must know of the model besides its weights."""
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


def _write_tensors(writer: Any, state: Mapping[str, Tensor], wanted: Any) -> None:
    """Write the file: header, metadata, then each weight in turn, so that one converted copy is alive at a time."""
    gguf = _package()
    kinds = gguf.GGMLQuantizationType
    types = {}
    for name, tensor in state.items():
        block, _ = gguf.GGML_QUANT_SIZES[wanted]
        types[name] = kinds.F32 if tensor.ndim == 1 else wanted if tensor.shape[-1] % block == 0 else kinds.F16
        block, size = gguf.GGML_QUANT_SIZES[types[name]]
        shape, bytes_ = tuple(tensor.shape), tensor.numel() // block * size
        writer.add_tensor_info(name, shape, np.dtype(np.float32), bytes_, raw_dtype=types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in state.items():
        writer.write_tensor_data(gguf.quants.quantize(tensor.float().numpy(), types[name]))
    writer.close()
