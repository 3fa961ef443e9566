"""The numbers against brute force and against what probability says of them."""

from itertools import combinations

import numpy as np
import pytest

from diffucoder.errors import ConfigError
from diffucoder.metrics import bootstrap, is_share, pass_at_k, wilson


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_share_of_choices_of_k_samples_in_which_one_passes(samples: int) -> None:
    for passed in range(samples + 1):
        for k in range(1, samples + 1):
            choices = list(combinations(range(samples), k))
            share = sum(min(choice) < passed for choice in choices) / len(choices)
            assert pass_at_k(samples, passed, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_stays_exact_where_binomials_overflow() -> None:
    assert pass_at_k(100_000, 50_000, 1) == pytest.approx(0.5)
    assert pass_at_k(100_000, 1, 99_999) == pytest.approx(0.99999)


@pytest.mark.parametrize(("samples", "passed", "k"), [(4, 1, 5), (4, 1, 0), (0, 0, 1), (4, 5, 1), (4, -1, 1)])
def test_impossible_counts_are_refused(samples: int, passed: int, k: int) -> None:
    with pytest.raises(ConfigError, match=r"must be \d to \d"):
        pass_at_k(samples, passed, k)


def test_an_interval_holds_the_true_mean_about_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        low, high = bootstrap(draw.random(100) < 0.3, draw, share=0.9, rounds=200)
        held += low <= 0.3 <= high
    assert 0.82 <= held / 200 <= 0.97  # 0.9 expected, 0.02 its deviation


@pytest.mark.parametrize(("passed", "count"), [(0, 60), (60, 60), (3, 20), (1595, 2000)])
def test_wilsons_interval_ends_where_the_observed_share_is_just_plausible(passed: int, count: int) -> None:
    share = passed / count
    for end in wilson(passed, count):  # Wilson 1927: |share - p| = z * sqrt(p (1 - p) / n)
        assert end in (0, 1) or abs(share - end) == pytest.approx(1.959964 * np.sqrt(end * (1 - end) / count))
    low, high = wilson(passed, count)
    assert low <= share <= high
    assert low < high


def test_only_passes_and_failures_make_a_share() -> None:
    assert is_share([0.0, 1.0])
    assert not is_share([0.0, 0.5])
    assert not is_share([])


def test_the_generator_fixes_the_interval() -> None:
    values = [task / 7 for task in range(20)]
    first, again = (bootstrap(values, np.random.default_rng(7), rounds=100) for _ in range(2))
    assert first == again != bootstrap(values, np.random.default_rng(8), rounds=100)


def test_equal_values_leave_no_doubt() -> None:
    assert bootstrap([0.25] * 5, np.random.default_rng(0), rounds=10) == (0.25, 0.25)


@pytest.mark.parametrize(("values", "share"), [([], 0.95), ([1.0], 0.0), ([1.0], 1.0)])
def test_an_interval_of_nothing_is_refused(values: list[float], share: float) -> None:
    with pytest.raises(ConfigError, match="needs one value or more"):
        bootstrap(values, np.random.default_rng(0), share=share)


def test_columns_have_the_interval_that_each_would_have_alone() -> None:
    values = np.random.default_rng(1).random((30, 3))
    low, high = bootstrap(values, np.random.default_rng(2), rounds=200)
    for column, found in zip(values.T, zip(low, high, strict=True), strict=True):
        assert bootstrap(column, np.random.default_rng(2), rounds=200) == pytest.approx(found)


def test_a_task_without_a_figure_is_left_out_of_that_column_alone() -> None:
    values = np.array([[0.0, 1.0], [np.nan, 3.0], [2.0, np.nan], [2.0, np.nan]])
    low, high = bootstrap(values, np.random.default_rng(0), rounds=2000)
    assert low[0] >= 0
    assert high[0] == 2
    assert (low[1], high[1]) == (1, 3)
    assert np.isnan(bootstrap(values * np.nan, np.random.default_rng(0), rounds=5)[0]).all()
