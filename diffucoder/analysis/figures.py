"""Figures of a report on order, as matplotlib draws them: AR-ness, temperature, the entropy sink, what comes first.

For: report.json's content to SVG and PNG. Not for: the figures' numbers (`order`), or the page (`report`).
Bands and bars are the intervals over prompts.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no window, no state

from diffucoder.analysis.order import CLASSES, GLOBAL, LOCAL, Json

_INK = "#1c2430"  # in the page: whatever colour the text has
_TEMPERED = ("local_ar_ness@1", "global_ar_ness@1", "pass@1", "pass@10", "distinct")


def draw(told: Json, folder: Path) -> dict[str, str]:
    """Write each figure as NAME.svg and NAME.png; their SVG by name, to stand in a page."""
    drawn: dict[str, str] = {}
    coloured = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = dict.fromkeys(coloured, _INK)  # Any: matplotlib lists every name there is
    style |= {"svg.hashsalt": "diffucoder", "svg.fonttype": "none", "font.size": 9}  # the same drawing, the same bytes
    with matplotlib.rc_context(style):
        for name, figure in _figures(told):
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None})
            (folder / f"{name}.svg").write_text(text.getvalue(), encoding="utf-8")
            figure.savefig(folder / f"{name}.png", dpi=150, metadata={"Software": None})
            inline = text.getvalue()[text.getvalue().index("<svg") :]
            drawn[name] = inline.replace(_INK, "currentColor").replace("fill: #ffffff", "fill: none")
    return drawn


def _figures(told: Json) -> list[tuple[str, Figure]]:
    runs = told["runs"]
    made = [("ar_ness", _ar_ness(runs))]
    if len({run["settings"].get("temperature") for run in runs}) > 1:
        made.append(("temperature", _temperature(runs)))
    most = [run for run in runs if "pass@2" in run["figures"]]
    if most:
        made.append(("pass_at_k", _curves("samples, k", "pass@k", most, _pass_at_k)))
    sinks = _one_each(runs)
    if sinks:
        label, what = "position behind the prompt", "entropy at the first pass (nats)"
        made.append(("sink", _curves(label, what, sinks, lambda run: run["first_pass_entropy_by_position"], start=0)))
    made.append(("classes", _classes(runs)))
    label = "position behind the prompt"
    made.append(("positions", _curves(label, "when committed (0 first, 1 last)", runs, _ranks, start=0)))
    return made


def _axes(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.6 * count, 3.4), layout="constrained")
    axes = [figure.add_subplot(1, count, at + 1) for at in range(count)]
    for each in axes:
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _band(axes: Axes, x: Sequence[float], rows: Sequence[Mapping[str, Any]], label: str) -> None:
    """A line through the means, within their intervals; where there are none the line breaks."""
    mean, low, high = ([row[key] if row[key] is not None else float("nan") for row in rows] for key in _BOUNDS)
    [line] = axes.plot(x, mean, marker="o" if len(x) < 20 else "", markersize=3, linewidth=1.2, label=label)
    axes.fill_between(x, low, high, alpha=0.15, color=line.get_color(), linewidth=0)


_BOUNDS = ("mean", "low", "high")


def _ar_ness(runs: Sequence[Json]) -> Figure:
    figure, axes = _axes(2)
    for each, name, ks in zip(axes, ("local", "global"), (LOCAL, GLOBAL), strict=True):
        for run in runs:
            _band(each, list(ks), [run["figures"][f"{name}_ar_ness@{k}"] for k in ks], run["label"])
        each.set(xlabel="k", ylabel=f"{name} AR-ness@k", ylim=(-0.02, 1.02), xticks=list(ks))
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def _temperature(runs: Sequence[Json]) -> Figure:
    """Figures against temperature, a line for all that else is alike."""
    names = [name for name in _TEMPERED if any(name in run["figures"] for run in runs)]
    figure, axes = _axes(len(names))
    groups: dict[str, list[Json]] = {}
    for run in runs:
        other = {key: value for key, value in run["settings"].items() if key != "temperature"}
        groups.setdefault(str(other), []).append(run)
    for each, name in zip(axes, names, strict=True):
        for group in groups.values():
            own = sorted(
                (run for run in group if name in run["figures"]), key=lambda run: run["settings"]["temperature"]
            )
            label = (
                own[0]["label"].replace(f"temperature {own[0]['settings']['temperature']}", "").strip(", ")
                if own
                else ""
            )
            _band(each, [run["settings"]["temperature"] for run in own], [run["figures"][name] for run in own], label)
        each.set(xlabel="temperature", ylabel=name.replace("_ar_ness", " AR-ness"))
    if len(groups) > 1:
        axes[0].legend(frameon=False, fontsize=8)
    return figure


def _curves(x: str, y: str, runs: Sequence[Json], rows: Callable[[Json], Sequence[Json]], *, start: int = 1) -> Figure:
    figure, [axes] = _axes(1)
    for run in runs:
        _band(axes, range(start, start + len(rows(run))), rows(run), run["label"])
    axes.set(xlabel=x, ylabel=y)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _pass_at_k(run: Json) -> list[Json]:
    ks = range(1, 1 + sum(name.startswith("pass@") for name in run["figures"]))
    return [run["figures"][f"pass@{k}"] for k in ks]


def _ranks(run: Json) -> list[Json]:
    rows: list[Json] = run["rank_by_position"]
    return rows


def _one_each(runs: Sequence[Json]) -> list[Json]:
    """The first run of each model: before the first pass nothing is decided, so settings change nothing there."""
    first: dict[str, Json] = {}
    for run in runs:
        if run["first_pass_entropy_by_position"]:
            model = run["settings"].get("model", "")
            first.setdefault(model, {**run, "label": model})
    return list(first.values())


def _classes(runs: Sequence[Json]) -> Figure:
    """When tokens of each class are committed, a dot with its interval for each run."""
    figure, [axes] = _axes(1)
    kinds = [kind for kind in CLASSES if any(run["tokens_of_class"][kind] for run in runs)]
    for at, run in enumerate(runs):
        found = [
            (place, run["figures"][f"rank_{kind}"])
            for place, kind in enumerate(kinds)
            if f"rank_{kind}" in run["figures"]
        ]
        means = [row["mean"] for _, row in found]
        spread = [[row["mean"] - row["low"] for _, row in found], [row["high"] - row["mean"] for _, row in found]]
        heights = [place + 0.6 * (at + 0.5) / len(runs) - 0.3 for place, _ in found]
        axes.errorbar(means, heights, xerr=spread, fmt="o", markersize=4, linewidth=1, label=run["label"])
    counts = [sum(run["tokens_of_class"][kind] for run in runs) for kind in kinds]
    labels = [f"{kind}\n{count:,} tokens" for kind, count in zip(kinds, counts, strict=True)]
    axes.set(xlabel="when committed (0 first, 1 last)", xlim=(0, 1), yticks=range(len(kinds)), yticklabels=labels)
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8)
    return figure
