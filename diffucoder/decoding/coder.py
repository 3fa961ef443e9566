"""DiffuCoder: text in, text out. Loads a model with its tokenizer, and turns texts into requests and results.

For: the one pipeline from request to result. A `Request` is made from text; its sequences are decoded, here by `run`
and in the server by its engine; `Request.results` makes `Generation`s of them. Not for: decoding itself (`step`), or
reading files (`models.checkpoint`).

A hole without a given length is tried at a few lengths, as rows of one batch; the row whose tokens were likeliest on
average is kept. Several such holes in one text grow together: a row gives all of them the same length.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffucoder.decoding import step as decoding
from diffucoder.decoding.canvas import Canvas
from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.step import Step, Until, decode, denoise
from diffucoder.decoding.trace import Trace
from diffucoder.errors import ConfigError, PromptError
from diffucoder.models.checkpoint import load_with_tokenizer
from diffucoder.models.denoiser import Denoiser
from diffucoder.tokenizer import Hole, Tokenizer, split_holes

HOLE_LENGTHS = (2, 4, 6, 8, 12, 16, 24)  # tokens, tried for a hole without a given length
Prompt = str | Sequence[Mapping[str, str]]  # a request, or the messages of a conversation
OnStep = Callable[[decoding.Sequence, Step], None]  # is called after each step of each sequence


@dataclass(frozen=True)
class Generation:
    """One finished sample."""

    index: int  # which answer of its request it is, from 0
    text: str  # what was wanted: the answer, the middle of an infill, or the whole text of a fill
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


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """Answers to one prompt: a canvas with a row for each sample, and what the decoded rows come to."""

    canvas: Canvas  # (B, T)
    params: DecodingParams
    tokenizer: Tokenizer
    model_name: str

    @property
    def answers(self) -> int:
        """How many results there will be."""
        return len(self.canvas.tokens)

    @property
    def streams(self) -> bool:
        """Whether each row is the answer of its own number, so that its text is known while it is decoded."""
        return self.answers == len(self.canvas.tokens)

    @property
    def until(self) -> Until | None:
        """What ends a row early: a stop string in its text."""
        stops = self.params.stop
        if not stops:
            return None

        def stopped(settled: Tensor) -> bool:
            text = self.tokenizer.decode(settled.tolist())
            return any(stop in text for stop in stops)

        return stopped

    def sequences(self, *, entropies: int = 0) -> list[decoding.Sequence]:
        """One for each row; their traces hold the entropies of the first `entropies` steps."""
        rows = range(len(self.canvas.tokens))
        until = self.until
        return [decoding.Sequence(self.canvas, self.params, row=n, until=until, entropies=entropies) for n in rows]

    def settled(self, sequence: decoding.Sequence) -> list[int]:
        """The ids of an answer that no later step can change, from its beginning; none while tokens may be revoked."""
        if self.params.revoke and sequence.finish_reason is None:
            return []
        masks = int(sequence.holes.sum())
        end = min(sequence.settled, sequence.answer_end, sequence.first_hole + masks)
        ids: list[int] = sequence.tokens[sequence.first_hole : end].tolist()
        return ids

    def results(self, sequences: Sequence[decoding.Sequence], seconds: float) -> list[Generation]:
        """What the finished `sequences` come to, in order of their index. `seconds` is what decoding took."""
        return [self._answer(index, sequence, seconds) for index, sequence in enumerate(sequences)]

    def _answer(self, index: int, sequence: decoding.Sequence, seconds: float) -> Generation:
        tokens = sequence.tokens[sequence.first_hole : sequence.answer_end].tolist()
        whole = self.tokenizer.decode(tokens)
        text = before_stops(whole, self.params.stop)
        stopped = sequence.answer_end < len(sequence.tokens) or text != whole
        trace = sequence.trace(self.model_name)
        return Generation(
            index=index,
            text=text,
            pieces=(text,),
            tokens=tuple(tokens),
            forward_passes=trace.forward_passes,
            seconds=seconds,
            finish_reason="stop" if stopped else "length",
            trace=trace,
        )


@dataclass(frozen=True)
class Part:
    """A part of a text with holes: text with its ids, or (without text) a hole."""

    text: str | None = None
    ids: tuple[int, ...] = ()
    length: int | None = None  # of a hole; None = lengths are tried

    @property
    def is_open(self) -> bool:
        """Whether it is a hole of no given length."""
        return self.text is None and self.length is None

    def row(self, mask_id: int, tried: int) -> list[int]:
        """What it is on the canvas, an open hole being `tried` positions long."""
        if self.text is not None:
            return list(self.ids)
        return [mask_id] * (self.length or tried)


@dataclass(frozen=True, eq=False, kw_only=True)
class HoleRequest(Request):
    """Text with holes: the canvas has `num_samples` consecutive rows for each length that open holes are tried at."""

    parts: Sequence[Part]
    lengths: Sequence[int]  # that open holes are tried at
    whole: bool  # whether the result's text is the whole, filled, or the first hole alone

    @property
    def answers(self) -> int:
        """How many results there will be."""
        return self.params.num_samples

    @property
    def until(self) -> Until | None:
        """Nothing: rows that ended early could not be compared."""
        return None

    def results(self, sequences: Sequence[decoding.Sequence], seconds: float) -> list[Generation]:
        """Of each sample the row of the likeliest length, in order of the samples."""
        traces = [sequence.trace(self.model_name) for sequence in sequences]
        results = []
        for sample in range(self.params.num_samples):
            rows = range(sample, len(traces), self.params.num_samples)
            best = max(rows, key=lambda row: traces[row].mean_log_prob)  # the first of equals
            results.append(self._filled(sample, self.lengths[best // self.params.num_samples], traces[best], seconds))
        return results

    def _filled(self, index: int, length: int, trace: Trace, seconds: float) -> Generation:
        text = ""
        holes: list[str] = []
        tokens: list[int] = []
        position = 0
        for part in self.parts:
            size = len(part.row(self.canvas.mask_id, length))
            if part.text is not None:
                text += part.text
            else:
                ids = trace.tokens[position : position + size]
                tokens += ids
                holes.append(self.tokenizer.decode(ids))
                text += holes[-1]
            position += size
        middle = before_stops(holes[0], self.params.stop)
        return Generation(
            index=index,
            text=text if self.whole else middle,
            pieces=tuple(holes),
            tokens=tuple(tokens),
            forward_passes=trace.forward_passes,
            seconds=seconds,
            finish_reason="length" if middle == holes[0] else "stop",
            trace=trace,
        )


@dataclass(frozen=True)
class Span:
    """Characters of a text that are to be written again, as so many `tokens`; None = as many as suit best."""

    start: int
    end: int
    tokens: int | None = None


class DiffuCoder:
    """A model with its tokenizer, ready to write."""

    def __init__(self, model: Denoiser, tokenizer: Tokenizer, *, name: str = "custom") -> None:
        """`name` is what results and traces call the model."""
        tokenizer.check_fits(mask_id=model.mask_id, rows=model.vocab_size)
        self.model = model
        self.tokenizer = tokenizer
        self.name = name

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

        `dtype` is that of the weights. `compiled` pays on a GPU, where many passes follow: the first of each shape
        takes half a minute.
        """
        model, tokenizer = load_with_tokenizer(source, dtype=dtype, device=device)
        model.use_fast_layers(compiled=compiled)
        return cls(model, tokenizer, name="tiny" if source is None else str(source))

    # --- text to result ---

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
        if not prompts:
            raise PromptError("no prompt is given; pass at least one")
        requests = [self.request(prompt, params or DecodingParams(), chat=chat) for prompt in prompts]
        return [result for results in self.run(requests) for result in results]

    def stream(self, prompt: Prompt, params: DecodingParams | None = None, *, chat: bool = True) -> Iterator[Step]:
        """Answer one request, and yield every step as it happens; `show` turns a step into text."""
        request = self.request(prompt, params or DecodingParams(), chat=chat)
        one_each = request.params.replace(num_samples=1)  # samples are rows already
        yield from denoise(self.model, request.canvas, one_each, until=request.until)

    def infill(
        self, prefix: str, suffix: str, *, length: int | None = None, params: DecodingParams | None = None
    ) -> Generation:
        """Write what belongs between `prefix` and `suffix`: `length` tokens, or as many as suit best.

        Of several samples this and `fill` and `edit` return the likeliest.
        """
        return self._likeliest(self.infill_request(prefix, suffix, params or DecodingParams(), length=length))

    def fill(self, text: str, params: DecodingParams | None = None) -> Generation:
        """Fill every `<|hole|>` or `<|hole:12|>` of `text` jointly; the result's `text` is the whole, filled."""
        return self._likeliest(self.fill_request(text, params or DecodingParams()))

    def edit(self, text: str, spans: Sequence[Span], params: DecodingParams | None = None) -> Generation:
        """Write the `spans` of a text again, everything else fixed; the result's `text` is the whole, edited."""
        return self._likeliest(self.edit_request(text, spans, params or DecodingParams()))

    def run(
        self, requests: Sequence[Request], *, on_step: OnStep | None = None, entropies: int = 0
    ) -> list[list[Generation]]:
        """Decode several requests in one batch: the results of each, in order of their index.

        `on_step` is called after each step of each sequence. Traces hold the entropies of the first `entropies` steps.
        """
        began = time.perf_counter()
        groups = [request.sequences(entropies=entropies) for request in requests]
        sequences = [sequence for group in groups for sequence in group]
        for steps in decode(self.model, sequences):
            for index, step in steps:
                if on_step is not None:
                    on_step(sequences[index], step)
        seconds = time.perf_counter() - began
        return [request.results(group, seconds) for request, group in zip(requests, groups, strict=True)]

    # --- text to request ---

    def request(self, prompt: Prompt, params: DecodingParams, *, chat: bool = True) -> Request:
        """What answers one prompt, a row a sample. Raises PromptError."""
        return self._request(self.canvas([prompt], params, chat=chat), params)

    def request_of_ids(self, ids: list[int], params: DecodingParams, *, sample: int = 0) -> Request:
        """What continues a prompt that is tokens already; with the seed, `sample` fixes the random numbers."""
        canvas = self.canvas_of_ids([ids], params.new_tokens)
        canvas.sample[:] = sample
        return self._request(canvas, params)

    def infill_request(
        self, prefix: str, suffix: str, params: DecodingParams, *, length: int | None = None, most: int | None = None
    ) -> Request:
        """What `infill` decodes; of the lengths tried none is over `most`. Raises PromptError."""
        if not prefix and self.model.first_scorable:
            raise PromptError("prefix is empty, and the first token needs one to its left; start it with a newline")
        if length is not None and length < 1:
            raise PromptError(f"length={length} is not a hole; give at least 1 token, or leave it out")
        return self._holes([prefix, Hole(length), suffix], params, whole=False, most=most)

    def fill_request(self, text: str, params: DecodingParams) -> Request:
        """What `fill` decodes. Raises PromptError."""
        pieces = split_holes(text)
        if not any(isinstance(piece, Hole) for piece in pieces):
            raise PromptError("the text has no hole to fill; mark one with <|hole|>, or <|hole:12|> for 12 tokens")
        if isinstance(pieces[0], Hole) and self.model.first_scorable:
            raise PromptError("the text begins with a hole, and the first token needs one to its left; put text before")
        return self._holes(pieces, params, whole=True)

    def edit_request(self, text: str, spans: Sequence[Span], params: DecodingParams) -> Request:
        """What `edit` decodes; spans are in order and do not overlap. Raises PromptError."""
        if "<|hole" in text:
            raise PromptError("the text has a hole already; fill it, or give spans of a text without holes")
        marked = ""
        position = 0
        for span in spans:
            if not position <= span.start <= span.end <= len(text):
                raise PromptError(
                    f"span {span.start} to {span.end} is not in the {len(text)} characters of the text, after the span "
                    "before it; give spans in order"
                )
            marked += text[position : span.start]
            marked += f"<|hole:{span.tokens}|>" if span.tokens else "<|hole|>"
            position = span.end
        return self.fill_request(marked + text[position:], params)

    def canvas(self, prompts: Sequence[Prompt], params: DecodingParams, *, chat: bool = True) -> Canvas:
        """The canvas of `prompts`: left-padded, with `params.new_tokens` masks after each. Raises PromptError."""
        if not prompts:
            raise PromptError("no prompt is given; pass at least one")
        rows = [self._encode(self._text(prompt, chat)) for prompt in prompts]
        return self.canvas_of_ids(rows, params.new_tokens)

    def canvas_of_ids(self, rows: Sequence[list[int]], new_tokens: int, *, forbidden: tuple[int, ...] = ()) -> Canvas:
        """As `canvas`, of prompts that are tokens already."""
        longest = max(len(row) for row in rows)
        self._check_length(longest + new_tokens, f"prompt of {longest} tokens and {new_tokens} new ones")
        pad = self.tokenizer.pad_id
        device = self.model.device
        padding = [longest - len(row) for row in rows]
        canvas = Canvas.from_prompts(
            torch.tensor([[pad] * count + row for count, row in zip(padding, rows, strict=True)], device=device),
            valid=torch.arange(longest, device=device) >= torch.tensor(padding, device=device)[:, None],  # (B, P)
            new_tokens=new_tokens,
            mask_id=self.model.mask_id,
            pad_id=pad,
            terminators=tuple(sorted(self.tokenizer.terminator_ids - set(forbidden))),
            forbidden=forbidden,
            proposable=min(self.model.vocab_size, self.tokenizer.vocab_size),
        )
        canvas.check_scorable(self.model.first_scorable)
        return canvas

    def show(self, step: Step, row: int = 0) -> str:
        """The text of a canvas row as it is, masks as placeholders, special tokens left out."""
        return self.tokenizer.decode_partial(step.canvas[row].tolist())

    def _likeliest(self, request: Request) -> Generation:
        results = self.run([request])[0]
        return max(results, key=lambda result: result.trace.mean_log_prob)  # the first of equals

    def _request(self, canvas: Canvas, params: DecodingParams) -> Request:
        return Request(
            canvas=canvas.repeat(params.num_samples), params=params, tokenizer=self.tokenizer, model_name=self.name
        )

    def _holes(
        self, pieces: Sequence[str | Hole], params: DecodingParams, *, whole: bool, most: int | None = None
    ) -> Request:
        if params.stop and whole:
            raise ConfigError(
                f"stop={params.stop!r} ends an answer, but holes end where the text goes on; leave it out"
            )
        parts = [self._part(piece) for piece in pieces]
        lengths: tuple[int, ...] = (0,)
        if any(part.is_open for part in parts):
            lengths = _lengths_to_try(most)
        needed = 0
        for part in parts:  # before lists of that length are made
            needed += len(part.ids) + (part.length or 0) + max(lengths) * part.is_open
        self._check_length(needed, "text and holes")
        rows = []
        for length in lengths:
            row: list[int] = []
            for part in parts:
                row += part.row(self.model.mask_id, length)
            rows.append(row)
        forbidden = tuple(sorted(self.tokenizer.special_ids - {self.model.mask_id}))
        return HoleRequest(
            canvas=self.canvas_of_ids(rows, 0, forbidden=forbidden).repeat(params.num_samples),
            params=params,
            tokenizer=self.tokenizer,
            model_name=self.name,
            parts=parts,
            lengths=lengths,
            whole=whole,
        )

    def _part(self, piece: str | Hole) -> Part:
        if isinstance(piece, Hole):
            return Part(length=piece.length)
        return Part(piece, tuple(self._encode(piece)))

    def _text(self, prompt: Prompt, chat: bool) -> str:
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
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

    def _check_length(self, tokens: int, what: str) -> None:
        if tokens > self.model.max_length:
            raise PromptError(
                f"{what} exceed the model's context of {self.model.max_length}; shorten the prompt or ask for fewer "
                "new tokens"
            )


def _lengths_to_try(most: int | None) -> tuple[int, ...]:
    """The lengths that a hole is tried at, none over `most`; 1 if all are."""
    lengths = tuple(length for length in HOLE_LENGTHS if most is None or length <= most)
    return lengths or (1,)


def before_stops(text: str, stops: Iterable[str]) -> str:
    """`text` up to the first of `stops`."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text
