"""DiffuCoder: text in, text out. Loads a model with its tokenizer, and turns texts into requests and results.

This is the only pipeline. A `Request` is made from text. Its sequences are decoded, here by `run` and in the server by
its engine. `Request.results` makes `Generation`s of them.

A hole without a given length is tried at a few lengths, as rows of one batch. The row whose tokens were most likely on
average is kept. Several such holes in one text have the same length. A model that was trained to decide the length
(DreamOn) resizes its holes instead (`resize`), to `new_tokens` tokens at most.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffucoder.decoding.canvas import Canvas
from diffucoder.decoding.checkers import CHECKERS, python_flaw
from diffucoder.decoding.document import check_judged
from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.repair import PASSES, Judge, Repair, RoundRequest, next_step, repair_rounds
from diffucoder.decoding.requests import Generation, HoleRequest, Request, Span, WindowedRequest
from diffucoder.decoding.resize import Resize
from diffucoder.decoding.scaffold import hole_texts
from diffucoder.decoding.schema import schema_request
from diffucoder.decoding.sequence import Sequence as DecodingSequence
from diffucoder.decoding.step import Step, decode, steps_of
from diffucoder.decoding.windows import Pieces, texts_around, windows_of
from diffucoder.errors import ConfigError, PromptError
from diffucoder.grading.sandbox import Sandbox
from diffucoder.models.checkpoint import load_shipped, load_with_tokenizer
from diffucoder.models.denoiser import Denoiser
from diffucoder.tokenizer import Hole, Tokenizer, split_holes

FIRST_LENGTH = 4  # tokens that a hole begins with whose length the model decides
HOLE_LENGTHS = (2, 4, 6, 8, 12, 16, 24)  # tokens, tried for a hole without a given length
Prompt = str | Sequence[Mapping[str, str]]  # a request, or the messages of a conversation
OnStep = Callable[[DecodingSequence, Step], None]  # called after each step of each sequence


class DiffuCoder:
    """A model with its tokenizer, ready to write.

    Methods that answer take `DecodingParams`, settings by name as in `generate("...", steps=8)`, or both.
    """

    def __init__(self, model: Denoiser, tokenizer: Tokenizer, *, name: str = "custom") -> None:
        """`name` is the name of the model in results and traces."""
        tokenizer.check_fits(mask_id=model.mask_id, rows=model.vocab_size)
        self.model = model
        self.tokenizer = tokenizer
        self.name = name

    def __repr__(self) -> str:
        size = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        kind = f"{str(self.model.dtype).removeprefix('torch.')} on {self.model.device}"
        return f"<DiffuCoder {self.name}: {size:.1f}M parameters, {kind}, context {self.model.max_length}>"

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

        `dtype` is the dtype of the weights. `compiled` is for GPUs: the first pass of each shape takes half a minute.
        """
        if source is None or (source == "tiny" and not Path("tiny").exists()):
            model, tokenizer = load_shipped(dtype=dtype, device=device)
        else:
            model, tokenizer = load_with_tokenizer(source, dtype=dtype, device=device)
        model.use_fast_layers(compiled=compiled)
        return cls(model, tokenizer, name="tiny" if source is None else str(source))

    def generate(
        self, prompt: Prompt, params: DecodingParams | None = None, *, chat: bool = True, **settings: Any
    ) -> Generation:
        """Answer one request. `chat=False` continues `prompt` as raw text, for base models."""
        params = _params(params, settings)
        if params.num_samples != 1:
            raise ConfigError(f"num_samples={params.num_samples} gives several results; use generate_batch")
        [[result]] = self.run(self._warned_requests([prompt], params, chat))
        return result

    def generate_batch(
        self, prompts: Sequence[Prompt], params: DecodingParams | None = None, *, chat: bool = True, **settings: Any
    ) -> list[Generation]:
        """Answer several requests in one batch, `num_samples` consecutive results for each."""
        if isinstance(prompts, str):
            raise PromptError("generate_batch takes a list of requests, and got one text; use generate")
        if not prompts:
            raise PromptError("no prompt is given; pass at least one")
        requests = self._warned_requests(prompts, _params(params, settings), chat)
        return [result for results in self.run(requests) for result in results]

    def stream(
        self, prompt: Prompt, params: DecodingParams | None = None, *, chat: bool = True, **settings: Any
    ) -> Iterator[Step]:
        """Answer one request, and yield each step when it is done. `show` turns a step into text."""
        [request] = self._warned_requests([prompt], _params(params, settings), chat)
        yield from steps_of(self.model, request.canvas.tokens, request.sequences())

    def infill(
        self,
        prefix: str,
        suffix: str,
        *,
        length: int | None = None,
        params: DecodingParams | None = None,
        **settings: Any,
    ) -> Generation:
        """Write the text between `prefix` and `suffix`: `length` tokens, or the best of several lengths.

        Of several samples, `infill`, `fill` and `edit` return the most likely one. Of a text that is longer than the
        model's context they read the lines around the holes.
        """
        return self._likeliest(self.infill_request(prefix, suffix, _params(params, settings), length=length))

    def fill(self, text: str, params: DecodingParams | None = None, **settings: Any) -> Generation:
        """Fill every `<|hole|>` or `<|hole:12|>` of `text` jointly. The result's `text` is the whole text."""
        return self._likeliest(self.fill_request(text, _params(params, settings)))

    def edit(
        self, text: str, spans: Sequence[Span], params: DecodingParams | None = None, **settings: Any
    ) -> Generation:
        """Write the `spans` of a text again and keep the rest. The result's `text` is the whole text."""
        return self._likeliest(self.edit_request(text, spans, _params(params, settings)))

    def repair(
        self,
        text: str,
        params: DecodingParams | None = None,
        *,
        tests: Sequence[str] = (),
        passes: int = PASSES,
        sandbox: Sandbox | None = None,
        on_round: Callable[[int], None] | None = None,
        **settings: Any,
    ) -> Repair:
        """Find what is wrong in a program, and write that again until `tests` pass, or until it took `passes`.

        Without `tests`, until it parses and something defines each name. `on_round` gets the passes of each round.
        """
        with nullcontext(sandbox) if sandbox or not tests else Sandbox(1) as box:
            rounds = repair_rounds(self, text, Judge(tests, box), _params(params, settings), passes=passes)
            step = next_step(rounds)
            while isinstance(step, RoundRequest):
                [results] = self.run([step])
                if on_round is not None:
                    on_round(sum(result.forward_passes for result in results))
                step = next_step(rounds, results)
            return step

    def fill_schema(
        self,
        prompt: Prompt,
        schema: Mapping[str, Any],
        params: DecodingParams | None = None,
        *,
        chat: bool = True,
        **settings: Any,
    ) -> Generation:
        """Answer with JSON that is valid for a JSON Schema, in at most `new_tokens` tokens; see docs/decoding.md."""
        return self._likeliest(schema_request(self, self.request(prompt, _params(params, settings), chat=chat), schema))

    def run(
        self, requests: Sequence[Request], *, on_step: OnStep | None = None, entropies: int = 0
    ) -> list[list[Generation]]:
        """Decode several requests in one batch. Return the results of each, in order of their index.

        `on_step` is called after each step of each sequence. Traces have the entropies of the first `entropies` steps.
        """
        began = time.perf_counter()
        groups = [request.sequences(entropies=entropies) for request in requests]
        sequences = [sequence for group in groups for sequence in group]
        for steps in decode(self.model, sequences):
            for sequence, step in steps:
                if on_step is not None:
                    on_step(sequence, step)
        seconds = time.perf_counter() - began
        return [request.results(group, seconds) for request, group in zip(requests, groups, strict=True)]

    def request(self, prompt: Prompt, params: DecodingParams, *, chat: bool = True, prefill: str = "") -> Request:
        """Make the request for one prompt, with a row for each sample. In a chat, the answer continues `prefill`."""
        given: Any = prompt
        if isinstance(given, list | tuple) and given and all(isinstance(message, str) for message in given):
            raise PromptError(f"{len(given)} texts are given in place of one; use generate_batch for several requests")
        is_chat = isinstance(given, list | tuple) and all(isinstance(message, Mapping) for message in given)
        if not (isinstance(given, str) or is_chat):
            raise PromptError(f"prompt {str(given)[:60]} is not a text; give a text, or the messages of a conversation")
        if not given or (isinstance(given, str) and not given.strip()):
            raise PromptError("the prompt is empty; write a request")
        if chat:
            ids = self.tokenizer.encode_chat(prompt, prefill=prefill)
        elif isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        else:
            raise PromptError("messages are a conversation; raw text is a string: leave chat=True, or pass a string")
        request = self.request_of_ids(ids, params)
        if chat:
            return replace(request, before=prefill, fenced=True)
        flaw = python_flaw(given)
        return replace(request, before=given if flaw is None or flaw.incomplete else "")

    def request_of_ids(self, ids: list[int], params: DecodingParams, *, sample: int = 0) -> Request:
        """Make the request for a prompt of token ids. `sample` and the seed fix the random numbers.

        Raises PromptError for a prompt with a mask.
        """
        if self.model.mask_id in ids:  # else the answer would begin there
            raise PromptError(f"the prompt has the mask's id {self.model.mask_id}; mark holes in a text with <|hole|>")
        canvas = self.canvas_of([ids], params.new_tokens)
        canvas.sample[:] = sample
        return Request(
            canvas=canvas.repeat(params.num_samples),
            params=params,
            tokenizer=self.tokenizer,
            model_name=self.name,
            remark=self.remark_of(canvas),
        )

    def infill_request(
        self, prefix: str, suffix: str, params: DecodingParams, *, length: int | None = None, most: int | None = None
    ) -> Request:
        """Make the request of `infill`, which tries no length over `most`. Raises PromptError."""
        if not prefix and self.model.first_scorable:
            raise PromptError("prefix is empty, and the first token needs one to its left; start it with a newline")
        return self._holes([prefix, Hole(length), suffix], params, whole=False, most=most)

    def fill_request(self, text: str, params: DecodingParams) -> Request:
        """Make the request of `fill`. Raises PromptError."""
        return self._whole(split_holes(text), params)

    def edit_request(self, text: str, spans: Sequence[Span], params: DecodingParams) -> Request:
        """Make the request of `edit`. Spans are in order and do not overlap. Raises PromptError."""
        pieces: list[str | Hole] = []
        position = 0
        for span in spans:
            if not position <= span.start <= span.end <= len(text):
                raise PromptError(
                    f"span {span.start} to {span.end} overlaps the one before, is reversed, or ends past character "
                    f"{len(text)}; give spans in order"
                )
            pieces += [text[position : span.start], Hole(span.tokens)]
            position = span.end
        return self._whole([*pieces, text[position:]], params)

    def show(self, step: Step, row: int = 0) -> str:
        """Return the text of a canvas row after `step`: masks are placeholders, special tokens are left out."""
        return self.tokenizer.decode_partial(step.canvas[row].tolist())

    def canvas_of(self, rows: Sequence[list[int]], new_tokens: int, *, forbidden: tuple[int, ...] = ()) -> Canvas:
        """Return the canvas of prompts (ids), left-padded, with `new_tokens` masks after each."""
        longest = max(len(row) for row in rows)
        self._check_length(longest + new_tokens, f"prompt of {longest} tokens and {new_tokens} new ones")
        pad = self.tokenizer.pad_id
        device = self.model.device
        lengths = torch.tensor([len(row) for row in rows], device=device)
        canvas = Canvas.from_prompts(
            torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device),
            valid=torch.arange(longest, device=device) >= longest - lengths[:, None],  # (B, P)
            new_tokens=new_tokens,
            mask_id=self.model.mask_id,
            pad_id=pad,
            terminators=tuple(sorted(self.tokenizer.terminator_ids - set(forbidden))),
            forbidden=forbidden,
            proposable=min(self.model.vocab_size, self.tokenizer.vocab_size),
            attention=self.model.attention,
        )
        canvas.check_scorable(self.model.first_scorable)
        return canvas

    def _warned_requests(self, prompts: Sequence[Prompt], params: DecodingParams, chat: bool) -> list[Request]:
        requests = []
        for prompt in prompts:
            requests.append(self.request(prompt, params, chat=chat))
            _warn_of(requests[-1])
        return requests

    def _likeliest(self, request: Request) -> Generation:
        _warn_of(request)
        [results] = self.run([request])
        # The first of equals. A sample of which nothing is left has no tokens to be sure of
        return max(results, key=lambda result: (bool(result.order), result.trace.mean_log_prob))

    def _whole(self, pieces: list[str | Hole], params: DecodingParams) -> Request:
        """Make the request that fills the holes between pieces of text and returns the whole text."""
        pieces = [piece for piece in pieces if piece != ""]
        if not any(isinstance(piece, Hole) for piece in pieces):
            raise PromptError("the text has no hole to fill; mark one with <|hole|>, or <|hole:12|> for 12 tokens")
        if isinstance(pieces[0], Hole) and self.model.first_scorable:
            raise PromptError("the text begins with a hole, and the first token needs one to its left; put text before")
        return self._holes(pieces, params, whole=True)

    def _holes(
        self, pieces: Pieces, params: DecodingParams, *, whole: bool, most: int | None = None, of: Pieces | None = None
    ) -> HoleRequest | WindowedRequest:
        """Make the request for pieces with holes, which may be a window `of` a longer text."""
        check_judged(pieces, params)
        block = self.model.attention.block
        first_hole = next(n for n, piece in enumerate(pieces) if isinstance(piece, Hole))
        if block is not None and any(piece and isinstance(piece, str) for piece in pieces[first_hole:]):
            raise PromptError(
                f"there is text after a hole, which this model cannot see while it fills it: it writes in blocks of "
                f"{block} tokens from left to right; let it continue the text before the hole, or use another model"
            )
        lengths: tuple[int, ...] = (0,)
        resize = self._resize(of or pieces, params, most)
        if resize is not None:
            lengths = (max(1, min(FIRST_LENGTH, resize.most // pieces.count(Hole()))),)
        elif Hole() in pieces:
            lengths = tuple(length for length in HOLE_LENGTHS if most is None or length <= most) or (1,)
        needed = 0
        for piece in pieces:
            if isinstance(piece, Hole):
                if piece.length is not None and piece.length < 1:
                    raise PromptError(f"length={piece.length} is not a hole; give at least 1 token, or leave it out")
                masks = piece.length or lengths[-1]
                self._check_length(masks, "the masks of a hole")  # before lists of that length are made
                needed += masks
        encoded = [self.tokenizer.encode(piece) if isinstance(piece, str) else [] for piece in pieces]
        sizes = [len(ids) for ids in encoded]
        needed += sum(sizes)
        if of is None and needed > self.model.max_length:
            return self._windowed(pieces, params, whole=whole, longest=lengths[-1], most=most)
        self._check_length(needed, f"text and holes of {needed} tokens")
        rows = []
        for length in lengths:
            row: list[int] = []
            for piece, ids in zip(pieces, encoded, strict=True):
                row += ids
                if isinstance(piece, Hole):
                    row += [self.model.mask_id] * (piece.length or length)
            rows.append(row)
        special = self.tokenizer.special_ids - {self.model.mask_id}
        canvas = self.canvas_of(rows, 0, forbidden=tuple(sorted(special)))
        if resize is not None:
            room = self.model.max_length - needed + int(canvas.masked[0].sum())
            forbidden = tuple(sorted(special - {resize.expand_id, resize.delete_id}))
            canvas = replace(canvas, forbidden=forbidden, resize=replace(resize, most=min(resize.most, room)))
        return HoleRequest(
            canvas=canvas.repeat(params.num_samples),
            params=params,
            tokenizer=self.tokenizer,
            model_name=self.name,
            remark=self.remark_of(canvas),
            pieces=pieces,
            sizes=sizes,
            lengths=lengths,
            whole=whole,
        )

    def _resize(self, pieces: list[str | Hole], params: DecodingParams, most: int | None) -> Resize | None:
        """How the model decides the lengths of the holes; None if it cannot, or if one is given."""
        expand_id, delete_id = self.tokenizer.expand_id, self.tokenizer.delete_id
        given = any(isinstance(piece, Hole) and piece.length is not None for piece in pieces)
        if expand_id is None or delete_id is None or given or params.preset == "reference":
            return None
        return Resize(expand_id, delete_id, most=min(params.new_tokens, most or params.new_tokens))

    def _windowed(
        self, pieces: Pieces, params: DecodingParams, *, whole: bool, longest: int, most: int | None
    ) -> WindowedRequest:
        """What fills the holes of a long text, each from the lines around it."""
        budget = self.model.max_length * 15 // 16  # lines in a row may have a few tokens more than each alone
        budget = min(budget, self.model.trained_length or budget)

        def count(piece: str | Hole) -> int:
            return len(self.tokenizer.encode(piece)) if isinstance(piece, str) else piece.length or longest

        windows = windows_of(pieces, budget, count)
        plain = [""] * len(pieces)
        if params.syntax is not None:
            checker = CHECKERS[params.syntax]
            plain = hole_texts(pieces, longest, self.tokenizer, self.model.mask_id, checker)
        parts: list[Request] = []
        for lines, own in windows:
            part = self._holes(own, params, whole=whole, most=most, of=pieces)
            assert isinstance(part, HoleRequest)  # a window fits into the context
            before, after = texts_around(pieces, lines, plain)
            parts.append(replace(part, text_before=before[:-1], text_after=after))  # the window has its line end
        read = ", ".join(f"{lines.start + 1} to {lines.stop}" for lines, _ in windows)
        return WindowedRequest(
            canvas=Canvas.stacked([part.canvas for part in parts]),
            params=params,
            tokenizer=self.tokenizer,
            model_name=self.name,
            remark=f"the text is longer than the model's context; it reads lines {read}",
            parts=parts,
            pieces=pieces,
            whole=whole,
        )

    def remark_of(self, canvas: Canvas) -> str:
        """What a user should know about a canvas: that the model was not trained on any so long."""
        length = canvas.tokens.shape[1]
        trained = self.model.trained_length or length
        if length <= trained:
            return ""
        return (
            f"prompt and answer take {length} tokens, and {self.name} was trained on at most {trained}: the text may "
            "fall apart; ask for fewer new tokens"
        )

    def _check_length(self, tokens: int, what: str) -> None:
        if tokens > self.model.max_length:
            raise PromptError(
                f"{what} exceed the model's context of {self.model.max_length}; shorten the prompt or ask for fewer "
                "new tokens"
            )


def _params(params: DecodingParams | None, settings: Mapping[str, Any]) -> DecodingParams:
    """Settings that were given as a whole, by name, or both. Raises ConfigError."""
    if params is not None and not isinstance(params, DecodingParams):
        raise ConfigError(f"params={params!r} is not DecodingParams; give settings by name, as in steps=8")
    return (params or DecodingParams()).replace(**settings)


def _warn_of(request: Request) -> None:
    """Warn with the remark of a request, if it has one, at the line that calls a method of `DiffuCoder`."""
    if request.remark:
        warnings.warn(request.remark, stacklevel=4)
