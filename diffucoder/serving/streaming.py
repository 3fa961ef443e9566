"""What of an answer is settled: the text that no later step can change, from the left.

For: streams to clients that know only growing text. Not for: what was committed elsewhere (the `denoise` events).
"""

from diffucoder.decoding.canvas import leftmost
from diffucoder.decoding.denoise import Step
from diffucoder.decoding.generate import Request, before_stops
from diffucoder.tokenizer import Tokenizer


class Settling:
    """The settled text of one row, given out piece by piece."""

    def __init__(self, tokenizer: Tokenizer, request: Request, row: int) -> None:
        """`row` of the request's canvas; revocable policies settle nothing before their end."""
        self.tokenizer, self.stops = tokenizer, request.params.stop
        self.mask_id = request.canvas.mask_id
        self.first = int(leftmost(request.canvas.masked[row, request.canvas.valid[row]][None]))
        self.last = int(request.canvas.masked[row].sum())  # a hole's text ends there, whatever stands behind it
        self.final = not request.params.revoke
        self.sent = ""

    def add(self, step: Step) -> str:
        """The text that this step has settled beyond what was given out before."""
        if not self.final:
            return ""
        tokens = step.canvas[0, self.first : self.first + self.last].tolist()
        ends = {self.mask_id, *self.tokenizer.terminator_ids}
        settled = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
        text = self.tokenizer.decode(tokens[:settled]).rstrip("\ufffd")  # half a character
        text = before_stops(text, self.stops)
        text = text[: len(text) - self._pending(text)]
        if not text.startswith(self.sent):
            return ""
        fresh, self.sent = text[len(self.sent) :], text
        return fresh

    def _pending(self, text: str) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        ends = range(min(longest, len(text)), 0, -1)
        return next((n for n in ends if any(stop.startswith(text[-n:]) for stop in self.stops)), 0)
