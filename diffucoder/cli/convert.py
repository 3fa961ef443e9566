"""`diffucoder convert`: make a denoiser of an autoregressive model, or a GGUF file of a denoiser."""

from pathlib import Path
from typing import Annotated

import typer

from diffucoder.cli.common import torch_dtype
from diffucoder.errors import ConfigError


def convert(
    source: Annotated[str, typer.Argument(help="folder, hub id or .gguf file of the model")],
    out: Annotated[Path, typer.Argument(help="folder to write; with --gguf a .gguf file")],
    *,
    pad: Annotated[
        bool, typer.Option("--pad", help="add <|dlm_pad|> where the parent pads with its end of text")
    ] = False,
    gguf: Annotated[
        bool, typer.Option("--gguf", help="write a diffusion model as a dream GGUF, for llama.cpp")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16, with --gguf also q8_0; the model's own if left out")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a hub id")] = None,
) -> None:
    """Make a denoiser of an autoregressive model, or a GGUF file of a denoiser."""
    usage = "write diffucoder convert SOURCE FOLDER, or SOURCE OUT.gguf --gguf"
    if gguf and out.suffix != ".gguf":
        raise ConfigError(f"OUT={str(out)!r} is not a .gguf file; {usage}")
    if not gguf and out.suffix == ".gguf":
        raise ConfigError(f"OUT={str(out)!r} is a .gguf file, which only --gguf writes; {usage}")
    if gguf and pad:
        raise ConfigError(
            "--pad adds a token to a parent and --gguf writes a model as it is; convert first, then export"
        )
    from diffucoder.models.convert import convert as convert_parent
    from diffucoder.models.convert import export

    if gguf:
        kind = "dream GGUF"
        denoiser = export(source, out, dtype=dtype, revision=revision)
    else:
        kind = "denoiser, untrained"
        denoiser = convert_parent(source, out, pad=pad, dtype=torch_dtype(dtype), revision=revision)
    size = sum(parameter.numel() for parameter in denoiser.parameters()) / 1e6
    print(f"{out}: {kind}, {size:.1f} M parameters, mask at {denoiser.mask_id} of {denoiser.vocab_size} tokens")
