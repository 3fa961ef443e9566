"""Drawings of a report on order, by matplotlib: AR-ness, temperature, the entropy sink, what comes first.

For: report.json's content to SVG and PNG. A run has one colour and one mark in all of them, as in the page's legend.
Bars and bands are intervals over prompts. A run of few prompts has points alone: a line would look like a trend.
"""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no window, no state

from diffucoder.analysis.runs import GLOBAL, LOCAL
from diffucoder.analysis.tokens import CLASSES
from diffucoder.files import Json, write_text
from diffucoder.ramp import ramp

FEW = 10  # prompts; with fewer no line is drawn
_INK = "#1c2430"  # in the page: whatever colour the text has
_INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
_POSITION = "position after the prompt"
_WHEN = "when committed (0 first, 1 last)"
_BY_TEMPERATURE = {  # title, axis, and the figures with full and with open marks
    "ar_ness": ("AR-ness@1 by temperature", "AR-ness@1", "local_ar_ness@1", "global_ar_ness@1"),
    "pass": ("pass@k by temperature", "pass@k", "pass@1", "pass@10"),
    "programs": ("Different programs by temperature", "different programs of a prompt", "distinct", ""),
}

# Of a line: number of its run, x, mean and interval at each x, and whether its marks are open
_Line = tuple[int, list[float], list[Json], bool]
_Point = tuple[float | None, Json | None]  # x, and mean and interval there


@dataclass(frozen=True)
class _Plot:
    """One drawing."""

    title: str
    x_name: str
    y_name: str
    lines: Sequence[_Line]
    is_share: bool = True  # from 0 to 1
    names: Sequence[str] = ()  # of the places on x, whose points are then not joined


def draw(report: Json, folder: Path) -> dict[str, Json]:
    """Write each drawing as NAME.svg and NAME.png. Return by name its title and, without title and legend, its SVG."""
    style: dict[Any, Any] = dict.fromkeys(_INKED, _INK)  # Any: matplotlib lists every name there is
    style |= {"svg.hashsalt": "diffucoder", "svg.fonttype": "none", "font.size": 9}  # the same drawing, the same bytes
    style["text.parse_math"] = False  # the name of a model may have dollars
    drawings = {}
    runs = report["runs"]
    with matplotlib.rc_context(style):
        for name, plot in _plots(runs).items():
            figure = Figure(figsize=(4, 3), layout="constrained")  # in the page 9 points are at least 11 pixels
            axes = figure.add_subplot(xlabel=plot.x_name, ylabel=plot.y_name)
            _draw_lines(axes, plot, runs)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            inline = _svg(figure).replace(_INK, "currentColor").replace("fill: #ffffff", "fill: none")
            drawings[name] = {"title": plot.title, "svg": inline[inline.index("<svg") :]}
            axes.set_title(plot.title)
            if len(runs) > 1:
                figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
            write_text(folder / f"{name}.svg", _svg(figure))
            (folder / f"{name}.png").unlink(missing_ok=True)  # a link could lead to any file
            figure.savefig(folder / f"{name}.png", dpi=150, metadata={"Software": None})
    return drawings


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _plots(runs: Sequence[Json]) -> dict[str, _Plot]:
    kinds = []
    names = []
    for kind in CLASSES:
        count = sum(run["tokens_of_class"][kind] for run in runs)
        if count:
            kinds.append(kind)
            names.append(f"{kind} ({count:,})")
    positions = _lines(enumerate(run["rank_by_position"]) for run in runs)
    local_lines = _by_number(runs, "local_ar_ness@", LOCAL)
    global_lines = _by_number(runs, "global_ar_ness@", GLOBAL)
    plots = {
        "ar_ness": _Plot("Local AR-ness@k", "k", "local AR-ness@k", local_lines),
        "global_ar_ness": _Plot("Global AR-ness@k", "k", "global AR-ness@k", global_lines),
        "positions": _Plot("When each position is committed", _POSITION, _WHEN, positions),
        "classes": _Plot(
            "When each kind of token is committed", "", _WHEN, _by_number(runs, "rank_", kinds), names=names
        ),
    }
    # Before the first pass nothing is decided, so settings change nothing: of each model one run is drawn
    sinks = []
    drawn = set()
    for run in runs:
        model = run["settings"].get("model")
        entropies = [] if model in drawn else run["first_pass_entropy_by_position"]
        sinks.append(enumerate(entropies))
        if entropies:
            drawn.add(model)
    if drawn:
        plots["sink"] = _Plot(
            "Entropy before the first pass", _POSITION, "entropy (nats)", _lines(sinks), is_share=False
        )
    numbers = {int(name[5:]) for run in runs for name in run["figures"] if name.startswith("pass@")}
    passes = _by_number(runs, "pass@", sorted(numbers))
    if any(len(x) > 1 for _, x, _, _ in passes):
        plots["pass_at_k"] = _Plot("pass@k", "samples, k", "pass@k", passes)
    if len({run["settings"].get("temperature") for run in runs}) > 1:
        for name, (title, y_name, full, empty) in _BY_TEMPERATURE.items():
            lines = _by_temperature(runs, full) + _by_temperature(runs, empty, is_open=True)
            if lines:
                plots[f"temperature_{name}"] = _Plot(title, "temperature", y_name, lines, is_share=name != "programs")
    return plots


def _by_number(runs: Sequence[Json], prefix: str, ends: Sequence[object]) -> list[_Line]:
    """Return the lines of the figures whose names are `prefix` and one of `ends`, which are numbers, or counted."""
    lines = []
    for run in runs:
        points: list[_Point] = []
        for place, end in enumerate(ends):
            x = end if isinstance(end, int) else place
            points.append((x, run["figures"].get(f"{prefix}{end}")))
        lines.append(points)
    return _lines(lines)


def _by_temperature(runs: Sequence[Json], name: str, *, is_open: bool = False) -> list[_Line]:
    return _lines(([(run["settings"].get("temperature"), run["figures"].get(name))] for run in runs), is_open=is_open)


def _lines(runs: Iterable[Iterable[_Point]], *, is_open: bool = False) -> list[_Line]:
    """Return a line for each run that has points."""
    lines: list[_Line] = []
    for number, points in enumerate(runs):
        known = [(x, row) for x, row in points if x is not None and row is not None]
        if known:
            lines.append((number, [x for x, _ in known], [row for _, row in known], is_open))
    return lines


def _draw_lines(axes: Axes, plot: _Plot, runs: Sequence[Json]) -> None:
    """Draw means with their intervals; where there are none a line breaks."""
    every_x = [place for _, x, _, _ in plot.lines for place in x]
    width = min(0.3, 0.04 * float(np.ptp(every_x or [0])))  # of the runs beside each other, where x is the same
    for number, x, rows, is_open in plot.lines:
        mean, bars = _means(rows)
        look = _look(number, runs)
        if is_open:
            look |= {"markerfacecolor": "none", "label": ""}
        if len(x) > 1:
            axes.locator_params(axis="x", integer=True, nbins=10)
        if len(x) > 1 and not plot.names and runs[number]["prompts"] >= FEW:
            axes.fill_between(x, mean - bars[0], mean + bars[1], alpha=0.15, color=look["color"], linewidth=0)
            axes.errorbar(x, mean, markevery=len(x) // 12 + 1, **look | {"linestyle": "-"})
        else:
            beside = width * (number / max(len(runs) - 1, 1) - 0.5)
            axes.errorbar(np.array(x) + beside, mean, yerr=bars if len(x) < 100 else None, **look)
    if plot.names:
        axes.set_xticks(range(len(plot.names)), plot.names, rotation=35, ha="right", rotation_mode="anchor")
    if plot.is_share:
        axes.set_ylim(-0.03, 1.03)
    else:
        axes.set_ylim(bottom=0)


def _look(number: int, runs: Sequence[Json]) -> Json:
    """Return colour, mark and label of a run, as matplotlib names them."""
    look: Json = {"color": ramp(number / max(len(runs) - 1, 1)), "label": runs[number]["label"], "linestyle": ""}
    return look | {"marker": "osD^v"[number % 5], "markersize": 3.5, "elinewidth": 0.8}  # in the page ●■◆▲▼


def _means(rows: Sequence[Json]) -> tuple[np.ndarray, np.ndarray]:
    """Return (N,) means and (2, N) how far their intervals reach down and up; nan where there are none."""
    bounds = [(row["mean"], row["low"], row["high"]) for row in rows]
    mean, low, high = np.array(bounds, dtype=float).reshape(-1, 3).T  # None becomes nan
    return mean, np.maximum([mean - low, high - mean], 0)  # a mean may be outside its bootstrap interval
