"""Requests: the rows to decode for a text, and the `Generation`s that are made of the decoded rows."""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from torch import Tensor

from diffucoder.decoding.canvas import Canvas, leftmost
from diffucoder.decoding.checkers import CHECKERS
from diffucoder.decoding.colours import as_html
from diffucoder.decoding.constraints import Constraint
from diffucoder.decoding.document import Document, Part
from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.regular import HolePattern, Patterns
from diffucoder.decoding.sequence import Sequence, Until
from diffucoder.decoding.trace import Trace, commit_order
from diffucoder.decoding.witness import Witness
from diffucoder.tokenizer import Hole, Tokenizer, with_texts


@dataclass(frozen=True)
class Span:
    """Characters of a text to write again, with this number of `tokens`; None tries several lengths."""

    start: int
    end: int
    tokens: int | None = None


class StopSearch:
    """Whether the text of ids from the left has a stop string. Each call decodes only ids that are new."""

    def __init__(self, tokenizer: Tokenizer, stops: Iterable[str]) -> None:
        self.tokenizer = tokenizer
        self.stops = tuple(stops)
        self._before = 4 * max(map(len, self.stops)) + 4  # ids that may have a part in a stop: a character has 4 bytes
        self._seen = torch.empty(0, dtype=torch.long)  # (n,) at the last call

    def __call__(self, settled: Tensor) -> bool:
        start = 0
        if torch.equal(settled[: len(self._seen)], self._seen):
            start = max(0, len(self._seen) - self._before)
        self._seen = settled
        text = self.tokenizer.decode(settled[start:].tolist())
        return before_stops(text, self.stops) != text


class SettledText:
    """The text of ids from the left, up to the point where later ids or a stop string could change it.

    It decodes each id a few times, however long the text becomes.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Iterable[str]) -> None:
        self.tokenizer = tokenizer
        self.stops = tuple(stops)
        self.length = 0  # characters that were returned
        self._context: list[int] = []  # the ids before `_ids`, since some decoders change the beginning of a text
        self._ids: list[int] = []  # those that may end in a part of a character
        self._decoded = 0  # characters of theirs that are known
        self._held = ""  # known, but perhaps the beginning of a stop string
        self._stopped = False

    def add(self, ids: list[int]) -> str:
        """Return the text that the next `ids` add."""
        if self._stopped:
            return ""
        text = self._held + self._decode(ids)
        whole = before_stops(text, self.stops)
        self._stopped = whole != text
        held = 0 if self._stopped else _stop_begun(whole, self.stops)
        self._held = whole[len(whole) - held :]
        new = whole[: len(whole) - held]
        self.length += len(new)
        return new

    def _decode(self, ids: list[int]) -> str:
        self._ids += ids
        text = self.tokenizer.decode(self._context + self._ids)[len(self.tokenizer.decode(self._context)) :]
        whole = text if len(self._ids) > 64 else text.rstrip("\ufffd")  # the first bytes of an incomplete character
        new = whole[self._decoded :]
        self._decoded = len(whole)
        if whole == text:
            visible = [id_ for id_ in self._ids if id_ not in self.tokenizer.special_ids]
            self._context = visible[-4:] or self._context
            self._ids = []
            self._decoded = 0
        return new


def _stop_begun(text: str, stops: Iterable[str]) -> int:
    """Return how many characters at the end of `text` may be the beginning of a stop string."""
    most = 0
    for stop in stops:
        tail = text[-(len(stop) - 1) :] if len(stop) > 1 else ""
        start = tail.find(stop[0])
        while start >= 0 and not stop.startswith(tail[start:]):
            start = tail.find(stop[0], start + 1)
        if start >= 0:
            most = max(most, len(tail) - start)
    return most


@dataclass(frozen=True, repr=False)
class Generation:
    """One finished sample. A notebook shows its text, coloured by the step that committed each token."""

    index: int  # number of the result in its request, from 0
    text: str  # the answer, the middle of an infill, or the whole text of a fill
    pieces: tuple[str, ...]  # the text of each hole; for an answer, its text
    tokens: tuple[int, ...]  # generated tokens before the terminator or stop string
    forward_passes: int
    seconds: float  # that the whole batch of the sample took
    finish_reason: str  # "stop": a terminator or stop string; "length": the canvas is full
    trace: Trace  # the whole row, with the step that committed each token
    tokenizer: Tokenizer | None = field(default=None, compare=False)
    problem: str = ""  # why the text does not keep the rule that was asked for

    def __repr__(self) -> str:
        text = repr(self.text if len(self.text) <= 60 else f"{self.text[:57]}...")
        return f"<Generation {text}: {len(self.tokens)} tokens in {self.forward_passes} passes, {self.finish_reason}>"

    def _repr_html_(self) -> str | None:
        return None if self.tokenizer is None else as_html(self.trace, self.tokenizer)

    @property
    def order(self) -> list[int]:
        """Positions from the first hole, in the order of their commitment."""
        return commit_order(self.trace.steps)

    @property
    def seed(self) -> int:
        """The seed of the request; with `index` it fixes this result."""
        return int(self.trace.params["seed"])

    @property
    def tokens_per_forward(self) -> float:
        """Tokens per forward pass (TPF)."""
        return len(self.tokens) / max(1, self.forward_passes)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second, without prompt and padding (TPS)."""
        return len(self.tokens) / max(1e-9, self.seconds)


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """Prompts to answer: a canvas with a row for each sample of each prompt, and a result for each row."""

    canvas: Canvas  # (B, T)
    params: DecodingParams
    tokenizer: Tokenizer
    model_name: str
    remark: str = ""  # what a user should know about it
    before: str = ""  # text before the answer that belongs to its program
    fenced: bool = False  # whether it is a reply, in which programs may stand in fences

    @property
    def result_count(self) -> int:
        """The number of results, `params.num_samples` consecutive ones for each prompt."""
        return len(self.canvas.tokens)

    def prompt_tokens(self, index: int) -> int:
        """Return the number of tokens of the result `index` that are known before decoding."""
        return int((self.canvas.valid[index] & (self.canvas.tokens[index] != self.canvas.mask_id)).sum())

    @property
    def until(self) -> Until | None:
        """The function that ends a row early, at a stop string in its text."""
        return StopSearch(self.tokenizer, self.params.stop) if self.params.stop else None

    def document(self, row: int) -> Document:
        """The text of a row of the canvas."""
        own = self.canvas.tokens[row][self.canvas.valid[row]]
        answer = Part(leftmost(own == self.canvas.mask_id), len(own), is_answer=True)
        return self._document((self.before, answer))

    def _document(self, pieces: tuple[str | Part, ...]) -> Document:
        return Document(
            pieces=pieces,
            tokenizer=self.tokenizer,
            mask_id=self.canvas.mask_id,
            terminators=self.canvas.terminators,
            stops=self.params.stop,
            fenced=self.fenced,
        )

    def constraint(self, row: int) -> Constraint | None:
        """The constraint of a row of the canvas, if the settings ask for one."""
        if self.params.syntax is None:
            return None
        return Witness(self.document(row), CHECKERS[self.params.syntax])

    def sequences(self, *, entropies: int = 0) -> list[Sequence]:
        """Make a sequence for each row. Their traces hold the entropies of the first `entropies` steps."""
        sequences = []
        for row in range(len(self.canvas.tokens)):
            constraint = self.constraint(row)
            sequence = Sequence(
                self.canvas, self.params, row=row, until=self.until, entropies=entropies, constraint=constraint
            )
            sequences.append(sequence)
        return sequences

    def settled_ids(self, sequence: Sequence, *, start: int = 0) -> list[int]:
        """Return the ids of an answer, from `start` on, that no later step can change; [] while any may be revoked."""
        if sequence.takes_back and sequence.finish_reason is None:
            return []
        hole_end = sequence.first_hole + int(sequence.holes.sum())  # of the only hole; text after it is no answer
        end = min(sequence.written_end, hole_end)
        ids: list[int] = sequence.tokens[sequence.first_hole + start : end].tolist()
        return ids

    def results(self, sequences: list[Sequence], seconds: float) -> list[Generation]:
        """Return the results of the finished `sequences`, in order of their index. Decoding took `seconds`."""
        return [self._result(index, sequence, seconds) for index, sequence in enumerate(sequences)]

    def _result(self, index: int, sequence: Sequence, seconds: float) -> Generation:
        written = sequence.tokens[sequence.first_hole : sequence.written_end].tolist()
        text, tokens, stopped = self._before_stops(written)
        trace = sequence.trace(self.model_name)
        return Generation(
            index=index,
            text=text,
            pieces=(text,),
            tokens=tuple(tokens),
            forward_passes=trace.forward_passes,
            seconds=seconds,
            finish_reason="stop" if stopped or sequence.finish_reason == "stop" else "length",
            trace=trace,
            tokenizer=self.tokenizer,
            problem=_problem(sequence),
        )

    def _before_stops(self, ids: list[int]) -> tuple[str, list[int], bool]:
        """Return the text of `ids` before the first stop string, its ids, and whether there is one."""
        whole = self.tokenizer.decode(ids)
        text = before_stops(whole, self.params.stop)
        if text == whole:
            return text, ids, False
        count = bisect_left(range(len(ids)), True, key=lambda n: self.tokenizer.decode(ids[:n]).startswith(text))
        return text, ids[:count], True


@dataclass(frozen=True, eq=False, kw_only=True)
class HoleRequest(Request):
    """Text with holes: the canvas has `num_samples` consecutive rows for each length that open holes are tried at."""

    pieces: list[str | Hole]
    sizes: list[int]  # tokens of each piece of text; 0 for a hole
    lengths: tuple[int, ...]  # that open holes are tried at
    whole: bool  # whether the result's text is the whole, filled, or the first hole alone
    text_before: str = ""  # text before and after the pieces, if they are a window of a longer text
    text_after: str = ""

    @property
    def result_count(self) -> int:
        """The number of samples, because one length is kept for each."""
        return self.params.num_samples

    @property
    def until(self) -> Until | None:
        """None, because rows are compared by all of their tokens. Stop strings cut the text of each hole afterwards."""
        return None

    def results(self, sequences: list[Sequence], seconds: float) -> list[Generation]:
        """Return the row of the most likely length of each sample, in order of the samples."""
        traces = [sequence.trace(self.model_name) for sequence in sequences]
        samples = self.params.num_samples
        problems = [_problem(sequence) for sequence in sequences]
        results = []
        for sample in range(samples):
            rows = range(sample, len(traces), samples)
            best = max(rows, key=lambda row: (not problems[row], traces[row].mean_log_prob))  # the first of equals
            places = sequences[best].places.tolist()
            result = self._filled(sample, self.lengths[best // samples], traces[best], places, seconds)
            results.append(replace(result, problem=problems[best]))
        return results

    def document(self, row: int) -> Document:
        """The whole text, with its holes filled by a row of the canvas."""
        length = self.lengths[row // self.params.num_samples]
        position = 0
        pieces: list[str | Part] = [self.text_before]
        for piece, size in zip(self.pieces, self.sizes, strict=True):
            if isinstance(piece, Hole):
                size = piece.length or length
                pieces.append(Part(position, position + size, is_answer=False))
            else:
                pieces.append(piece)
            position += size
        return self._document((*pieces, self.text_after))

    def _filled(self, index: int, length: int, trace: Trace, places: list[int], seconds: float) -> Generation:
        """The result of a row, of which each token comes from one of the `places` of the canvas."""
        text = ""
        holes: list[str] = []
        tokens: list[int] = []
        stopped = False
        position = 0
        for piece, size in zip(self.pieces, self.sizes, strict=True):
            if isinstance(piece, Hole):
                size = piece.length or length
                ids = trace.tokens[bisect_left(places, position) : bisect_left(places, position + size)]
                hole, kept, cut = self._before_stops(ids)
                stopped = stopped or cut
                holes.append(hole)
                tokens += kept
                text += hole
            else:
                text += piece
            position += size
        return Generation(
            index=index,
            text=text if self.whole else holes[0],
            pieces=tuple(holes),
            tokens=tuple(tokens),
            forward_passes=trace.forward_passes,
            seconds=seconds,
            finish_reason="stop" if stopped else "length",
            trace=trace,
            tokenizer=self.tokenizer,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class SchemaRequest(HoleRequest):
    """Fixed text with a hole for each value, which matches a pattern. The first piece is the prompt."""

    patterns: list[HolePattern]

    def constraint(self, row: int) -> Constraint | None:
        """The patterns, in each row."""
        return Patterns(self.patterns)

    def settled_ids(self, sequence: Sequence, *, start: int = 0) -> list[int]:
        """[], because the text is printed without the blanks that fill its holes, when all of it is known."""
        return []

    def results(self, sequences: list[Sequence], seconds: float) -> list[Generation]:
        """The compact JSON of each row."""
        results = []
        for result in super().results(sequences, seconds):
            values = tuple(piece.strip(" ") for piece in result.pieces)
            text = with_texts(self.pieces[1:], iter(values))
            results.append(replace(result, text=text, pieces=values, finish_reason="stop"))
        return results


@dataclass(frozen=True, eq=False, kw_only=True)
class JoinedRequest(Request):
    """Rows of several requests, its `parts`, in one batch."""

    parts: list[Request]

    @property
    def until(self) -> Until | None:
        """None, because no part ends a row early."""
        return None

    def constraint(self, row: int) -> Constraint | None:
        """The constraint of a row of one of the parts."""
        for part in self.parts:
            if row < len(part.canvas.tokens):
                return part.constraint(row)
            row -= len(part.canvas.tokens)
        return None

    def results_of_parts(self, sequences: list[Sequence], seconds: float) -> list[list[Generation]]:
        """The results of each part, in order."""
        remaining = iter(sequences)
        return [part.results(list(islice(remaining, len(part.canvas.tokens))), seconds) for part in self.parts]


@dataclass(frozen=True, eq=False, kw_only=True)
class WindowedRequest(JoinedRequest):
    """A text that is longer than the model's context: each part is a window of its lines."""

    pieces: list[str | Hole]
    whole: bool  # as of `HoleRequest`

    @property
    def result_count(self) -> int:
        """The number of samples."""
        return self.params.num_samples

    def prompt_tokens(self, index: int) -> int:
        """The known tokens of all windows."""
        return sum(part.prompt_tokens(index) for part in self.parts)

    def results(self, sequences: list[Sequence], seconds: float) -> list[Generation]:
        """The whole text for each sample, in order. The trace is that of the window that is least sure."""
        samples = zip(*self.results_of_parts(sequences, seconds), strict=True)
        return [self._merged(list(windows)) for windows in samples]

    def _problem_of(self, text: str) -> str:
        if self.params.syntax is None:
            return ""
        document = Document((text,), self.tokenizer, self.canvas.mask_id)
        return document.problem(torch.empty(0, dtype=torch.long), CHECKERS[self.params.syntax])

    def _merged(self, windows: list[Generation]) -> Generation:
        holes = [hole for window in windows for hole in window.pieces]
        text = with_texts(self.pieces, iter(holes))
        stopped = any(window.finish_reason == "stop" for window in windows)
        return replace(
            min(windows, key=lambda window: window.trace.mean_log_prob),
            text=text if self.whole else holes[0],
            pieces=tuple(holes),
            tokens=tuple(token for window in windows for token in window.tokens),
            forward_passes=max(window.forward_passes for window in windows),
            finish_reason="stop" if stopped else "length",
            problem=self._problem_of(text),
        )


def _problem(sequence: Sequence) -> str:
    if sequence.constraint is None:
        return ""
    return sequence.constraint.problem(sequence)


def before_stops(text: str, stops: Iterable[str]) -> str:
    """Return `text` up to the first of `stops`."""
    found = [text.find(stop) for stop in stops]
    return text[: min((start for start in found if start >= 0), default=len(text))]
