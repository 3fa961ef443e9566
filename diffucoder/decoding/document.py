"""Document: the text of a row of a canvas, and which of its positions wrote which character.

For an answer it is the text before it, as far as that belongs to the program, and the answer up to its end. For text
with holes it is the whole text.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from diffucoder.decoding.checkers import Checker, Flaw
from diffucoder.decoding.params import DecodingParams
from diffucoder.errors import PromptError
from diffucoder.tokenizer import Hole, Tokenizer

_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*(\w*)[^\n]*$", re.MULTILINE)
MOST_JUDGED = 100_000  # characters of a text with holes
_PYTHON = ("", "python", "python3", "py")  # names of the language of a fence


@dataclass(frozen=True)
class Part:
    """A run of positions of the row that is decoded on its own: an answer, or a hole."""

    start: int
    end: int
    is_answer: bool  # ends at the first terminator


@dataclass(frozen=True)
class Document:
    """Pieces of fixed text, and the parts of a row between them."""

    pieces: tuple[str | Part, ...]
    tokenizer: Tokenizer
    mask_id: int
    terminators: tuple[int, ...] = ()
    stops: tuple[str, ...] = ()
    fenced: bool = False  # whether it is a reply, in which programs may stand in fences

    def text(self, tokens: Tensor) -> tuple[str, bool]:
        """The text up to the first masked position of `tokens` (T,), and whether that is all of it."""
        ids = tokens.tolist()
        text = ""
        for piece in self.pieces:
            if isinstance(piece, str):
                text += piece
                continue
            written, whole = self._written(piece, ids)
            text += written
            if not whole:
                return text, False
        return text, True

    def programs(self, text: str) -> Iterator[tuple[int, int]]:
        """Begin and end of each program in `text`: the blocks of Python in a reply that has fences, else all of it."""
        if not self.fenced or _FENCE.search(text) is None:
            yield 0, len(text)
            return
        fence: re.Match[str] | None = None  # the line that opens the block at work
        for line in _FENCE.finditer(text):
            if fence is None:
                fence = line
            elif line[1].startswith(fence[1]) and not line[2]:
                yield from _block(fence, line.start())
                fence = None
        if fence is not None:
            yield from _block(fence, len(text))

    def flaw(self, tokens: Tensor, checker: Checker) -> Flaw | None:
        """The first flaw that `checker` finds in the programs of the text.

        In a text that ends at a mask, what more text could mend is none.
        """
        text, whole = self.text(tokens)
        for begin, end in self.programs(text):
            flaw = checker(text[begin:end])
            if flaw is not None and (whole or not flaw.incomplete or end < len(text)):
                return Flaw(begin + flaw.at, flaw.message, flaw.incomplete)
        return None

    def problem(self, tokens: Tensor, checker: Checker) -> str:
        """The first flaw as a line for people; empty if there is none."""
        flaw = self.flaw(tokens, checker)
        if flaw is None:
            return ""
        text, _ = self.text(tokens)
        line = text.count("\n", 0, flaw.at) + 1
        return f"line {line}: {flaw.message}"

    def position(self, tokens: Tensor, at: int) -> int:
        """The position of the row that wrote character `at` of the text, or of the nearest part before or after it."""
        ids = tokens.tolist()
        nearest: int | None = None
        for piece in self.pieces:
            if isinstance(piece, str):
                at -= len(piece)
                continue
            written, _ = self._written(piece, ids)
            if nearest is None:
                nearest = piece.start
            if at < 0:
                break
            nearest = piece.end - 1
            if at < len(written):
                decode = self.tokenizer.decode
                own = ids[piece.start : piece.end]
                count = range(1, len(own) + 1)
                return piece.start + bisect_right(count, at, key=lambda n: len(decode(own[:n])))
            at -= len(written)
        return nearest or 0

    def moved(self, places: Tensor) -> "Document":
        """The document of a resized row, of which each position was at `places` (T',) before."""
        old: list[int] = places.tolist()
        pieces: list[str | Part] = []
        for piece in self.pieces:
            if isinstance(piece, Part):
                piece = replace(piece, start=bisect_left(old, piece.start), end=bisect_left(old, piece.end))
            pieces.append(piece)
        return replace(self, pieces=tuple(pieces))

    def _written(self, part: Part, ids: list[int]) -> tuple[str, bool]:
        """The text of a part up to its first mask, and whether that is all of it."""
        own = ids[part.start : part.end]
        whole = True
        for count, id_ in enumerate(own):
            if id_ == self.mask_id or (part.is_answer and id_ in self.terminators):
                own = own[:count]
                whole = id_ != self.mask_id
                break
        text = self.tokenizer.decode(own)
        for stop in self.stops:
            before, found, _ = text.partition(stop)
            if found:
                text, whole = before, True
        return text, whole


def _block(fence: re.Match[str], end: int) -> Iterator[tuple[int, int]]:
    """Begin and end of the block after a fence, if it is Python."""
    if fence[2].lower() in _PYTHON and fence.end() < end:
        yield fence.end() + 1, end


def check_judged(pieces: Iterable[str | Hole], params: DecodingParams) -> None:
    """Raise PromptError for a text that is too long to judge it after each pass."""
    judged = sum(len(piece) for piece in pieces if isinstance(piece, str))
    if params.syntax is not None and judged > MOST_JUDGED:
        raise PromptError(
            f"syntax={params.syntax!r} reads the whole text after each pass, and it has {judged:,} characters, more "
            f"than {MOST_JUDGED:,}; give the part around the holes, or leave syntax out"
        )
