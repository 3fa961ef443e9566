"""What a terminal shows of decoding: the live view of `--watch`, tokens coloured by step, or just a progress bar.

For: rendering Steps with rich, on a terminal or into a recording. Not for: generating (`decoding`), options (`cli`).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.color import Color
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import Progress
from rich.progress_bar import ProgressBar
from rich.style import Style
from rich.table import Table
from rich.text import Text
from torch import Tensor

from diffucoder.decoding.coder import OnStep
from diffucoder.decoding.requests import Request
from diffucoder.decoding.step import Sequence, Step
from diffucoder.tokenizer import PLACEHOLDER, Tokenizer

_EARLY = (86, 156, 255)  # blue for the first step
_LATE = (255, 166, 77)  # orange for the last


class CanvasView:
    """The generated part of one canvas row, as it is filled in."""

    def __init__(self, tokenizer: Tokenizer, masked: Tensor) -> None:
        """`masked` (T,) bool: which positions of the row were masked at the start."""
        self.tokenizer = tokenizer
        self.first = int(masked.int().argmax())
        self.wanted = int(masked.sum())
        self.committed_by = [-1] * (len(masked) - self.first)  # step of each position from the first hole on
        self.tokens: list[int] = []
        self.passes = 0
        self.start = time.perf_counter()

    def update(self, step: Step) -> None:
        """Add what one step did; the row is the first of its canvas."""
        self.tokens = step.canvas[0, self.first :].tolist()
        for position in step.committed[0, self.first :].nonzero()[:, 0].tolist():
            self.committed_by[position] = step.index
        self.passes = step.forward_passes

    @property
    def committed(self) -> int:
        """How many positions are decided."""
        return len(self.committed_by) - self.committed_by.count(-1)

    def text(self) -> Text:
        """The canvas, masks as placeholders, nothing after the first terminator once it is known."""
        text = Text()
        last = max(self.passes - 1, 1)
        for token, step in self._shown():
            if token == self.tokenizer.mask_id:
                text.append(PLACEHOLDER, style="dim")
            elif token in self.tokenizer.terminator_ids:
                text.append("·", style="dim")  # an end, unless a mask before it becomes another
            else:
                style = Style(color=_shade(step / last)) if step >= 0 else Style()
                text.append(self.tokenizer.decode([token]), style=style)
        return text

    def _shown(self) -> list[tuple[int, int]]:
        """Tokens and the steps that committed them, up to the terminator once nothing before it is masked."""
        shown = list(zip(self.tokens, self.committed_by, strict=False))
        for index, (token, _) in enumerate(shown):
            if token == self.tokenizer.mask_id:
                break
            if token in self.tokenizer.terminator_ids:
                return shown[:index]
        return shown

    def render(self, *, finished: bool = False) -> Group:
        """Canvas, progress bar and figures."""
        seconds = time.perf_counter() - self.start
        written = 0
        for token, step in self._shown():
            written += step >= 0 and token not in self.tokenizer.terminator_ids
        figures = (
            f"{self.passes} forward passes · {written / max(1, self.passes):.2f} tokens per pass · "
            f"{written / max(seconds, 1e-9):.0f} tokens/s"
        )
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(width=24)
        grid.add_column(justify="left")
        done = self.wanted if finished else self.committed
        grid.add_row(ProgressBar(total=max(1, self.wanted), completed=done, width=24), figures)
        legend = Text.assemble(("█ first", Style(color=_shade(0))), "  →  ", ("█ last", Style(color=_shade(1))))
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
def progress(request: Request, console: Console) -> Iterator[OnStep]:
    """Show a progress bar over the tokens of all rows of a request, which goes away at the end."""
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("decoding", total=int(request.canvas.masked.sum()))
        yield lambda _, step: bar.advance(task, int(step.committed.sum()))


def _shade(share: float) -> Color:
    """The colour of a step, which is at this share of all steps."""
    share = min(1.0, max(0.0, share))
    red, green, blue = (early + (late - early) * share for early, late in zip(_EARLY, _LATE, strict=True))
    return Color.from_rgb(red, green, blue)
