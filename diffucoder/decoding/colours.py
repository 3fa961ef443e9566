"""The colour of each step, from blue for the first to orange for the last, in terminals and notebooks.

`data/canvas/canvas.js` has the same for pages.
"""

import html

from diffucoder.decoding.trace import Trace
from diffucoder.tokenizer import Tokenizer

_BLUE = (86, 156, 255)
_ORANGE = (255, 166, 77)


def colour_of(step: int, steps: int) -> tuple[int, int, int]:
    """Red, green and blue of one of `steps` steps, counted from 0."""
    share = min(1.0, step / max(steps - 1, 1))
    red, green, blue = (round(early + (late - early) * share) for early, late in zip(_BLUE, _ORANGE, strict=True))
    return red, green, blue


def as_html(trace: Trace, tokenizer: Tokenizer) -> str:
    """The text from the first hole on, each token on the colour of the step that committed it."""
    spans = []
    tokens = trace.tokens[trace.prompt_length :]
    for token, piece, step in zip(tokens, tokenizer.pieces(tokens), trace.steps, strict=True):
        text = html.escape(piece)
        if step >= 0:
            red, green, blue = colour_of(step, trace.forward_passes)
            text = f'<span title="step {step + 1}" style="background: rgb({red} {green} {blue} / 45%)">{text}</span>'
        if token not in tokenizer.special_ids:
            spans.append(text)
    return f"<pre>{''.join(spans)}</pre>"
