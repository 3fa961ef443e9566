"""The report of a run: its figures, from samples and verdicts. It holds no time and no date: the same samples give the
same bytes. How fast the model was is in samples.jsonl.
"""

import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from diffucoder.evaluation.benchmarks import Task
from diffucoder.files import Json
from diffucoder.metrics import bootstrap, is_share, pass_at_k, wilson

_KS = (1, 5, 10, 100)
_SEED = 2506  # of the bootstrap


def report(
    benchmark: str,
    tasks: Sequence[Task],
    samples: Sequence[Json],
    verdicts: Sequence[Json],
    settings: Json,
    skipped: Mapping[str, str],
) -> Json:
    """Return the report of a run. pass@k is unbiased.

    Its 95 % interval is Wilson's if every task passes or fails, else a bootstrap over the tasks.
    """
    by_task: dict[str, list[Json]] = {}
    shown: dict[str, Any] = {}  # the verdict of a task, or a list of several
    for verdict in verdicts:
        own = by_task.setdefault(verdict["task_id"], [])
        own.append({key: value for key, value in verdict.items() if key not in ("task_id", "sample")})
        shown[verdict["task_id"]] = own[0] if len(own) == 1 else own
    judged = {task.task_id for task in tasks if task.tests is not None}
    return {
        "benchmark": benchmark,
        **_shares_passed(by_task, with_plus=any(verdict["plus"] is not None for verdict in verdicts)),
        "tokens_per_forward": ratio(samples, "tokens", "forward_passes"),
        "tasks": len(by_task),
        "samples": len(verdicts),
        "untrusted": sum(not verdict["trusted"] for verdict in verdicts),
        "missing": sorted(judged - skipped.keys() - by_task.keys()),
        "skipped": dict(skipped),
        "settings": settings,
        "versions": _versions(),
        "verdicts": shown,
    }


def _shares_passed(by_task: Mapping[str, Sequence[Json]], *, with_plus: bool) -> Json:
    figures: Json = {}
    fewest = min(map(len, by_task.values()), default=0)
    for k in _KS:
        if k <= fewest:
            shares = _pass_at_k(by_task, "passed", k)
            figures[f"pass@{k}"] = sum(shares) / len(shares)
            if is_share(shares):
                figures[f"pass@{k}_interval"] = wilson(sum(shares), len(shares))
            else:
                figures[f"pass@{k}_interval"] = bootstrap(shares, np.random.default_rng(_SEED))
    if with_plus:
        shares = _pass_at_k(by_task, "base", 1)
        figures["base_pass@1"] = sum(shares) / len(shares)
    return figures


def _pass_at_k(by_task: Mapping[str, Sequence[Json]], key: str, k: int) -> list[float]:
    """Return pass@k of each task."""
    shares = []
    for verdicts in by_task.values():
        passed = sum(verdict[key] for verdict in verdicts)
        shares.append(pass_at_k(len(verdicts), passed, k))
    return shares


def ratio(samples: Sequence[Json], above: str, below: str) -> float | None:
    """Return the sum of one figure of all samples, divided by the sum of another; None where that is 0."""
    dividend = 0.0
    divisor = 0.0
    for sample in samples:
        dividend += _number(sample.get(above))
        divisor += _number(sample.get(below))
    return dividend / divisor if divisor else None


def _number(value: Any) -> float:  # Any: from a file of anybody's
    """Return a cost of a sample as a number; 0 for other values, such as the tokens."""
    return float(value) if isinstance(value, int | float) and 0 <= value < 1e15 else 0.0


def _versions() -> dict[str, str]:
    """Return the versions that a result may depend on."""
    known = {"python": platform.python_version()}
    for name in ("diffucoder", "torch", "transformers", "numpy"):
        with suppress(PackageNotFoundError):
            known[name] = version(name)
    return known
