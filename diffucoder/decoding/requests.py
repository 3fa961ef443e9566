"""Requests: what is to be decoded for a text, and the `Generation`s that the decoded rows come to.

For: the two ends of the pipeline, which coder and server share. Not for: making requests from text (`coder`), or
decoding them (`step`).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from diffucoder.decoding.canvas import Canvas
from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.sequence import Sequence, Until
from diffucoder.decoding.trace import Trace
from diffucoder.tokenizer import Tokenizer


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
    def result_count(self) -> int:
        """How many results there will be."""
        return len(self.canvas.tokens)

    @property
    def rows_are_results(self) -> bool:
        """Whether row i becomes result i, so that its text can be sent while it is decoded."""
        return self.result_count == len(self.canvas.tokens)

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

    def sequences(self, *, entropies: int = 0) -> list[Sequence]:
        """One for each row; their traces hold the entropies of the first `entropies` steps."""
        rows = range(len(self.canvas.tokens))
        return [Sequence(self.canvas, self.params, row=n, until=self.until, entropies=entropies) for n in rows]

    def settled_ids(self, sequence: Sequence) -> list[int]:
        """The ids of an answer that no later step can change, from its beginning; none while tokens may be revoked."""
        if self.params.revoke and sequence.finish_reason is None:
            return []
        masks = int(sequence.holes.sum())
        end = min(sequence.first_masked, sequence.answer_end, sequence.first_hole + masks)
        ids: list[int] = sequence.tokens[sequence.first_hole : end].tolist()
        return ids

    def results(self, sequences: list[Sequence], seconds: float) -> list[Generation]:
        """What the finished `sequences` come to, in order of their index. `seconds` is what decoding took."""
        return [self._answer(index, sequence, seconds) for index, sequence in enumerate(sequences)]

    def _answer(self, index: int, sequence: Sequence, seconds: float) -> Generation:
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

    parts: list[Part]
    lengths: tuple[int, ...]  # that open holes are tried at
    whole: bool  # whether the result's text is the whole, filled, or the first hole alone

    @property
    def result_count(self) -> int:
        """How many results there will be."""
        return self.params.num_samples

    @property
    def until(self) -> Until | None:
        """Nothing: rows that ended early could not be compared. Stop strings cut the text afterwards."""
        return None

    def results(self, sequences: list[Sequence], seconds: float) -> list[Generation]:
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


def before_stops(text: str, stops: Iterable[str]) -> str:
    """`text` up to the first of `stops`."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text
