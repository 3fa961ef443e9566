"""What a terminal shows of decoding: the live view of `--watch`, tokens coloured by step, or just a progress bar.

For: rendering Steps with rich, on a terminal or into a recording. Not for: generating (`decoding`), options (`cli`).
"""

import time
from collections.abc import Iterable, Iterator

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

from diffucoder.decoding.denoise import Step
from diffucoder.tokenizer import PLACEHOLDER, Tokenizer

_EARLY, _LATE = (86, 156, 255), (255, 166, 77)  # blue for the first step, orange for the last


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
        self.began = time.perf_counter()

    def update(self, step: Step, row: int = 0) -> None:
        """Take in what one step did."""
        self.tokens = step.canvas[row, self.first :].tolist()
        for position in step.committed[row, self.first :].nonzero()[:, 0].tolist():
            self.committed_by[position] = step.index
        self.passes = step.forward_passes

    @property
    def committed(self) -> int:
        """How many positions are decided."""
        return sum(step >= 0 for step in self.committed_by)

    def text(self) -> Text:
        """The canvas, masks as placeholders, nothing behind the first terminator once it is known."""
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
        shown = list(zip(self.tokens, self.committed_by, strict=True)) if self.tokens else []
        for i, (token, _) in enumerate(shown):
            if token == self.tokenizer.mask_id:
                break
            if token in self.tokenizer.terminator_ids:
                return shown[:i]
        return shown

    def render(self, *, finished: bool = False) -> Group:
        """Canvas, progress bar and figures."""
        seconds = time.perf_counter() - self.began
        written = sum(step >= 0 and token not in self.tokenizer.terminator_ids for token, step in self._shown())
        figures = (
            f"{self.passes} forward passes · {written / max(1, self.passes):.2f} tokens per pass · "
            f"{written / max(seconds, 1e-9):.0f} tokens/s"
        )
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(width=24)
        grid.add_column(justify="left")
        done = self.wanted if finished else self.committed
        grid.add_row(ProgressBar(total=max(1, self.wanted), completed=done, width=24), figures)
        first, last = Style(color=_shade(0.0)), Style(color=_shade(1.0))
        legend = Text.assemble(("█ first", first), "  →  ", ("█ last", last))
        return Group(Panel(self.text(), title="canvas", subtitle=legend, border_style="dim"), grid)


def watch(steps: Iterable[Step], view: CanvasView, console: Console) -> Iterator[Step]:
    """Pass `steps` on, drawing each as it happens."""
    with Live(console=console, refresh_per_second=20, transient=False) as live:
        for step in steps:
            view.update(step)
            live.update(view.render())
            yield step
        live.update(view.render(finished=True))


def progress(steps: Iterable[Step], wanted: int, console: Console) -> Iterator[Step]:
    """Pass `steps` on beside a progress bar over the `wanted` tokens of all rows, which goes away at the end."""
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("decoding", total=wanted)
        for step in steps:
            bar.advance(task, int(step.committed.sum()))
            yield step


def _shade(share: float) -> Color:
    share = min(1.0, max(0.0, share))
    return Color.from_rgb(*(early + (late - early) * share for early, late in zip(_EARLY, _LATE, strict=True)))
