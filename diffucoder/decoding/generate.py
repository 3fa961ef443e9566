"""DiffuCoder: text in, text out. Loads a model with its tokenizer and turns requests into canvases for `denoise`.

Not for decoding itself, which is `denoise`'s, nor for reading files, which is `models.checkpoint`'s.

A hole whose length is not given is tried at a few lengths, as rows of one batch; the row whose tokens were likeliest on
average is kept. Several such holes in one text grow together: a row gives all of them the same length.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from diffucoder.decoding.canvas import Canvas
from diffucoder.decoding.denoise import Step, Until, denoise
from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.trace import Trace, record
from diffucoder.decoding.tuning import tuned
from diffucoder.errors import ConfigError, PromptError
from diffucoder.models.checkpoint import load_denoiser, load_tokenizer
from diffucoder.models.denoiser import Denoiser
from diffucoder.tokenizer import Hole, Tokenizer, split_holes

HOLE_LENGTHS = (2, 4, 6, 8, 12, 16, 24)  # tokens, tried for a hole that does not say
Prompt = str | Sequence[Mapping[str, str]]  # a request, or the messages of a conversation


@dataclass(frozen=True)
class Generation:
    """One finished sample."""

    text: str  # what was asked for: the answer, the middle of an infill, or the whole text of a fill
    pieces: tuple[str, ...]  # the text of each hole; for a generation the answer alone
    tokens: tuple[int, ...]  # what was generated, up to the terminator
    forward_passes: int
    seconds: float  # of the whole batch that the sample was in
    finish_reason: str  # "stop": a terminator or stop string; "length": the canvas is full
    trace: Trace  # the whole row, and the step that committed each token

    @property
    def order(self) -> list[int]:
        """Positions, counted from the first hole, in the order of their commitment."""
        return [position - self.trace.prompt_length for position in self.trace.order]

    @property
    def seed(self) -> int:
        """What fixes this result."""
        return int(self.trace.params["seed"])

    @property
    def tokens_per_forward(self) -> float:
        """TPF: tokens before the terminator for each forward pass."""
        return len(self.tokens) / max(1, self.forward_passes)

    @property
    def tokens_per_second(self) -> float:
        """TPS: tokens before the terminator; neither prompt nor padding counts."""
        return len(self.tokens) / max(1e-9, self.seconds)


@dataclass(frozen=True, eq=False)
class Request:
    """What is to be decoded for a text, by whoever loops over `advance`, and what its rows come to."""

    canvas: Canvas  # (B, T) a row for each sample, or for each length that an open hole is tried at
    params: DecodingParams  # one sample, since samples are rows here
    until: Until | None
    finish: Callable[[Sequence[Trace], float], list[Generation]]
    """From each row's trace, and the seconds that all took, to what was asked for."""

    def tuned(self, model: Denoiser) -> "Request":
        """The same with the settings that the preset `fast` stands for; it may time passes of `model` to know them."""
        return replace(self, params=tuned(self.params, model, self.canvas))


class DiffuCoder:
    """A model with its tokenizer, ready to write."""

    def __init__(self, model: Denoiser, tokenizer: Tokenizer, *, name: str = "custom") -> None:
        """`name` is what results and traces call the model."""
        tokenizer.check_fits(mask_id=model.mask_id, rows=model.vocab_size)
        model.proposable = min(model.proposable, tokenizer.vocab_size)
        self.model, self.tokenizer, self.name = model, tokenizer, name

    @classmethod
    def load(
        cls,
        source: str | Path | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        compiled: bool = False,
    ) -> "DiffuCoder":
        """Load a folder, a Hub id, a known name, or (None) the shipped model. Raises CheckpointError.

        `dtype` is that of the weights; torch.int8 has weights of bfloat16 and projects by a copy of them in int8.
        `compiled` pays on a GPU, where many passes follow: the first of each shape takes half a minute.
        """
        tokenizer = load_tokenizer(source)  # first: it is quick, and fails for the same reasons
        int8 = dtype == torch.int8
        model = load_denoiser(source, dtype=torch.bfloat16 if int8 else dtype, device=device)
        model.use_lean(int8=int8, packed=True, compiled=compiled)
        return cls(model, tokenizer, name="tiny" if source is None else str(source))

    def generate(self, prompt: Prompt, params: DecodingParams | None = None, *, chat: bool = True) -> Generation:
        """Answer one request; `chat=False` continues `prompt` as raw text, which is what base models are for."""
        params = params or DecodingParams()
        if params.num_samples != 1:
            raise ConfigError(f"num_samples={params.num_samples} gives several results; use generate_batch")
        return self.generate_batch([prompt], params, chat=chat)[0]

    def generate_batch(
        self, prompts: Sequence[Prompt], params: DecodingParams | None = None, *, chat: bool = True
    ) -> list[Generation]:
        """Answer several requests in one batch, `num_samples` consecutive results for each."""
        params = params or DecodingParams()
        return self.decode(self.canvas(prompts, params, chat=chat), params)

    def stream(self, prompt: Prompt, params: DecodingParams | None = None, *, chat: bool = True) -> Iterator[Step]:
        """Answer one request, and yield every step as it happens; `show` turns a step into text."""
        params = params or DecodingParams()
        yield from self._steps(self.canvas([prompt], params, chat=chat), params)

    def infill(
        self, prefix: str, suffix: str, *, length: int | None = None, params: DecodingParams | None = None
    ) -> Generation:
        """Write what belongs between `prefix` and `suffix`: `length` tokens, or as many as suit best."""
        return self._run(self.infill_request(prefix, suffix, params or DecodingParams(), length=length))[0]

    def fill(self, text: str, params: DecodingParams | None = None) -> Generation:
        """Fill every `<|hole|>` or `<|hole:12|>` of `text` jointly; the result's `text` is the whole, filled."""
        return self._run(self.fill_request(text, params or DecodingParams()))[0]

    def request(self, prompt: Prompt, params: DecodingParams, *, chat: bool = True) -> Request:
        """What `generate_batch` decodes for one prompt, a row a sample. Raises PromptError."""
        canvas = self.canvas([prompt], params, chat=chat)
        return self._request(canvas, params, lambda traces, seconds: [self._answer(t, seconds) for t in traces])

    def infill_request(
        self, prefix: str, suffix: str, params: DecodingParams, *, length: int | None = None, most: int | None = None
    ) -> Request:
        """What `infill` decodes; of the lengths tried none is over `most`. Raises PromptError."""
        if not prefix:
            raise PromptError("prefix is empty, and the first token needs one to its left; start it with a newline")
        if length is not None and length < 1:
            raise PromptError(f"length={length} is no hole; give at least 1 token, or leave it out")
        return self._holes([prefix, Hole(length), suffix], params, whole=False, most=most)

    def fill_request(self, text: str, params: DecodingParams) -> Request:
        """What `fill` decodes. Raises PromptError."""
        pieces = split_holes(text)
        if not any(isinstance(piece, Hole) for piece in pieces):
            raise PromptError("the text has no hole to fill; mark one with <|hole|>, or <|hole:12|> for 12 tokens")
        if isinstance(pieces[0], Hole):
            raise PromptError("the text begins with a hole, and the first token needs one to its left; put text before")
        return self._holes(pieces, params, whole=True)

    def canvas(self, prompts: Sequence[Prompt], params: DecodingParams, *, chat: bool = True) -> Canvas:
        """The canvas of `prompts`: left-padded, with `params.new_tokens` masks behind each. Raises PromptError."""
        if not prompts:
            raise PromptError("no prompt is given; pass at least one")
        rows = [self._encode(self._text(prompt, chat)) for prompt in prompts]
        return self.canvas_of_ids(rows, params.new_tokens)

    def show(self, step: Step, row: int = 0) -> str:
        """The text of a canvas row as it stands, masks as placeholders, special tokens left out."""
        return self.tokenizer.decode_partial(step.canvas[row].tolist())

    def _text(self, prompt: Prompt, chat: bool) -> str:
        empty = not prompt.strip() if isinstance(prompt, str) else not prompt
        if empty:
            raise PromptError("the prompt is empty; say what to write")
        if chat:
            return self.tokenizer.chat(prompt)
        if not isinstance(prompt, str):
            raise PromptError("messages are a conversation; raw text is a string: leave chat=True, or pass a string")
        return prompt

    def _encode(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text)
        if self.model.mask_id in ids:  # else the answer would be sought from there on
            raise PromptError(f"the text holds the mask {self.tokenizer.mask_token} itself; mark a hole with <|hole|>")
        return ids

    def canvas_of_ids(self, rows: Sequence[list[int]], new_tokens: int, *, forbidden: tuple[int, ...] = ()) -> Canvas:
        """As `canvas`, of prompts that are tokens already."""
        longest = max(len(row) for row in rows)
        self._check_length(longest + new_tokens, f"prompt of {longest} tokens and {new_tokens} new ones")
        pad, device = self.tokenizer.pad_id, self.model.device
        return Canvas.from_prompts(
            torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device),  # (B, P)
            valid=torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows], device=device),
            new_tokens=new_tokens,
            mask_id=self.model.mask_id,
            pad_id=pad,
            terminators=tuple(sorted(self.tokenizer.terminator_ids - set(forbidden))),
            forbidden=forbidden,
        )

    def _check_length(self, tokens: int, what: str) -> None:
        if tokens > self.model.max_length:
            raise PromptError(
                f"{what} exceed the model's context of {self.model.max_length}; shorten the prompt or ask for fewer "
                "new tokens"
            )

    def _until(self, params: DecodingParams) -> Until | None:
        def stopped(settled: Tensor) -> bool:
            text = self.tokenizer.decode(settled.tolist())
            return any(stop in text for stop in params.stop)

        return stopped if params.stop else None

    def _steps(self, canvas: Canvas, params: DecodingParams, entropies: int = 0) -> Iterator[Step]:
        return denoise(self.model, canvas, params, until=self._until(params), entropies=entropies)

    def decode(
        self,
        canvas: Canvas,
        params: DecodingParams,
        *,
        through: Callable[[Iterator[Step]], Iterable[Step]] = iter,
        entropies: int = 0,
    ) -> list[Generation]:
        """Decode a canvas of prompts and answers to the end. `through` sees every step pass by, and passes it on.

        Traces hold the entropies of the first `entropies` steps.
        """
        params = tuned(params, self.model, canvas)
        began = time.perf_counter()
        traces = record(through(self._steps(canvas, params, entropies)), canvas, params=params, model=self.name)
        seconds = time.perf_counter() - began
        return [self._answer(trace, seconds) for trace in traces]

    def _answer(self, trace: Trace, seconds: float) -> Generation:
        answer = trace.tokens[trace.prompt_length :]
        end = next((i for i, token in enumerate(answer) if token in self.tokenizer.terminator_ids), len(answer))
        whole = self.tokenizer.decode(answer[:end])
        text = before_stops(whole, trace.params["stop"])
        return Generation(
            text=text,
            pieces=(text,),
            tokens=tuple(answer[:end]),
            forward_passes=trace.forward_passes,
            seconds=seconds,
            finish_reason="stop" if end < len(answer) or text != whole else "length",
            trace=trace,
        )

    def _holes(
        self, pieces: Sequence[str | Hole], params: DecodingParams, *, whole: bool, most: int | None = None
    ) -> Request:
        """Try the lengths that holes leave open, and keep the row whose tokens were likeliest on average."""
        if params.stop and whole:
            raise ConfigError(
                f"stop={params.stop!r} ends an answer, but holes end where the text goes on; leave it out"
            )
        known = [self._encode(piece) if isinstance(piece, str) else piece.length for piece in pieces]
        tried = tuple(length for length in HOLE_LENGTHS if length <= (most or length)) or (1,)
        lengths = tried if None in known else (0,)
        given = sum(len(part) if isinstance(part, list) else part or 0 for part in known)
        self._check_length(given + max(lengths) * known.count(None), "text and holes")  # before lists of that length
        rows, special = [], tuple(sorted(self.tokenizer.special_ids))
        for length in lengths:
            parts = [part if isinstance(part, list) else [self.model.mask_id] * (part or length) for part in known]
            rows.append([token for part in parts for token in part])
        canvas = self.canvas_of_ids(rows, 0, forbidden=tuple(i for i in special if i != self.model.mask_id))

        def finish(traces: Sequence[Trace], seconds: float) -> list[Generation]:
            samples, likelihood = params.num_samples, [trace.mean_log_prob for trace in traces]
            best = [max(range(at, len(traces), samples), key=lambda row: likelihood[row]) for at in range(samples)]
            best.sort(key=lambda row: -likelihood[row])  # as ever the first of equals
            return [
                self._filled(pieces, known, lengths[row // samples], traces[row], seconds, whole=whole) for row in best
            ]

        return replace(self._request(canvas, params, finish), until=None)  # rows that ended early could not be compared

    def _request(
        self,
        canvas: Canvas,
        params: DecodingParams,
        finish: Callable[[Sequence[Trace], float], list[Generation]],
    ) -> Request:
        return Request(canvas.repeat(params.num_samples), params.replace(num_samples=1), self._until(params), finish)

    def _run(self, request: Request) -> list[Generation]:
        """Decode a request by itself."""
        request = request.tuned(self.model)
        began = time.perf_counter()
        steps = list(denoise(self.model, request.canvas, request.params, until=request.until))
        seconds = time.perf_counter() - began
        return request.finish(record(steps, request.canvas, params=request.params, model=self.name), seconds)

    def _filled(
        self,
        pieces: Sequence[str | Hole],
        known: Sequence[list[int] | int | None],
        length: int,
        trace: Trace,
        seconds: float,
        *,
        whole: bool,
    ) -> Generation:
        text, holes, tokens, position = "", [], list[int](), 0
        for piece, part in zip(pieces, known, strict=True):
            size = len(part) if isinstance(part, list) else part or length
            if isinstance(piece, str):
                text += piece
            else:
                tokens += trace.tokens[position : position + size]
                holes.append(self.tokenizer.decode(trace.tokens[position : position + size]))
                text += holes[-1]
            position += size
        middle = before_stops(holes[0], trace.params["stop"])
        return Generation(
            text=text if whole else middle,
            pieces=tuple(holes),
            tokens=tuple(tokens),
            forward_passes=trace.forward_passes,
            seconds=seconds,
            finish_reason="length" if middle == holes[0] else "stop",
            trace=trace,
        )


def before_stops(text: str, stops: Iterable[str]) -> str:
    """`text` up to the first of `stops`."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text
