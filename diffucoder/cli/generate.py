"""The commands that write: `diffucoder generate`, `infill` and `edit`; `chat` is in a module of its own."""

import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffucoder.cli.common import AsJson, Device, DType, Model, load_model, with_options
from diffucoder.decoding.params import DecodingParams
from diffucoder.errors import ConfigError, PromptError, printable
from diffucoder.files import LARGEST_FILE, parse_json, write_text
from diffucoder.tokenizer import split_holes, with_texts

if TYPE_CHECKING:
    from diffucoder.decoding.coder import DiffuCoder, OnStep
    from diffucoder.decoding.requests import Generation, Request

BYTE_ORDER_MARK = "\ufeff"  # some editors begin a UTF-8 file with it
BATCH = 16  # requests of --prompts that are decoded together
UNSURE = 0.7  # mean probability of a hole's tokens below which the model is probably guessing

Watch = Annotated[bool, typer.Option("--watch", help="show the canvas filling in, coloured by step")]
TraceFile = Annotated[
    Path | None, typer.Option("--trace", help="write which step committed each token to this JSONL file")
]
InPlace = Annotated[bool, typer.Option("--in-place", help="write the text back to the file")]
File = Annotated[
    str, typer.Argument(help="a file with holes, <|hole|> or <|hole:12|>; - for standard input", show_default=False)
]

_REPORTED = (  # by --json, besides the name of the model
    *("text", "tokens", "forward_passes", "tokens_per_forward", "seconds", "tokens_per_second"),
    *("finish_reason", "seed", "index", "problem"),
)


@with_options
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="the request; - or nothing reads it from standard input", show_default=False)
    ] = None,
    *,
    prompts: Annotated[
        Path | None, typer.Option(help='file of requests: one a line, or JSONL with "prompt"; decoded in batches')
    ] = None,
    model: Model = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="continue the prompt as it is, without a chat template (base models)")
    ] = False,
    watch: Watch = False,
    as_json: AsJson = False,
    trace: TraceFile = None,
    dtype: DType = None,
    device: Device = None,
    params: DecodingParams,
) -> None:
    """Answer a request with code."""
    texts = _requests_of(prompt, prompts)
    if watch and len(texts) > 1:
        raise ConfigError("--watch shows one request, and --prompts gives several; leave one of them out")
    coder = load_model(model, dtype, device)
    traces = []
    for first in range(0, len(texts), BATCH):
        requests = [coder.request(text, params, chat=not raw) for text in texts[first : first + BATCH]]
        for number, results in enumerate(decode(coder, requests, watched=watch), first + 1):
            print_answers(results, coder, as_json=as_json, shown=watch, number=number if len(texts) > 1 else None)
            traces += results
            if not all(result.text.strip() for result in results):
                note("an answer is empty: the model ended at once; ask in other words, or for fewer --new-tokens")
    _write_traces(trace, traces)


@partial(with_options, without=("new_tokens",))  # holes have a length of their own
def infill(
    path: File,
    *,
    model: Model = None,
    watch: Watch = False,
    as_json: AsJson = False,
    in_place: InPlace = False,
    trace: TraceFile = None,
    dtype: DType = None,
    device: Device = None,
    params: DecodingParams,
) -> None:
    """Fill every hole of a file, all of them jointly."""
    _check_in_place(path, params, in_place)
    text = read_text(path)
    coder = load_model(model, dtype, device)
    request = coder.fill_request(as_models_know(text), params)
    complete = partial(_filled, text)
    _write_file(path, request, coder, complete, as_json=as_json, in_place=in_place, watched=watch, trace=trace)


@partial(with_options, without=("new_tokens",))
def edit(
    path: Annotated[str, typer.Argument(help="a file of code; - for standard input", show_default=False)],
    *,
    lines: Annotated[
        list[str],
        typer.Option(help="lines to write again: 3, or 3:5 for three of them; repeatable", show_default=False),
    ],
    tokens: Annotated[
        int | None, typer.Option(min=1, help="tokens for each span of lines; as many as it has now if left out")
    ] = None,
    model: Model = None,
    watch: Watch = False,
    as_json: AsJson = False,
    in_place: InPlace = False,
    trace: TraceFile = None,
    dtype: DType = None,
    device: Device = None,
    params: DecodingParams,
) -> None:
    """Write some lines of a file again while the rest stays as it is."""
    from diffucoder.decoding.requests import Span

    _check_in_place(path, params, in_place)
    text = read_text(path)
    places = _spans_of(text, lines)
    coder = load_model(model, dtype, device)
    spans = []
    for start, end in places:
        start -= text[start - 1 : start] == " "  # a token of the model has this space and the word after it
        length = tokens or max(1, len(coder.tokenizer.encode(as_models_know(text[start:end]))))
        spans.append(Span(len(as_models_know(text[:start])), len(as_models_know(text[:end])), length))
    request = coder.edit_request(as_models_know(text), spans, params)
    complete = partial(_replaced, text, places)
    _write_file(path, request, coder, complete, as_json=as_json, in_place=in_place, watched=watch, trace=trace)


def decode(
    coder: "DiffuCoder", requests: "Sequence[Request]", *, watched: bool = False
) -> "Iterator[list[Generation]]":
    """Yield the answers to each request. Show the live view, or a progress bar on a terminal, on standard error.

    Prints what a user should know about the requests and their results.
    """
    for remark in sorted({request.remark for request in requests} - {""}):
        note(remark)
    from rich.console import Console

    from diffucoder.watch import progress, watch

    console = Console(stderr=True)
    view: AbstractContextManager[OnStep | None] = nullcontext()
    if watched:
        view = watch(requests[0], coder.tokenizer, console)
    elif console.is_terminal:
        view = progress(requests, console)
    with view as on_step:
        results = coder.run(requests, on_step=on_step)
    for problem in sorted({result.problem for answers in results for result in answers} - {""}):
        note(f"a text breaks the rule of --syntax ({problem}); give it more tokens, or mend the rest")
    yield from results


def print_answers(
    results: "Sequence[Generation]",
    coder: "DiffuCoder",
    *,
    as_json: bool = False,
    shown: bool = False,
    number: int | None = None,
) -> None:
    """Print answers as text, or each with its figures as a JSON object. `number` is that of the request, if several.

    The first answer is not printed again if a terminal shows it already.
    """
    shown = shown and sys.stdout.isatty() and sys.stderr.isatty()
    for result in results:
        if as_json:
            fields = {name: getattr(result, name) for name in _REPORTED} | {"model": coder.name}
            print(json.dumps(fields if number is None else {"request": number, **fields}), flush=True)
            continue
        heading = [] if number is None else [f"request {number}"]
        if len(results) > 1:
            heading.append(f"answer {result.index + 1} of {len(results)}")
        if heading:
            print(f"--- {', '.join(heading)} ---")
        if not (shown and result.index == 0):
            text = result.text.removesuffix("\n")
            print(printable(text) if sys.stdout.isatty() else text, flush=True)


def note(message: str) -> None:
    """Print what a user should know about a result, on standard error."""
    print(f"note: {message}", file=sys.stderr)


def _requests_of(prompt: str | None, file: Path | None) -> list[str]:
    """The requests of a command line. Raises PromptError."""
    if file is not None:
        if prompt is not None:
            raise ConfigError("a request and --prompts are given; leave one of them out")
        requests = []
        for number, line in enumerate(_lines_of(read_text(str(file)).removeprefix(BYTE_ORDER_MARK)), 1):
            if line.strip():
                request = line.rstrip("\r\n")
                requests.append(_request_in(request, f"{file}:{number}") if file.suffix == ".jsonl" else request)
        if not requests:
            raise PromptError(f"file {str(file)!r} has no requests; write one a line")
        return requests
    if prompt is None and sys.stdin.isatty():
        raise PromptError('no request is given; write it after the command: diffucoder generate "Write ..."')
    if prompt in (None, "-"):
        prompt = as_models_know(read_text("-"))
    return [str(prompt)]


def _request_in(line: str, where: str) -> str:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise PromptError(f'{where} is {error}; write an object with "prompt" on each line') from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise PromptError(f'{where} has no text "prompt"; write {{"prompt": "..."}}')
    return str(row["prompt"])


def _check_in_place(path: str, params: DecodingParams, in_place: bool) -> None:
    if in_place and path == "-":
        raise ConfigError("--in-place needs a file to write to, and '-' is standard input; give a path")
    if in_place and params.num_samples > 1:
        raise ConfigError(f"--in-place writes one text, and num_samples={params.num_samples}; leave one of them out")


def _write_file(
    path: str,
    request: "Request",
    coder: "DiffuCoder",
    complete: Callable[[Sequence[str]], str],
    *,
    as_json: bool,
    in_place: bool,
    watched: bool,
    trace: Path | None,
) -> None:
    """Answer a request about a file: print the texts that `complete` makes of what fills the holes, or write one back.

    Warns where the model was guessing, and writes the traces.
    """
    [results] = decode(coder, [request], watched=watched)
    results = [replace(result, text=complete(result.pieces)) for result in results]
    if in_place:
        try:
            write_text(Path(path).resolve(), results[0].text)
        except OSError as error:
            raise ConfigError(f"file {path!r} cannot be written ({error.strerror}); leave out --in-place") from None
    if as_json or not in_place:
        is_shown = watched and len(request.canvas.tokens) == request.result_count  # no other length was tried
        print_answers(results, coder, as_json=as_json, shown=is_shown)
    surest = max(math.exp(result.trace.mean_log_prob) for result in results)
    if surest < UNSURE:
        note(f"the model is unsure of this text (mean probability of a token {surest:.0%}); check it")
    _write_traces(trace, results)


def _write_traces(path: Path | None, results: "Sequence[Generation]") -> None:
    if path is not None:
        from diffucoder.decoding.trace import write_traces

        write_traces(path, [result.trace for result in results])


def _spans_of(text: str, lines: Sequence[str]) -> list[tuple[int, int]]:
    """Begin and end of each span of lines, without indentation and line end, in order. Raises ConfigError."""
    starts = [0]
    for line in _lines_of(text):
        starts.append(starts[-1] + len(line))
    spans = []
    for span in lines:
        numbers = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", span)
        first, last = (int(numbers[1]), int(numbers[2] or numbers[1])) if numbers else (0, 0)
        if not 1 <= first <= last < len(starts):
            raise ConfigError(f"--lines {span!r} is not a line or a range of the {len(starts) - 1} lines, such as 3:5")
        written = text[starts[first - 1] : starts[last]]
        end = starts[first - 1] + len(written.rstrip("\r\n"))
        spans.append((end - len(written.rstrip("\r\n").lstrip(BYTE_ORDER_MARK + " \t")), end))
    spans.sort()
    for span_before, (start, end) in pairwise(spans):
        if start < span_before[1] or (start, end) == span_before:  # the same blank line
            raise ConfigError(f"--lines {' and '.join(lines)} overlap; give each line once")
    return spans


def _lines_of(text: str) -> Iterator[str]:
    """The lines as editors count them: other separators that Python knows, such as a form feed, end none."""
    return io.StringIO(text, newline="")


def as_models_know(text: str) -> str:
    return text.removeprefix(BYTE_ORDER_MARK).replace("\r\n", "\n")


def _filled(text: str, answers: Sequence[str]) -> str:
    """Return `text` with its holes filled and everything else as it is."""
    return with_texts(split_holes(text), (with_line_ends_of(text, answer) for answer in answers))


def _replaced(text: str, spans: Sequence[tuple[int, int]], answers: Sequence[str]) -> str:
    """Return `text` with its spans replaced and everything else as it is, the space before a span too."""
    for (start, end), answer in reversed(list(zip(spans, answers, strict=True))):
        written = answer.removeprefix(" ") if text[start - 1 : start] == " " else answer
        text = text[:start] + with_line_ends_of(text, written) + text[end:]
    return text


def with_line_ends_of(text: str, answer: str) -> str:
    line_end = "\r\n" if "\r\n" in text else "\n"
    return answer.replace("\r\n", "\n").replace("\n", line_end)


def read_text(path: str) -> str:
    """Return the text of a file, or of standard input for "-", every character as it is. Raises PromptError."""
    try:
        if path == "-":
            content = sys.stdin.buffer.read(LARGEST_FILE + 1)
        else:
            with Path(path).open("rb") as file:
                content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise PromptError(f"file {path!r} is larger than {LARGEST_FILE // 2**20} MiB; give a part of it")
        return content.decode()
    except UnicodeDecodeError:
        name = "standard input" if path == "-" else path
        raise PromptError(f"{name} is not UTF-8 text; convert it") from None
    except OSError as error:
        raise PromptError(f"file {path!r} cannot be read ({error.strerror}); check the path") from None
