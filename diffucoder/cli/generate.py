"""`diffucoder generate`: answer a request."""

from pathlib import Path
from typing import Annotated

import typer

from diffucoder.cli.common import AsJson, Device, DType, Model, Raw, Watch, decode, load_model, print_answer, read_text
from diffucoder.decoding.params import DecodingParams
from diffucoder.options import with_options


@with_options
def generate(
    prompt: Annotated[str | None, typer.Argument(help="the request; - reads it from standard input")] = None,
    *,
    file: Annotated[Path | None, typer.Option("--file", help="read the prompt from a file")] = None,
    model: Model = None,
    raw: Raw = False,
    watch: Watch = False,
    as_json: AsJson = False,
    trace: Annotated[Path | None, typer.Option(help="write the order of commitment to this JSONL file")] = None,
    dtype: DType = None,
    device: Device = None,
    params: DecodingParams,
) -> None:
    """Answer a request with code."""
    text = read_text(prompt, file)
    coder = load_model(model, dtype, device)
    results = decode(coder, coder.request(text, params, chat=not raw), watched=watch)
    for result in results:
        print_answer(result, coder, as_json=as_json)
    if trace is not None:
        from diffucoder.decoding.trace import write_traces

        write_traces(trace, [result.trace for result in results])
