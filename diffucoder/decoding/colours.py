"""The text of a result for notebooks, each token on the colour of its step."""

import html

from diffucoder.decoding.trace import Trace
from diffucoder.ramp import ramp
from diffucoder.tokenizer import Tokenizer


def as_html(trace: Trace, tokenizer: Tokenizer) -> str:
    """The text from the first hole on, each token on the colour of the step that committed it."""
    spans = []
    tokens = trace.tokens[trace.prompt_length :]
    for token, piece, step in zip(tokens, tokenizer.pieces(tokens), trace.steps, strict=True):
        text = html.escape(piece)
        if step >= 0:
            colour = ramp(min(1.0, step / max(trace.forward_passes - 1, 1)))
            text = f'<span title="step {step + 1}" style="background: {colour}73">{text}</span>'
        if token not in tokenizer.special_ids:
            spans.append(text)
    return f"<pre>{''.join(spans)}</pre>"
