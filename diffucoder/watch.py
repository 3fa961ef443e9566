"""Decoding in a terminal: the live view of `--watch`, with tokens coloured by step, or a progress bar."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.color import Color
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.style import Style
from rich.table import Table
from rich.text import Text
from torch import Tensor

from diffucoder.decoding.coder import OnStep
from diffucoder.decoding.colours import colour_of
from diffucoder.decoding.requests import Request
from diffucoder.decoding.step import Sequence, Step
from diffucoder.errors import printable
from diffucoder.progress import progress as show_progress
from diffucoder.tokenizer import PLACEHOLDER, Tokenizer


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
        """Add a step, whose first row is this one."""
        self.tokens = step.canvas[0, self.first :].tolist()
        self.step_of |= dict.fromkeys(step.committed[0, self.first :].nonzero()[:, 0].tolist(), step.index)
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
        """Return the canvas with placeholders for masks, up to the first terminator if there is one."""
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
                style = _style(self.step_of[position], self.passes)
                text.append(printable(piece), style=style)
            else:
                text.append(printable(piece))
        return text

    def _answer(self) -> list[int]:
        """Return the tokens before the terminator if nothing before it is masked, else all."""
        for position, token in enumerate(self.tokens):
            if token == self.tokenizer.mask_id:
                break
            if token in self.tokenizer.terminator_ids:
                return self.tokens[:position]
        return self.tokens

    def render(self, *, finished: bool = False) -> Group:
        seconds = time.perf_counter() - self.start
        written = 0
        for position, token in enumerate(self._answer()):
            written += position in self.step_of and token not in self.tokenizer.terminator_ids
        figures = (
            f"{written} tokens in {self.passes} forward passes · {seconds:.1f} s · "
            f"{written / max(seconds, 1e-9):.0f} tokens/s"
        )
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(width=24)
        grid.add_column()
        done = self.wanted if finished else len(self.step_of)
        grid.add_row(ProgressBar(total=max(1, self.wanted), completed=done, width=24), figures)
        legend = Text.assemble(("█ first", _style(0, 2)), "  →  ", ("█ last", _style(1, 2)))
        return Group(Panel(self.text(), title="canvas", subtitle=legend, border_style="dim"), grid)


@contextmanager
def watch(request: Request, tokenizer: Tokenizer, console: Console) -> Iterator[OnStep]:
    """Show the first row of a request while it is decoded: call the yielded function after each step."""
    view = CanvasView(tokenizer, request.canvas.masked[0])
    with Live(console=console, refresh_per_second=20, transient=False) as live:

        def show(sequence: Sequence, step: Step) -> None:
            if sequence.row == 0:
                view.update(step)
                live.update(view.render())

        yield show
        live.update(view.render(finished=True))


@contextmanager
def progress(requests: Iterable[Request], console: Console) -> Iterator[OnStep]:
    """Show a progress bar over the tokens of all rows of `requests`, which goes away at the end."""
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


def _style(step: int, steps: int) -> Style:
    """The colour of a step, which is one of `steps`."""
    return Style(color=Color.from_rgb(*colour_of(step, steps)))
