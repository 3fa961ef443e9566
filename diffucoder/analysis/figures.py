"""Drawings of a report on order, by matplotlib: AR-ness, temperature, the entropy sink, what comes first.

For: report.json's content to SVG and PNG. Bands and bars are the intervals over prompts.
"""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no window, no state

from diffucoder.analysis.runs import GLOBAL, LOCAL
from diffucoder.analysis.tokens import CLASSES
from diffucoder.files import Json, write_text

_INK = "#1c2430"  # in the page: whatever colour the text has
_INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
_TEMPERED = ("local_ar_ness@1", "global_ar_ness@1", "pass@1", "pass@10", "distinct")
_POSITION = "position after the prompt"

_Line = tuple[str, Sequence[float], Sequence[Json]]  # label, x, and mean, low and high at each x
_Panel = tuple[str, str, Sequence[_Line]]  # names of x and y, lines


def draw(report: Json, folder: Path) -> dict[str, str]:
    """Write each figure as NAME.svg and NAME.png. Return their SVG by name, ready for a page."""
    style: dict[Any, Any] = dict.fromkeys(_INKED, _INK)  # Any: matplotlib lists every name there is
    style |= {"svg.hashsalt": "diffucoder", "svg.fonttype": "none", "font.size": 9}  # the same drawing, the same bytes
    style["text.parse_math"] = False  # the name of a model may have dollars
    drawings = {}
    with matplotlib.rc_context(style):
        for name, figure in _figures(report["runs"]).items():
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None})
            svg = text.getvalue()
            write_text(folder / f"{name}.svg", svg)
            (folder / f"{name}.png").unlink(missing_ok=True)  # a link could lead to any file
            figure.savefig(folder / f"{name}.png", dpi=150, metadata={"Software": None})
            inline = svg[svg.index("<svg") :]
            drawings[name] = inline.replace(_INK, "currentColor").replace("fill: #ffffff", "fill: none")
    return drawings


def _figures(runs: Sequence[Json]) -> dict[str, Figure]:
    local_lines: list[_Line] = []
    global_lines: list[_Line] = []
    pass_at_k: list[_Line] = []
    sinks: dict[str, _Line] = {}
    ranks: list[_Line] = []
    for run in runs:
        local_lines.append(_line_over(LOCAL, "local_ar_ness@{}", run))
        global_lines.append(_line_over(GLOBAL, "global_ar_ness@{}", run))
        if "pass@2" in run["figures"]:
            pass_at_k.append(_line_over(range(1, len(run["figures"])), "pass@{}", run))
        by_position = run["first_pass_entropy_by_position"]
        if by_position:
            # of each model the first run: before the first pass nothing is decided, so settings change nothing
            model = run["settings"].get("model", "")
            sinks.setdefault(model, (model, range(len(by_position)), by_position))
        ranks.append((run["label"], range(len(run["rank_by_position"])), run["rank_by_position"]))
    figures = {"ar_ness": _panels([("k", "local AR-ness@k", local_lines), ("k", "global AR-ness@k", global_lines)])}
    for axes, ks in zip(figures["ar_ness"].axes, (LOCAL, GLOBAL), strict=True):
        axes.set(ylim=(-0.02, 1.02), xticks=list(ks))
    if len({run["settings"].get("temperature") for run in runs}) > 1:
        figures["temperature"] = _panels(_by_temperature(runs))
    if pass_at_k:
        figures["pass_at_k"] = _panels([("samples, k", "pass@k", pass_at_k)])
    if sinks:
        figures["sink"] = _panels([(_POSITION, "entropy at the first pass (nats)", list(sinks.values()))])
    figures["classes"] = _classes(runs)
    figures["positions"] = _panels([(_POSITION, "when committed (0 first, 1 last)", ranks)])
    return figures


def _line_over(ks: Iterable[int], name: str, run: Json) -> _Line:
    """Return the figures of a run that `name` means with k in it, for those `ks` that it has."""
    x = [k for k in ks if name.format(k) in run["figures"]]
    return run["label"], x, [run["figures"][name.format(k)] for k in x]


def _by_temperature(runs: Sequence[Json]) -> list[_Panel]:
    """Return figures against temperature: a line for the runs that are alike in all else."""
    groups: dict[str, list[Json]] = {}
    for run in runs:
        groups.setdefault(str(run["settings"] | {"temperature": None}), []).append(run)
    panels: list[_Panel] = []
    for name in _TEMPERED:
        lines: list[_Line] = []
        for group in groups.values():
            having = [run for run in group if name in run["figures"] and run["settings"].get("temperature") is not None]
            having.sort(key=lambda run: run["settings"]["temperature"])
            if having:
                x = [run["settings"]["temperature"] for run in having]
                label = having[0]["label"].replace(f"temperature {x[0]}", "").strip(", ")
                lines.append((label, x, [run["figures"][name] for run in having]))
        if lines:
            panels.append(("temperature", name.replace("_ar_ness", " AR-ness"), lines))
    return panels


def _panels(panels: Sequence[_Panel]) -> Figure:
    """Draw lines through the means, within their intervals; where there are none a line breaks."""
    figure = Figure(figsize=(4.6 * len(panels), 3.4), layout="constrained")
    for number, (x_name, y_name, lines) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        for label, x, rows in lines:
            mean, low, high = _bounds(rows)
            [line] = axes.plot(x, mean, marker="o" if len(x) < 20 else "", markersize=3, linewidth=1.2, label=label)
            axes.fill_between(x, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
        axes.set(xlabel=x_name, ylabel=y_name)
        _decorate(axes, with_legend=number == 1 and any(label for label, _, _ in lines))
    return figure


def _classes(runs: Sequence[Json]) -> Figure:
    """Draw when tokens of each class are committed: a dot with its interval for each run."""
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    labels: dict[str, str] = {}
    for kind in CLASSES:
        count = sum(run["tokens_of_class"][kind] for run in runs)
        if count:
            labels[kind] = f"{kind}\n{count:,} tokens"
    for number, run in enumerate(runs):
        rows: list[Json] = []
        heights: list[float] = []
        for place, kind in enumerate(labels):
            if f"rank_{kind}" in run["figures"]:
                rows.append(run["figures"][f"rank_{kind}"])
                heights.append(place + 0.6 * (number + 0.5) / len(runs) - 0.3)
        mean, low, high = _bounds(rows)
        bars = [mean - low, high - mean]
        axes.errorbar(mean, heights, xerr=bars, fmt="o", markersize=4, linewidth=1, label=run["label"])
    axes.set(xlabel="when committed (0 first, 1 last)", xlim=(0, 1))
    axes.set(yticks=range(len(labels)), yticklabels=list(labels.values()))
    axes.invert_yaxis()
    _decorate(axes, with_legend=True)
    return figure


def _bounds(rows: Sequence[Json]) -> np.ndarray:
    """Return (3, N): mean, low and high; nan where there are none."""
    bounds = [(row["mean"], row["low"], row["high"]) for row in rows]
    return np.array(bounds, dtype=float).reshape(-1, 3).T  # None becomes nan


def _decorate(axes: Axes, *, with_legend: bool) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if with_legend:
        axes.legend(frameon=False, fontsize=8)
