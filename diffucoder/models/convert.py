"""An autoregressive parent becomes a Dream checkpoint, and that a GGUF file for llama.cpp, or a small copy of itself.

For: the three doors of `diffucoder convert`, from what a user names to what is written. Not for: training, without
which a converted parent writes nothing sensible, nor how the files look (`checkpoint`, `gguf`, `quantize`).

Converting changes no weight. The parent gets a mask token, rows for it and what else it lacks, and attends both ways;
with the causal mask restored (`attention=torch.ones(T, T).tril().bool()`) it scores what the parent scores.
"""

import os
from pathlib import Path

import torch

from diffucoder.errors import CheckpointError, ConfigError
from diffucoder.models.checkpoint import describe, load_denoiser, load_tokenizer, save_denoiser
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

    `pad` gives a parent that pads with its end of text a token of its own for that, `<|dlm_pad|>`. `dtype` is the
    parent's own where left out, float32 for a GGUF. CheckpointError for a source that is not understood or is a
    diffusion model already, ConfigError for a folder that holds a model or cannot be written.
    """
    folder = _free(folder)
    denoiser, tokenizer = _parent(source, dtype, revision)
    if pad:
        tokenizer = tokenizer.with_own_pad()
    grow_vocabulary(denoiser.model, tokenizer.vocab_size)
    denoiser.config.pad_token_id = tokenizer.pad_id
    _make(folder)
    save_denoiser(denoiser, folder)
    tokenizer.save(folder)
    return denoiser


def export(source: str | Path, path: str | Path, *, dtype: str | None = None, revision: str | None = None) -> Denoiser:
    """Write the diffusion model `source` (folder, Hub id or known name) to `path` as a `dream` GGUF.

    `dtype` as in `write_gguf`. CheckpointError for a source that is not understood or is autoregressive still,
    ConfigError for a path that is taken or cannot be written.
    """
    path = Path(os.path.expanduser(path))
    if path.exists():
        raise ConfigError(f"{path} exists already; remove it or choose another name")
    denoiser, tokenizer = _trained(source, revision, "a dream GGUF cannot be")
    _make(path.parent)
    write_gguf(denoiser, tokenizer, path, dtype=dtype)
    return denoiser


def shrink(source: str | Path, folder: str | Path, *, revision: str | None = None) -> Denoiser:
    """Write the diffusion model `source` to `folder` in eight bits, in files under 16 MiB; errors as `convert`'s."""
    folder = _free(folder)
    denoiser, tokenizer = _trained(source, revision, "eight bits are no use to yet")
    _make(folder)
    save_denoiser(denoiser, folder, int8=True)
    tokenizer.save(folder)
    return denoiser


def _trained(source: str | Path, revision: str | None, why: str) -> tuple[Denoiser, Tokenizer]:
    """A diffusion model in its own dtype, and its tokenizer."""
    description = describe(source, revision=revision)
    if description.mask_id is None:
        raise CheckpointError(
            f"{description.folder} holds an autoregressive model, which {why}; convert it first "
            "(diffucoder convert SOURCE FOLDER), train it, then export that"
        )
    denoiser = load_denoiser(source, dtype=description.dtype, device="cpu", revision=revision)
    return denoiser, load_tokenizer(source, revision=revision)


def _free(folder: str | Path) -> Path:
    """`folder`, which must not hold a model."""
    folder = Path(os.path.expanduser(folder))
    if held := [name for name in ("config.json", "tokenizer.json") if (folder / name).exists()]:
        raise ConfigError(f"{folder} holds a model already ({held[0]}); remove it or name another folder")
    return folder


def _parent(source: str | Path, dtype: torch.dtype | None, revision: str | None) -> tuple[Denoiser, Tokenizer]:
    """The parent as it is, made bidirectional, and its tokenizer with a mask."""
    if str(source).endswith(".gguf"):
        model, tokenizer = read_gguf(source, dtype=dtype or torch.float32)
        return Denoiser.from_causal_lm(model, mask_id=tokenizer.mask_id), tokenizer
    description = describe(source, revision=revision)
    if description.mask_id is not None:
        raise CheckpointError(
            f"{description.folder} is a diffusion model already (its mask is token {description.mask_id}); use it as "
            "it is, or export it: diffucoder convert SOURCE OUT.gguf --gguf"
        )
    tokenizer = load_tokenizer(source, revision=revision)
    denoiser = load_denoiser(
        source, dtype=dtype or description.dtype, device="cpu", revision=revision, mask_id=tokenizer.mask_id
    )
    return denoiser, tokenizer


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"folder {str(folder)!r} cannot be made ({error.strerror}); name another") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"folder {str(folder)!r} is not yours to write to; name another")
