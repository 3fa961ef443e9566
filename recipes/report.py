"""What reports of laboratories and benchmarks share: sections of a page, tables, figures, intervals.

Imports nothing of the package, so that a benchmark can measure another version of it.
"""

import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def update_page(path: Path, sections: Mapping[str, str]) -> None:
    """Put each section between the comments `<!-- name -->` and `<!-- /name -->` of a page, or at its end."""
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    for name, content in sections.items():
        begin = f"<!-- {name} -->"
        end = f"<!-- /{name} -->"
        section = f"{begin}\n{content}\n{end}"
        if begin in page:
            before, _, rest = page.partition(begin)
            page = before + section + rest.partition(end)[2]
        else:
            page += section + "\n\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    print("\n\n".join([*sections.values(), f"written to {path}"]))


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table: the first column to the left, all others to the right."""
    lines: list[str] = []
    for cells in (head, ["---", *["--:"] * (len(head) - 1)], *rows):
        texts = [str(cell).replace("|", r"\|") for cell in cells]
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines)


def provenance(command: str, *details: str) -> str:
    """The command, the day, what it ran on, and further details."""
    software = f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}"
    return "; ".join([f"`{command}`, {time.strftime('%Y-%m-%d')}", *details, f"{software}."])


@contextmanager
def drawing(path: Path, size: tuple[float, float] = (7, 4)) -> Iterator[Any]:
    """Yield matplotlib axes, then save them as SVG; the same drawing gives the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "diffucoder"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=size)
    yield axes
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)
