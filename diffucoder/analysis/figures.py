"""Drawings of a report on order, by matplotlib: AR-ness, temperature, the entropy sink, what comes first.

For: report.json's content to SVG and PNG. Not for: the numbers (`order`), or the page (`report`). Bands and bars are
the intervals over prompts.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
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


def draw(report: Json, folder: Path) -> dict[str, str]:
    """Write each figure as NAME.svg and NAME.png. Return their SVG by name, ready for a page."""
    style: dict[Any, Any] = dict.fromkeys(_INKED, _INK)  # Any: matplotlib lists every name there is
    style |= {"svg.hashsalt": "diffucoder", "svg.fonttype": "none", "font.size": 9}  # the same drawing, the same bytes
    drawings = {}
    with matplotlib.rc_context(style):
        for name, figure in _figures(report["runs"]).items():
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None})
            svg = text.getvalue()
            write_text(folder / f"{name}.svg", svg)
            figure.savefig(folder / f"{name}.png", dpi=150, metadata={"Software": None})
            inline = svg[svg.index("<svg") :]
            drawings[name] = inline.replace(_INK, "currentColor").replace("fill: #ffffff", "fill: none")
    return drawings


def _figures(runs: Sequence[Json]) -> dict[str, Figure]:
    figures = {"ar_ness": _ar_ness(runs)}
    if len({run["settings"].get("temperature") for run in runs}) > 1:
        figures["temperature"] = _temperature(runs)
    pass_at_k: list[_Line] = []
    sinks: dict[str, _Line] = {}
    ranks: list[_Line] = []
    for run in runs:
        label = run["label"]
        if "pass@2" in run["figures"]:
            pass_at_k.append((label, _rows(run, "pass@{}", range(1, len(run["figures"])))))
        if run["first_pass_entropy_by_position"]:
            # of each model the first run: before the first pass nothing is decided, so settings change nothing
            model = run["settings"].get("model", "")
            sinks.setdefault(model, (model, run["first_pass_entropy_by_position"]))
        ranks.append((label, run["rank_by_position"]))
    if pass_at_k:
        figures["pass_at_k"] = _curves("samples, k", "pass@k", pass_at_k, start=1)
    if sinks:
        figures["sink"] = _curves(_POSITION, "entropy at the first pass (nats)", sinks.values(), start=0)
    figures["classes"] = _classes(runs)
    figures["positions"] = _curves(_POSITION, "when committed (0 first, 1 last)", ranks, start=0)
    return figures


_Line = tuple[str, Sequence[Mapping[str, Any]]]  # label, and mean, low and high at each x


def _new_figure(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.6 * count, 3.4), layout="constrained")
    axes = []
    for number in range(1, count + 1):
        axes.append(figure.add_subplot(1, count, number))
        axes[-1].grid(alpha=0.25)
        axes[-1].spines[["top", "right"]].set_visible(False)
    return figure, axes


def _band(axes: Axes, x: Sequence[float], rows: Sequence[Mapping[str, Any]], label: str) -> None:
    """Draw a line through the means, within their intervals; where there are none the line breaks."""
    bounds = [(row["mean"], row["low"], row["high"]) for row in rows]
    mean, low, high = np.array(bounds, dtype=float).reshape(-1, 3).T  # None becomes nan
    [line] = axes.plot(x, mean, marker="o" if len(x) < 20 else "", markersize=3, linewidth=1.2, label=label)
    axes.fill_between(x, low, high, alpha=0.15, color=line.get_color(), linewidth=0)


def _rows(run: Json, name: str, ks: Iterable[int]) -> list[Json]:
    """Return the figures of a run that `name` means, with k in it, for those `ks` that it has."""
    rows = []
    for k in ks:
        if name.format(k) in run["figures"]:
            rows.append(run["figures"][name.format(k)])
    return rows


def _ar_ness(runs: Sequence[Json]) -> Figure:
    figure, axes = _new_figure(2)
    for panel, name, ks in zip(axes, ("local", "global"), (LOCAL, GLOBAL), strict=True):
        for run in runs:
            _band(panel, ks, _rows(run, name + "_ar_ness@{}", ks), run["label"])
        panel.set(xlabel="k", ylabel=f"{name} AR-ness@k", ylim=(-0.02, 1.02), xticks=list(ks))
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def _temperature(runs: Sequence[Json]) -> Figure:
    """Draw figures against temperature: a line for the runs that are alike in all else."""
    groups: dict[str, list[Json]] = {}
    for run in runs:
        groups.setdefault(str(run["settings"] | {"temperature": None}), []).append(run)
    names = [name for name in _TEMPERED if any(name in run["figures"] for run in runs)]
    figure, axes = _new_figure(len(names))
    for panel, name in zip(axes, names, strict=True):
        for group in groups.values():
            x: list[float] = []
            rows: list[Json] = []
            label = ""
            for run in sorted(group, key=lambda run: run["settings"]["temperature"]):
                if name in run["figures"]:
                    x.append(run["settings"]["temperature"])
                    rows.append(run["figures"][name])
                    label = label or run["label"].replace(f"temperature {x[0]}", "").strip(", ")
            _band(panel, x, rows, label)
        panel.set(xlabel="temperature", ylabel=name.replace("_ar_ness", " AR-ness"))
    if len(groups) > 1:
        axes[0].legend(frameon=False, fontsize=8)
    return figure


def _curves(x: str, y: str, lines: Iterable[_Line], *, start: int) -> Figure:
    figure, [axes] = _new_figure(1)
    for label, rows in lines:
        _band(axes, range(start, start + len(rows)), rows, label)
    axes.set(xlabel=x, ylabel=y)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _classes(runs: Sequence[Json]) -> Figure:
    """When tokens of each class are committed: a dot with its interval for each run."""
    figure, [axes] = _new_figure(1)
    labels: dict[str, str] = {}
    for kind in CLASSES:
        count = sum(run["tokens_of_class"][kind] for run in runs)
        if count:
            labels[kind] = f"{kind}\n{count:,} tokens"
    for number, run in enumerate(runs):
        means: list[float] = []
        below: list[float] = []
        above: list[float] = []
        heights: list[float] = []
        for place, kind in enumerate(labels):
            rank = run["figures"].get(f"rank_{kind}")
            if rank is not None:
                means.append(rank["mean"])
                below.append(rank["mean"] - rank["low"])
                above.append(rank["high"] - rank["mean"])
                heights.append(place + 0.6 * (number + 0.5) / len(runs) - 0.3)
        axes.errorbar(means, heights, xerr=[below, above], fmt="o", markersize=4, linewidth=1, label=run["label"])
    axes.set(xlabel="when committed (0 first, 1 last)", xlim=(0, 1))
    axes.set(yticks=range(len(labels)), yticklabels=list(labels.values()))
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8)
    return figure
