"""What several commands share: types of options, reading a prompt, loading a model, decoding, printing an answer."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffucoder.errors import ConfigError, PromptError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from diffucoder.decoding.coder import DiffuCoder
    from diffucoder.decoding.requests import Generation, Request

Model = Annotated[
    str | None, typer.Option(help="folder, hub id, or name from `diffucoder models`; the shipped model if left out")
]
DType = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; the fastest on this machine if left out")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or mps; the best on this machine if left out")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object per result instead of text")]
Watch = Annotated[bool, typer.Option("--watch", help="show the canvas filling in, coloured by step")]
Raw = Annotated[bool, typer.Option("--raw", help="continue the prompt as it is, without a chat template (base models)")]

_DTYPES = ("float32", "bfloat16", "float16")
_REPORTED = (  # by --json, besides the name of the model
    *("text", "tokens", "forward_passes", "tokens_per_forward", "seconds", "tokens_per_second"),
    *("finish_reason", "seed"),
)


def read_text(text: str | None, file: Path | None) -> str:
    """Return the prompt, which is an argument, standard input ("-") or a file. Raises PromptError."""
    if (text is None) == (file is None):
        raise PromptError("give the prompt once: as an argument, as - for standard input, or by --file")
    if text is not None and text != "-":
        return text
    try:
        if file is None:
            return sys.stdin.read()
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise PromptError(f"{file or 'standard input'} is not UTF-8 text; convert it") from None
    except OSError as error:
        raise PromptError(f"file {str(file)!r} cannot be read ({error.strerror}); check the path") from None


def load_model(model: str | None, dtype: str | None, device: str | None) -> "DiffuCoder":
    """Load a model; None is the shipped one."""
    from diffucoder.decoding.coder import DiffuCoder

    return DiffuCoder.load(model, dtype=torch_dtype(dtype), device=device)


def torch_dtype(name: str | None) -> "torch.dtype | None":
    """Return the dtype of this name. Raises ConfigError."""
    import torch

    if name is None:
        return None
    if name not in _DTYPES:
        raise ConfigError(f"dtype={name!r} is not known; use one of {', '.join(_DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def decode(coder: "DiffuCoder", request: "Request", *, watched: bool) -> "list[Generation]":
    """Return the answers to a request. Show the live view, or a progress bar on a terminal, on standard error."""
    from rich.console import Console

    from diffucoder.watch import progress, watch

    console = Console(stderr=True)
    if watched:
        shown = watch(request, coder.tokenizer, console)
    elif console.is_terminal:
        shown = progress(request, console)
    else:
        return coder.run([request])[0]
    with shown as on_step:
        return coder.run([request], on_step=on_step)[0]


def print_answer(result: "Generation", coder: "DiffuCoder", *, as_json: bool) -> None:
    """Print an answer as text, or with its figures as one JSON object."""
    if as_json:
        print(json.dumps({name: getattr(result, name) for name in _REPORTED} | {"model": coder.name}))
    else:
        print(result.text.removesuffix("\n"))


def show_progress(items: "Iterable[Any]", count: int, what: str) -> "Iterable[Any]":
    """Show a bar on standard error for one stage of an evaluation, if that is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if not console.is_terminal or not count:
        return items
    return track(items, what, count, console=console)
