"""The order in which a model writes, in figures: AR-ness, what is committed first, how unsure it is where, diversity.

For: answers with traces (`runs`), to figures with intervals over prompts. Not for: decoding and grading (`evaluation`
leaves run folders, which are read here), or drawing (`figures`, `report`).

The figure of a prompt is the mean over its samples. The figure of a run is the mean over its prompts, its interval a
95 % bootstrap that draws prompts again. Two runs are compared prompt by prompt, over the prompts that both have.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np

from diffucoder.analysis.runs import GLOBAL, LOCAL, Answer, Run
from diffucoder.analysis.settings import Conventions
from diffucoder.analysis.tokens import CLASSES
from diffucoder.files import Json
from diffucoder.metrics import bootstrap, pass_at_k

ROUNDS = 2000  # of the bootstrap
_SEED = 2506

Figures = dict[str, float]  # of one answer or prompt, by name


def analyse(runs: Sequence[Run], conventions: Conventions) -> Json:
    """Return the content of report.json: the figures of every run, and the differences of every two."""
    tables: list[dict[str, Figures]] = []
    reports: list[Json] = []
    differences: list[Json] = []
    for run in runs:
        tables.append(_figures_by_prompt(run, conventions))
        reports.append(_report_of(run, tables[-1]))
    for one, other in combinations(range(len(runs)), 2):
        pair = {"a": runs[one].label, "b": runs[other].label}
        differences.append(pair | _difference(tables[one], tables[other]))
    return {
        "conventions": conventions.model_dump(),
        "interval": f"95 %, bootstrap over prompts, {ROUNDS} rounds",
        "runs": reports,
        "differences": differences,
    }


def _report_of(run: Run, table: Mapping[str, Figures]) -> Json:
    classes = []
    for answer in run.answers:
        classes += answer.classes[: answer.length]
    by_prompt = {}
    for task, figures in table.items():
        by_prompt[task] = {name: _plain(value) for name, value in figures.items()}
    return {
        "label": run.label,
        "settings": run.settings,
        "prompts": len(table),
        "samples": len(run.answers),
        "graded": sum(answer.passed is not None for answer in run.answers),
        "tokens_of_class": {kind: classes.count(kind) for kind in CLASSES},
        "figures": _summary(list(table.values())),
        "rank_by_position": _columns(_by_position(run, lambda answer: answer.ranks[None])),
        "first_pass_entropy_by_position": _columns(_by_position(run, lambda answer: answer.trace.entropy_map[:1])),
        "by_prompt": by_prompt,
    }


def _difference(one: Mapping[str, Figures], other: Mapping[str, Figures]) -> Json:
    """Return by how much the figures of `other` are higher than those of `one`, prompt by prompt."""
    rows = []
    for task, figures in one.items():
        if task in other:
            rows.append({name: other[task][name] - value for name, value in figures.items() if name in other[task]})
    return {"prompts": len(rows), "figures": _summary(rows)}


# --- figures of answers and prompts ----------------------------------------------------------------------------------


def _figures_by_prompt(run: Run, conventions: Conventions) -> dict[str, Figures]:
    """Return the figures of every prompt: means over its samples, and figures that only several samples have."""
    groups: dict[str, list[Answer]] = {}
    for answer in run.answers:
        groups.setdefault(answer.task, []).append(answer)
    fewest = min(map(len, groups.values()))
    table = {}
    for task, answers in groups.items():
        rows: list[Figures] = []
        programs: list[str] = []
        right: list[str] = []
        for answer in answers:
            rows.append(_figures_of(answer, conventions))
            programs.append(answer.program)
            if answer.passed:
                right.append(programs[-1])
        names, values = _as_table(rows)
        figures: Figures = dict(zip(names, _mean(values).tolist(), strict=True))
        figures["distinct"] = len(set(programs))
        if all(answer.passed is not None for answer in answers):
            figures["distinct_right"] = len(set(right))
            for k in range(1, fewest + 1):
                figures[f"pass@{k}"] = pass_at_k(len(answers), len(right), k)
        table[task] = figures
    return table


def _figures_of(answer: Answer, conventions: Conventions) -> Figures:
    figures: Figures = {}
    local_values, global_values = answer.ar_ness(conventions)
    for k, value in zip(LOCAL, local_values, strict=True):
        figures[f"local_ar_ness@{k}"] = value
    for k, value in zip(GLOBAL, global_values, strict=True):
        figures[f"global_ar_ness@{k}"] = value
    ranks = answer.ranks
    classes = np.array(answer.classes)
    for kind in CLASSES:
        of_class = ranks[classes == kind]
        if not np.isnan(of_class).all():
            figures[f"rank_{kind}"] = float(np.nanmean(of_class))
    tokens = len(classes) - answer.classes.count("end")  # before the terminator, as everywhere
    figures["tokens"] = tokens
    figures["tokens_per_forward"] = tokens / max(answer.trace.forward_passes, 1)
    figures["revisions"] = len(answer.trace.revoked)
    return figures


def _by_position(run: Run, row_of: Callable[[Answer], np.ndarray]) -> np.ndarray:
    """Return (N, L): for each prompt the mean row of its answers, nan where they end. `row_of` returns (0 or 1, L)."""
    longest = max(len(answer.pieces) for answer in run.answers)
    groups: dict[str, list[np.ndarray]] = {}
    for answer in run.answers:
        for row in row_of(answer):
            padded = np.full(longest, np.nan)
            padded[: len(row)] = row
            groups.setdefault(answer.task, []).append(padded)
    return np.array([_mean(np.stack(group)) for group in groups.values()])


# --- figures of runs -------------------------------------------------------------------------------------------------


def _summary(rows: Sequence[Figures]) -> Json:
    """Return mean, interval and number of prompts of each figure; `rows` has the figures of each prompt."""
    names, values = _as_table(rows)
    return dict(zip(names, _columns(values), strict=True))


def _as_table(rows: Sequence[Figures]) -> tuple[list[str], np.ndarray]:
    """Return the names that any row has, and (N, K) their values, nan where a row has none."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    values = np.full((len(rows), len(names)), np.nan)
    for number, row in enumerate(rows):
        for column, name in enumerate(names):
            values[number, column] = row.get(name, math.nan)
    return names, values


def _columns(values: np.ndarray) -> list[Json]:
    """Return mean, interval and number of prompts of each column of `values` (N, K)."""
    if not values.size:
        return []
    low, high = bootstrap(values, np.random.default_rng(_SEED), rounds=ROUNDS)
    mean = _mean(values)
    counts = (~np.isnan(values)).sum(0)
    columns = []
    for k in range(values.shape[1]):
        bounds = {"mean": _plain(mean[k]), "low": _plain(low[k]), "high": _plain(high[k])}
        columns.append({**bounds, "prompts": int(counts[k])})
    return columns


def mean_map(maps: Sequence[np.ndarray], most: int = 64) -> np.ndarray:
    """Return the (S, L) mean of maps of several sizes, nan where none has a value.

    Neighbours are averaged where there are more than `most` of them in a direction.
    """
    whole = [entropies for entropies in maps if len(entropies) > 1]  # the first pass alone is not a map
    if not whole:
        return np.zeros((0, 0))
    shape = np.max([entropies.shape for entropies in whole], axis=0)
    total = np.zeros(shape)
    count = np.zeros(shape)
    for entropies in whole:
        steps, length = entropies.shape
        total[:steps, :length] += np.nan_to_num(entropies)
        count[:steps, :length] += ~np.isnan(entropies)
    for axis, size in enumerate(shape):
        starts = np.unique(np.linspace(0, size, min(most, size), endpoint=False).astype(int))
        total = np.add.reduceat(total, starts, axis=axis)
        count = np.add.reduceat(count, starts, axis=axis)
    return _ratio(total, count)


def _mean(values: np.ndarray) -> np.ndarray:
    """Return the mean of each column, nan where all are."""
    return _ratio(np.nansum(values, 0), (~np.isnan(values)).sum(0))


def _ratio(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    ratio = np.full(total.shape, np.nan)
    np.divide(total, count, out=ratio, where=count > 0)
    return ratio


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)
