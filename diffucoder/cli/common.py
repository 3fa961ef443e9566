"""What several commands share: types of options, loading a model, naming the extra that is not installed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from diffucoder.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from diffucoder.decoding.coder import DiffuCoder

Model = Annotated[
    str | None, typer.Option(help="folder, hub id, or name from `diffucoder models`; the shipped model if left out")
]
DType = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; the fastest on this machine if left out")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or mps; the best on this machine if left out")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object per result instead of text")]

_DTYPES = ("float32", "bfloat16", "float16")


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


@contextmanager
def naming_extra(extra: str, subject: str) -> Iterator[None]:
    """Around imports: raise ConfigError with the extra to install where a module is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(f'{subject} {error.name}; install it: pip install "diffucoder[{extra}]"') from None
