"""How far a piece of work is, on standard error: a bar on a terminal, elsewhere a line every few seconds."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def progress(
    heading: str, total: int, *, done: int = 0, unit: str = "", transient: bool = False, console: Console | None = None
) -> Iterator[Callable[..., None]]:
    """Show `total` steps, of which `done` were done earlier: call what is yielded with `done`, and figures to show."""
    console = console or Console(stderr=True)
    first = done
    start = printed = time.monotonic()

    def state(done: int, figures: str = "") -> str:
        """Such as "step 22/60, loss 2.31, 38 s left"."""
        parts = [f"{unit} {done}/{total}".strip(), figures]
        if first < done < total:
            seconds = (time.monotonic() - start) * (total - done) / (done - first)
            parts.append(f"{seconds:.0f} s left" if seconds < 120 else f"{seconds / 60:.0f} min left")
        return ", ".join(filter(None, parts))

    def print_line(done: int, figures: str = "") -> None:
        nonlocal printed
        if time.monotonic() - printed >= SECONDS_BETWEEN_LINES:
            printed = time.monotonic()
            console.print(f"{heading}: {state(done, figures)}", markup=False, highlight=False, soft_wrap=True)

    if not console.is_terminal:
        yield print_line
        return
    heading_column = TextColumn("{task.description}", markup=False)
    state_column = TextColumn("{task.fields[state]}", markup=False)
    with Progress(heading_column, BarColumn(), state_column, console=console, transient=transient) as bar:
        task = bar.add_task(heading, total=total, completed=done, state=state(done))
        yield lambda done, figures="": bar.update(task, completed=done, state=state(done, figures))
