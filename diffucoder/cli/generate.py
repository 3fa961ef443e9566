"""The commands that write: `diffucoder generate`, `infill` and `chat`."""

import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffucoder.cli.common import AsJson, Device, DType, Model, load_model, with_options
from diffucoder.decoding.params import DecodingParams
from diffucoder.errors import ConfigError, PromptError, printable
from diffucoder.files import LARGEST_FILE
from diffucoder.tokenizer import split_holes

if TYPE_CHECKING:
    from diffucoder.decoding.coder import DiffuCoder, OnStep
    from diffucoder.decoding.requests import Generation, Request

BYTE_ORDER_MARK = "\ufeff"  # some editors begin a UTF-8 file with it

Watch = Annotated[bool, typer.Option("--watch", help="show the canvas filling in, coloured by step")]

_REPORTED = (  # by --json, besides the name of the model
    *("text", "tokens", "forward_passes", "tokens_per_forward", "seconds", "tokens_per_second"),
    *("finish_reason", "seed"),
)


@with_options
def generate(
    prompt: Annotated[str, typer.Argument(help="the request; - reads it from standard input")],
    *,
    model: Model = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="continue the prompt as it is, without a chat template (base models)")
    ] = False,
    watch: Watch = False,
    as_json: AsJson = False,
    trace: Annotated[Path | None, typer.Option(help="write the order of commitment to this JSONL file")] = None,
    dtype: DType = None,
    device: Device = None,
    params: DecodingParams,
) -> None:
    """Answer a request with code."""
    if prompt == "-":
        prompt = _read_text("-").removeprefix(BYTE_ORDER_MARK).replace("\r\n", "\n")
    coder = load_model(model, dtype, device)
    results = _decode(coder, coder.request(prompt, params, chat=not raw), watched=watch)
    for result in results:
        _print_answer(result, coder, as_json=as_json)
    if trace is not None:
        from diffucoder.decoding.trace import write_traces

        write_traces(trace, [result.trace for result in results])


@partial(with_options, without=("new_tokens",))  # holes have a length of their own
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
    if path == "-" and in_place:
        raise ConfigError("--in-place needs a file to write to, and '-' is standard input; give a path")
    text = _read_text(path)
    coder = load_model(model, dtype, device)
    plain = text.removeprefix(BYTE_ORDER_MARK).replace("\r\n", "\n")  # as models know text
    result = coder.fill(plain, params)
    result = replace(result, text=_filled(text, result.pieces))
    if in_place:
        try:
            Path(path).write_bytes(result.text.encode())
        except OSError as error:
            raise ConfigError(f"file {path!r} cannot be written ({error.strerror}); leave out --in-place") from None
    if as_json or not in_place:
        _print_answer(result, coder, as_json=as_json)


@partial(with_options, without=("num_samples",))  # a conversation has one next answer
def chat(
    *, model: Model = None, watch: Watch = False, dtype: DType = None, device: Device = None, params: DecodingParams
) -> None:
    """Talk to a model; an empty line or end of file ends the conversation."""
    coder = load_model(model, dtype, device)
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise PromptError(f"standard input is not UTF-8 ({error.reason}); write it as UTF-8") from None
        if not line.strip():
            return
        messages.append({"role": "user", "content": line})
        try:
            request = coder.request(messages, params)
        except PromptError:
            if len(messages) == 1:
                raise
            messages = messages[-1:]
            print("(the conversation outgrew the model's context; starting again)", file=sys.stderr)
            request = coder.request(messages, params)
        [result] = _decode(coder, request, watched=watch)
        _print_answer(result, coder, as_json=False)
        messages.append({"role": "assistant", "content": result.text})


def _filled(text: str, answers: Sequence[str]) -> str:
    """Return `text` with its holes filled and everything else as it is. Answers get the line ends of the text."""
    line_end = "\r\n" if "\r\n" in text else "\n"
    remaining = iter(answers)
    filled = ""
    for piece in split_holes(text):
        filled += piece if isinstance(piece, str) else next(remaining).replace("\r\n", "\n").replace("\n", line_end)
    return filled


def _read_text(path: str) -> str:
    """Return the text of a file, or of standard input for "-", every character as it is. Raises PromptError."""
    try:
        with nullcontext(sys.stdin.buffer) if path == "-" else Path(path).open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise PromptError(f"file {path!r} is larger than {LARGEST_FILE // 2**20} MiB; give a part of it")
        return content.decode()
    except UnicodeDecodeError:
        name = "standard input" if path == "-" else path
        raise PromptError(f"{name} is not UTF-8 text; convert it") from None
    except OSError as error:
        raise PromptError(f"file {path!r} cannot be read ({error.strerror}); check the path") from None


def _decode(coder: "DiffuCoder", request: "Request", *, watched: bool) -> "list[Generation]":
    """Return the answers to a request. Show the live view, or a progress bar on a terminal, on standard error."""
    from rich.console import Console

    from diffucoder.watch import progress, watch

    console = Console(stderr=True)
    view: AbstractContextManager[OnStep | None] = nullcontext()
    if watched:
        view = watch(request, coder.tokenizer, console)
    elif console.is_terminal:
        view = progress(request, console)
    with view as on_step:
        return coder.run([request], on_step=on_step)[0]


def _print_answer(result: "Generation", coder: "DiffuCoder", *, as_json: bool) -> None:
    """Print an answer as text, or with its figures as one JSON object."""
    if as_json:
        print(json.dumps({name: getattr(result, name) for name in _REPORTED} | {"model": coder.name}))
    else:
        text = result.text.removesuffix("\n")
        print(printable(text) if sys.stdout.isatty() else text)
