"""`diffucoder infill`: fill the holes of a file."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from diffucoder.cli.common import AsJson, Device, DType, Model, load_model, print_answer, read_text
from diffucoder.decoding.params import DecodingParams
from diffucoder.errors import ConfigError
from diffucoder.options import with_options


@partial(with_options, without=("new_tokens", "stop"))  # holes have a length and an end of their own
def infill(
    path: Annotated[str, typer.Argument(help="a file with holes, <|hole|> or <|hole:12|>; - for standard input")],
    *,
    model: Model = None,
    as_json: AsJson = False,
    in_place: Annotated[bool, typer.Option("--in-place", help="write the filled text back to the file")] = False,
    dtype: DType = None,
    device: Device = None,
    params: DecodingParams,
) -> None:
    """Fill every hole of a file, all of them jointly."""
    if path != "-":
        text = read_text(None, Path(path))
    elif in_place:
        raise ConfigError("--in-place needs a file to write to, and '-' is standard input; give a path")
    else:
        text = read_text(path, None)
    coder = load_model(model, dtype, device)
    result = coder.fill(text, params)
    if in_place:
        try:
            Path(path).write_text(result.text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"file {path!r} cannot be written ({error.strerror}); leave out --in-place") from None
    if as_json or not in_place:
        print_answer(result, coder, as_json=as_json)
