"""What a terminal shows of decoding: the live view of `--watch`, tokens coloured by step, or just a progress bar."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.style import Style
from rich.text import Text
from torch import Tensor

from diffucoder.decoding.coder import OnStep
from diffucoder.decoding.requests import Request
from diffucoder.decoding.step import Sequence, Step
from diffucoder.errors import printable
from diffucoder.progress import progress as show_progress
from diffucoder.ramp import ramp
from diffucoder.tokenizer import PLACEHOLDER, Tokenizer

_NARROW = 60  # columns; with fewer the figures are left out
_LEGEND = Text.assemble(("█ first", f"not dim {ramp(0)}"), "  →  ", ("█ last", f"not dim {ramp(1)}"))


class CanvasView:
    """The generated part of one canvas row, as it is filled in."""

    def __init__(self, tokenizer: Tokenizer, masked: Tensor) -> None:
        """`masked` (T,) bool: which positions of the row were masked at the start."""
        self.tokenizer = tokenizer
        self.first = int(masked.int().argmax())
        self.wanted = int(masked.sum())
        self.step_of: dict[int, int] = {}  # position, from the first hole on, to the step that committed it
        self.tokens: list[int] = []
        self.passes = 0
        self.start = time.perf_counter()

    def update(self, step: Step) -> None:
        """Add what one step did; the row is the first of its canvas."""
        self.tokens = step.canvas[0, self.first :].tolist()
        for position in step.committed[0, self.first :].nonzero()[:, 0].tolist():
            self.step_of[position] = step.index
        if step.revoked is not None:
            for position in step.revoked[0, self.first :].nonzero()[:, 0].tolist():
                self.step_of.pop(position, None)
        if step.resized is not None and step.places is not None:
            self.tokens = step.resized[0, self.first :].tolist()
            places = (step.places[0, self.first :] - self.first).tolist()
            known = [position for position, token in enumerate(self.tokens) if token != self.tokenizer.mask_id]
            self.step_of = {new: self.step_of[places[new]] for new in known if places[new] in self.step_of}
        self.passes = step.forward_passes

    def text(self) -> Text:
        """The canvas, masks as placeholders, nothing after the first terminator once it is known."""
        text = Text()
        tokens = self._answer()
        for position, (token, piece) in enumerate(zip(tokens, self.tokenizer.pieces(tokens), strict=True)):
            if token == self.tokenizer.mask_id:
                text.append(PLACEHOLDER, style="dim")
            elif token in self.tokenizer.terminator_ids:
                text.append("·", style="dim")  # an end, unless a mask before it becomes another
            elif token in self.tokenizer.special_ids:
                continue
            elif position in self.step_of:
                share = min(1.0, self.step_of[position] / max(self.passes - 1, 1))
                text.append(printable(piece), style=Style(color=ramp(share), bold=True))
            else:
                text.append(printable(piece))
        return text

    def _answer(self) -> list[int]:
        """The tokens up to the terminator, once nothing before it is masked."""
        for position, token in enumerate(self.tokens):
            if token == self.tokenizer.mask_id:
                break
            if token in self.tokenizer.terminator_ids:
                return self.tokens[:position]
        return self.tokens

    def render(self, console: Console, *, finish_reason: str | None = None) -> Group:
        """Canvas, progress bar and figures; a legend where there are colours."""
        panel = Panel(self.text(), title="canvas", border_style="dim")
        if console.color_system is not None and not console.no_color:
            panel.subtitle = _LEGEND
        done = len(self.step_of) if finish_reason is None else self.wanted
        bar = ProgressBar(total=max(1, self.wanted), completed=done, width=24)
        if console.width < _NARROW:
            return Group(panel, bar)
        seconds = time.perf_counter() - self.start
        written = 0
        for position, token in enumerate(self._answer()):
            written += position in self.step_of and token not in self.tokenizer.terminator_ids
        figures = f"{_counted(written, 'token')}, {_counted(self.passes, 'pass', 'passes')}, {seconds:.1f} s"
        if finish_reason is not None:
            figures += f", finish reason: {finish_reason}"
        return Group(panel, Columns([bar, Text(figures)]))


def _counted(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


@contextmanager
def watch(request: Request, tokenizer: Tokenizer, console: Console) -> Iterator[OnStep]:
    """Show the first row of a request while it is decoded: call the yielded function after each step."""
    view = CanvasView(tokenizer, request.canvas.masked[0, request.canvas.valid[0]])  # steps have no padding
    with Live(view.render(console), console=console, refresh_per_second=20) as live:

        def show(sequence: Sequence, step: Step) -> None:
            if sequence.row == 0:
                view.update(step)
                live.update(view.render(console, finish_reason=sequence.finish_reason))

        yield show


@contextmanager
def progress(requests: Iterable[Request], console: Console) -> Iterator[OnStep]:
    """Show a progress bar over the tokens of all rows of `requests`, and remove it at the end."""
    total = sum(int(request.canvas.masked.sum()) for request in requests)
    done = 0
    with show_progress("decoding", total, unit="token", transient=True, console=console) as update:

        def show(_: Sequence, step: Step) -> None:
            nonlocal done
            done += int(step.committed.sum())
            if step.revoked is not None:
                done -= int(step.revoked.sum())
            update(done)

        yield show
