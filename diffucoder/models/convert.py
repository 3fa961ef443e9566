"""Convert an autoregressive parent to a Dream checkpoint, and a Dream checkpoint to a GGUF file for llama.cpp.

For: the two jobs of `diffucoder convert`. Not for: the file formats (`checkpoint`, `gguf`).

Converting changes no weights. The parent gets a mask token, a row for it and whatever else it lacks, and attends both
ways. With a causal mask it still gives the parent's logits.
"""

import os
from pathlib import Path

import torch

from diffucoder.errors import CheckpointError, ConfigError
from diffucoder.models.checkpoint import find_checkpoint, load_denoiser, load_tokenizer, save_denoiser
from diffucoder.models.denoiser import Denoiser, grow_vocabulary
from diffucoder.models.gguf import read_gguf, write_gguf
from diffucoder.tokenizer import Tokenizer


def convert(
    source: str | Path,
    folder: str | Path,
    *,
    pad: bool = False,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> Denoiser:
    """Make a denoiser of the autoregressive `source` (folder, Hub id or `.gguf` file) and write it to `folder`.

    `pad` adds the token `<|dlm_pad|>` if the parent pads with its end of text. `dtype` defaults to the parent's own,
    float32 for a GGUF. CheckpointError for a source that is no parent, ConfigError for a folder that cannot be used.
    """
    folder = Path(os.path.expanduser(folder))
    for name in ("config.json", "tokenizer.json"):
        if (folder / name).exists():
            raise ConfigError(f"{folder} holds a model already ({name}); remove it or name another folder")
    denoiser, tokenizer = _load_parent(source, dtype, revision)
    if pad:
        tokenizer = tokenizer.with_own_pad()
    grow_vocabulary(denoiser.model, tokenizer.vocab_size)
    denoiser.config.pad_token_id = tokenizer.pad_id
    _make_folder(folder)
    save_denoiser(denoiser, folder)
    tokenizer.save(folder)
    return denoiser


def export(source: str | Path, path: str | Path, *, dtype: str | None = None, revision: str | None = None) -> Denoiser:
    """Write the diffusion model `source` (folder, Hub id or known name) to `path` as a `dream` GGUF.

    `dtype` as in `write_gguf`. CheckpointError for another kind of source, ConfigError for a path that cannot be used.
    """
    path = Path(os.path.expanduser(path))
    if path.exists():
        raise ConfigError(f"{path} exists already; remove it or choose another name")
    checkpoint = find_checkpoint(source, revision=revision)
    if checkpoint.mask_id is None:
        raise CheckpointError(
            f"{checkpoint.folder} holds an autoregressive model, which a dream GGUF cannot be; convert it first "
            "(diffucoder convert SOURCE FOLDER), train it, then export that"
        )
    tokenizer = load_tokenizer(checkpoint)
    denoiser = load_denoiser(checkpoint, dtype=checkpoint.dtype, device="cpu")
    _make_folder(path.parent)
    write_gguf(denoiser, tokenizer, path, dtype=dtype)
    return denoiser


def _load_parent(source: str | Path, dtype: torch.dtype | None, revision: str | None) -> tuple[Denoiser, Tokenizer]:
    """The parent, made bidirectional, and its tokenizer with a mask token."""
    if str(source).endswith(".gguf"):
        model, tokenizer = read_gguf(source, dtype=dtype or torch.float32)
        return Denoiser.from_causal_lm(model, mask_id=tokenizer.mask_id), tokenizer
    checkpoint = find_checkpoint(source, revision=revision)
    if checkpoint.mask_id is not None:
        raise CheckpointError(
            f"{checkpoint.folder} is a diffusion model already (its mask is token {checkpoint.mask_id}); use it as it "
            "is, or export it: diffucoder convert SOURCE OUT.gguf"
        )
    tokenizer = load_tokenizer(checkpoint)
    dtype = dtype or checkpoint.dtype
    denoiser = load_denoiser(checkpoint, dtype=dtype, device="cpu", mask_id=tokenizer.mask_id)
    for name, weight in denoiser.model.named_parameters():
        if dtype == torch.float16 and not weight.isfinite().all():
            raise ConfigError(f"{name} has numbers over 65504, which float16 cannot hold; use --dtype bfloat16")
    return denoiser, tokenizer


def _make_folder(folder: Path) -> None:
    """Create `folder` unless it exists. ConfigError if it cannot be created or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"folder {str(folder)!r} cannot be created ({error.strerror}); name another") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"folder {str(folder)!r} is not writable; name another")
