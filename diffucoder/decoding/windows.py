"""Windows: the whole lines around the holes of a text that is longer than the model's context.

Holes that are near each other share a window. Each hole is in one window; other lines may be in two.
"""

from collections.abc import Callable, Iterable
from functools import cache
from itertools import chain, groupby

from diffucoder.errors import PromptError
from diffucoder.tokenizer import Hole, with_texts

MOST_WINDOWS = 32

Pieces = list[str | Hole]


def windows_of(pieces: Pieces, budget: int, count: Callable[[str | Hole], int]) -> list[tuple[range, Pieces]]:
    """The lines, counted from 0, and the pieces of the windows around the holes of a text, in order.

    `count` gives the tokens of a piece; a window has at most `budget`. PromptError if the line of a hole has more, or
    too many windows are needed.
    """
    lines = _lines(pieces)

    @cache
    def cost(line: int) -> int:
        return sum(map(count, lines[line]))

    spans: list[tuple[int, int]] = []  # first and last line
    total = 0  # tokens of the last span
    for line, parts in enumerate(lines):
        if not any(isinstance(part, Hole) for part in parts):
            continue
        if cost(line) > budget:
            raise PromptError(f"line {line + 1} has a hole and over {budget} tokens, too many to read; break the line")
        added = range(spans[-1][1] + 1, line + 1) if spans else range(0)  # the line, and those between
        is_near = bool(spans) and len(added) < budget  # a line has at least one token
        if is_near and total + sum(map(cost, added)) <= budget // 2:  # the other half is for lines around
            total += sum(map(cost, added))
            spans[-1] = (spans[-1][0], line)
        else:
            total = cost(line)
            spans.append((line, line))
    if len(spans) > MOST_WINDOWS:
        raise PromptError(
            f"the text is longer than the model's context, and its holes are at {len(spans)} places far from each "
            f"other; fill at most {MOST_WINDOWS} at once"
        )
    ends = [-1, *(last for _, last in spans)]
    starts = [*(first for first, _ in spans), len(lines)]
    windows = []
    for number, (first, last) in enumerate(spans):
        left = budget - sum(map(cost, range(first, last + 1)))
        grows = True
        while grows:  # by a line before and one after
            grows = False
            for line in (first - 1, last + 1):
                if ends[number] < line < starts[number + 1] and cost(line) <= left:
                    left -= cost(line)
                    first, last = min(first, line), max(last, line)
                    grows = True
        before: list[Pieces] = [["\n"]] if first else []  # a hole that begins a line needs a token to its left
        windows.append((range(first, last + 1), _joined(before + lines[first : last + 1])))
    return windows


def texts_around(pieces: Pieces, lines: range, hole_texts: Iterable[str]) -> tuple[str, str]:
    """The text before and after some lines, with a text in place of each hole."""
    texts = iter(hole_texts)
    filled = [with_texts(line, texts) for line in _lines(pieces)]
    return "".join(filled[: lines.start]), "".join(filled[lines.stop :])


def _lines(pieces: Pieces) -> list[Pieces]:
    """The pieces of each line, with its line end."""
    lines: list[Pieces] = [[]]
    for piece in pieces:
        if isinstance(piece, Hole):
            lines[-1].append(piece)
            continue
        *whole, rest = piece.split("\n")
        for text in whole:
            lines[-1].append(f"{text}\n")
            lines.append([])
        lines[-1].append(rest)
    return lines


def _joined(lines: list[Pieces]) -> Pieces:
    """The pieces of some lines, texts that follow each other as one."""
    joined: Pieces = []
    for _, pieces in groupby(chain.from_iterable(lines), key=type):
        run = list(pieces)
        joined += run if isinstance(run[0], Hole) else ["".join(map(str, run))]
    return joined
