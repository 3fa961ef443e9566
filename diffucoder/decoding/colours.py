"""The colour of each step, from blue for the first to orange for the last, in terminals and notebooks.

`data/canvas/canvas.js` has the same for pages.
"""

import html
from collections.abc import Iterable

_BLUE = (86, 156, 255)
_ORANGE = (255, 166, 77)


def colour_of(step: int, steps: int) -> tuple[int, int, int]:
    """Red, green and blue of one of `steps` steps, counted from 0."""
    share = min(1.0, step / max(steps - 1, 1))
    red, green, blue = (round(early + (late - early) * share) for early, late in zip(_BLUE, _ORANGE, strict=True))
    return red, green, blue


def as_html(pieces: Iterable[str], steps: Iterable[int], count: int) -> str:
    """The text of some tokens, each on the colour of its step out of `count`; a step of -1 has none."""
    spans = []
    for piece, step in zip(pieces, steps, strict=True):
        text = html.escape(piece)
        if step >= 0:
            red, green, blue = colour_of(step, count)
            text = f'<span title="step {step + 1}" style="background: rgb({red} {green} {blue} / 45%)">{text}</span>'
        spans.append(text)
    return f"<pre>{''.join(spans)}</pre>"
