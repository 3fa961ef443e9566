"""Figures from verdicts: pass@k, and bootstrap intervals."""

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


def bootstrap(
    values: Sequence[float], generator: np.random.Generator, *, share: float = 0.95, rounds: int = 10_000
) -> tuple[float, float]:
    """Return the percentile interval of the mean of `values`, one a task: tasks are drawn again, `rounds` times."""
    columns = np.asarray(values, dtype=np.float64)[:, None]
    low, high = bootstrap_columns(columns, generator, share=share, rounds=rounds)
    return float(low[0]), float(high[0])


def bootstrap_columns(
    values: np.ndarray, generator: np.random.Generator, *, share: float = 0.95, rounds: int = 10_000
) -> tuple[np.ndarray, np.ndarray]:
    """Return `bootstrap` of each of K columns, (K,) and (K,), by the same draws. `values` (N, K) has a row a task.

    A task without that figure is nan, and left out; a column of nan alone gives nan.
    Raises ConfigError if there are no values, or if `share` is not between 0 and 1.
    """
    if len(values) == 0 or not 0 < share < 1:
        raise ConfigError(f"{len(values)} values, share={share}: needs one value or more and a share between 0 and 1")
    present = ~np.isnan(values)  # (N, K)
    known = np.where(present, values, 0.0)
    means = np.full((rounds, values.shape[1]), np.nan)
    for mean in means:  # a round at a time: rounds x tasks at once would be large for the bigger benchmarks
        tasks = generator.integers(len(values), size=len(values))
        counts = present[tasks].sum(0)
        np.divide(known[tasks].sum(0), counts, out=mean, where=counts > 0)
    some = present.any(0)
    bounds = np.full((2, values.shape[1]), np.nan)
    bounds[:, some] = np.nanquantile(means[:, some], [(1 - share) / 2, (1 + share) / 2], axis=0)
    return bounds[0], bounds[1]
