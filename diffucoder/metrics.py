"""Figures from verdicts: pass@k, and 95 % intervals: Wilson's of a share, and bootstrap intervals of other means."""

import math
import warnings
from collections.abc import Sequence

import numpy as np

from diffucoder.errors import ConfigError


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Return the chance that at least one of k samples passes, when `passed` of `samples` do.

    Unbiased (Chen et al. 2021, arXiv 2107.03374, section 2.1): 1 - C(samples - passed, k) / C(samples, k), as a
    product, because the binomials overflow. Raises ConfigError unless 1 <= k <= samples and 0 <= passed <= samples.
    """
    if not 1 <= k <= samples:
        raise ConfigError(f"k={k} must be 1 to {samples}, the samples of a task; draw more samples, or ask for less")
    if not 0 <= passed <= samples:
        raise ConfigError(f"passed={passed} must be 0 to {samples}, the samples of a task; count each sample once")
    failed = samples - passed
    return 1.0 - float(np.prod([max(0, failed - drawn) / (samples - drawn) for drawn in range(k)]))


def wilson(passed: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share, `passed` of `count` (Wilson 1927); at 0 and at 1 it is not a point."""
    z = 1.959964
    share = passed / count
    scale = 1 + z * z / count
    centre = (share + z * z / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def is_share(values: Sequence[float]) -> bool:
    """Return whether every task passed (1) or failed (0), so that their mean is a share with Wilson's interval."""
    return len(values) > 0 and all(value in (0, 1) for value in values)


def bootstrap(
    values: Sequence[float] | np.ndarray, generator: np.random.Generator, *, share: float = 0.95, rounds: int = 10_000
) -> tuple[np.ndarray, np.ndarray]:
    """Return the percentile interval of the mean of `values`, one a task: tasks are drawn again, `rounds` times.

    `values` (N,) or (N, K): each of K columns gets its interval, low (K,) and high (K,), by the same draws. A task
    without that figure is nan, and left out; a column of nan alone gives nan.
    Raises ConfigError if there are no values, or if `share` is not between 0 and 1.
    """
    if len(values) == 0 or not 0 < share < 1:
        raise ConfigError(f"{len(values)} values, share={share}: needs one value or more and a share between 0 and 1")
    values = np.asarray(values, dtype=np.float64)
    present = ~np.isnan(values)
    known = np.where(present, values, 0.0)
    means = np.empty((rounds, *values.shape[1:]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nan where no task drawn has the figure
        for index in range(rounds):  # rounds x tasks at once would be large for the bigger benchmarks
            tasks = generator.integers(len(values), size=len(values))
            means[index] = known[tasks].sum(0) / present[tasks].sum(0)
        low, high = np.nanquantile(means, [(1 - share) / 2, (1 + share) / 2], axis=0)
    return low, high
