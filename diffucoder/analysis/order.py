"""Figures of the order in which a model writes: AR-ness, ranks of token classes, entropies, diversity.

The figure of a prompt is the mean over its samples. The figure of a run is the mean over its prompts. Its interval is a
95 % bootstrap that draws prompts again, or Wilson's for pass@k if every prompt passes or fails. Two runs are compared
prompt by prompt, over the prompts that both have.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, combinations

import numpy as np

from diffucoder.analysis.runs import GLOBAL, LOCAL, Answer, Run
from diffucoder.analysis.settings import Conventions
from diffucoder.analysis.tokens import CLASSES
from diffucoder.decoding.trace import LARGEST_MAP
from diffucoder.errors import ConfigError
from diffucoder.files import Json
from diffucoder.grading.extract import program_key
from diffucoder.metrics import bootstrap, is_share, pass_at_k, wilson

ROUNDS = 2000  # of the bootstrap
_SEED = 2506
_LARGEST_K = 256  # of pass@k
_LARGEST_TABLE = 2**23  # prompts times figures; 1,319 prompts of 4,096 positions are 5.4 million

Figures = dict[str, float]  # of one answer or prompt, by name


def analyse(runs: Sequence[Run], conventions: Conventions) -> Json:
    """Return the content of report.json: the figures of every run, and the differences of every two."""
    tables = [_figures_by_prompt(run, conventions) for run in runs]
    differences: list[Json] = []
    for one, other in combinations(range(len(runs)), 2):
        pair = {"a": runs[one].label, "b": runs[other].label}
        differences.append(pair | _difference(tables[one], tables[other]))
    return {
        "conventions": conventions.model_dump(),
        "interval": f"95 %, bootstrap over prompts, {ROUNDS} rounds; Wilson for shares of prompts",
        "runs": [_report_of(run, table) for run, table in zip(runs, tables, strict=True)],
        "differences": differences,
    }


def _report_of(run: Run, table: Mapping[str, Figures]) -> Json:
    graded = 0
    classes = Counter(dict.fromkeys(CLASSES, 0))
    ranks: dict[str, list[Figures]] = {}
    entropies: dict[str, list[Figures]] = {}
    for answer in run.answers:
        graded += answer.passed is not None
        classes.update(answer.classes[: answer.length])
        ranks.setdefault(answer.task, []).append(_by_position(answer.ranks))
        for first_pass in answer.trace.entropy_map[:1]:  # none where entropies were not recorded
            entropies.setdefault(answer.task, []).append(_by_position(first_pass))
    by_prompt = {}
    for task, figures in table.items():
        by_prompt[task] = {name: plain(value) for name, value in figures.items()}
    return {
        "label": run.label,
        "settings": run.settings,
        "prompts": len(table),
        "samples": len(run.answers),
        "graded": graded,
        "tokens_of_class": dict(classes),
        "figures": _with_wilson(_summary(list(table.values())), table),
        "rank_by_position": list(_summary(list(map(_mean_figures, ranks.values()))).values()),
        "first_pass_entropy_by_position": list(_summary(list(map(_mean_figures, entropies.values()))).values()),
        "by_prompt": by_prompt,
    }


def _with_wilson(summary: dict[str, Json], table: Mapping[str, Figures]) -> dict[str, Json]:
    """Return a summary with Wilson's interval of each pass@k that is a share of the prompts."""
    for name in summary:
        values = [figures[name] for figures in table.values() if name in figures]
        if name.startswith("pass@") and is_share(values):
            low, high = wilson(sum(values), len(values))
            summary[name] |= {"low": plain(low), "high": plain(high)}
    return summary


def _difference(one: Mapping[str, Figures], other: Mapping[str, Figures]) -> Json:
    """Return the figures of `other` minus those of `one`, prompt by prompt."""
    rows = []
    for task, figures in one.items():
        others = other.get(task)
        if others is not None:
            rows.append({name: others[name] - value for name, value in figures.items() if name in others})
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
        graded = True
        for answer in answers:
            rows.append(_figures_of(answer, conventions))
            programs.append(program_key("".join(answer.pieces[: answer.end])))  # its syntax tree, or its text
            graded = graded and answer.passed is not None
            if answer.passed:
                right.append(programs[-1])
        figures = _mean_figures(rows)
        figures["distinct"] = len(set(programs))
        if graded:
            figures["distinct_right"] = len(set(right))
            for k in range(1, min(fewest, _LARGEST_K) + 1):
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
    figures["tokens"] = answer.end  # before the terminator, as everywhere
    figures["tokens_per_forward"] = answer.end / max(answer.trace.forward_passes, 1)
    figures["revisions"] = len(answer.trace.revoked)
    return figures


def _by_position(values: np.ndarray) -> Figures:
    return dict(zip(map(str, range(len(values))), values.tolist(), strict=True))


# --- figures of runs -------------------------------------------------------------------------------------------------


def _summary(rows: Sequence[Figures]) -> dict[str, Json]:
    """Return mean, interval and number of prompts of each figure; `rows` has the figures of each prompt."""
    names, values = _as_table(rows)
    if not names:
        return {}
    low, high = bootstrap(values, np.random.default_rng(_SEED), rounds=ROUNDS)
    mean = _mean(values)
    counts = (~np.isnan(values)).sum(0)
    summary = {}
    for k, name in enumerate(names):
        interval = {"mean": plain(mean[k]), "low": plain(low[k]), "high": plain(high[k])}
        summary[name] = {**interval, "prompts": int(counts[k])}
    return summary


def _mean_figures(rows: Sequence[Figures]) -> Figures:
    names, values = _as_table(rows)
    return dict(zip(names, _mean(values).tolist(), strict=True))


def _as_table(rows: Sequence[Figures]) -> tuple[list[str], np.ndarray]:
    """Return the names that any row has, and (N, K) their values, nan where a row has none."""
    names = list(dict.fromkeys(chain.from_iterable(rows)))
    if len(rows) * len(names) > _LARGEST_TABLE:
        raise ConfigError(
            f"{len(rows):,} prompts with up to {len(names):,} positions are too many; give a part of them"
        )
    values = np.full((len(rows), len(names)), np.nan)
    for number, row in enumerate(rows):
        values[number] = [row.get(name, math.nan) for name in names]
    return names, values


def mean_map(maps: Iterable[np.ndarray], most: int = 64) -> np.ndarray:
    """Return the (S, L) mean of maps of several sizes, nan where none has a value.

    Neighbours are averaged where there are more than `most` of them in a direction. Raises ConfigError for maps that
    are long in different directions, whose mean would take too much memory.
    """
    sums = np.zeros((2, 0, 0), np.float32)  # of the entropies, and how many they are
    for entropies in maps:
        steps, length = entropies.shape
        if steps < 2:  # the first pass alone is not a map
            continue
        shape = np.maximum(sums.shape[1:], entropies.shape)
        if np.prod(shape) > LARGEST_MAP:
            raise ConfigError(f"entropies of {shape[0]:,} steps and {shape[1]:,} tokens are too many to be averaged")
        if (shape > sums.shape[1:]).any():
            smaller = sums
            sums = np.zeros((2, *shape), np.float32)
            sums[:, : smaller.shape[1], : smaller.shape[2]] = smaller
        known = ~np.isnan(entropies)
        total, count = sums[:, :steps, :length]
        np.add(total, entropies, out=total, where=known)
        count += known
    for axis, size in enumerate(sums.shape[1:], 1):
        starts = np.unique(np.linspace(0, size, min(most, size), endpoint=False).astype(int))
        sums = np.add.reduceat(sums, starts, axis=axis) if size else sums
    return _ratio(*sums)


def _mean(values: np.ndarray) -> np.ndarray:
    """Return the mean of each column, nan where all are."""
    return _ratio(np.nansum(values, 0), (~np.isnan(values)).sum(0))


def _ratio(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # 0 / 0 is nan
        ratio: np.ndarray = total / count
    return ratio


def plain(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)
