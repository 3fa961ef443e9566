"""Policies: the published schedules, exact budgets, and draws without replacement."""

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.policies import (
    EntropyBoundRule,
    FactorRule,
    Quotas,
    ReleasedRandomRule,
    ReleasedRule,
    ReleasedShares,
    Rule,
    RuleInput,
    Schedule,
    ThresholdRule,
    ends_last,
    gumbel,
    schedule_of,
)


def counts_of(schedule: Schedule, masked: int) -> list[int]:
    """What each step commits, one row's masks being all there is."""
    left, counts = masked, []
    for step in range(schedule.steps):
        counts.append(int(schedule.due(step, left)))
        left -= counts[-1]
    return counts


def released_counts(masked: int, steps: int, eps: float = 1e-3) -> list[int]:
    """What each step of the reference preset commits."""
    return counts_of(ReleasedShares(masked, steps, eps, independent=False), masked)


def commit(rule: Rule, priority: Tensor, masked: Tensor, due: Tensor) -> Tensor:
    """What a rule commits by a priority that is the confidence and the probability too."""
    return rule.commit(RuleInput(masked, priority, priority, priority, due, torch.ones_like(masked)))


def by_schedule(priority: Tensor, masked: Tensor, due: Tensor) -> Tensor:
    return commit(Rule(), priority, masked, due)


def as_released(priority: Tensor, masked: Tensor, due: Tensor) -> Tensor:
    return commit(ReleasedRule(), priority, masked, due)


def beyond_schedule(rule: Rule, values: Tensor, masked: Tensor) -> Tensor:
    """What a rule commits if nothing is due."""
    return commit(rule, values, masked, torch.zeros(len(values)))


@pytest.mark.parametrize(
    ("masked", "steps", "counts"),
    [
        (256, 256, [0] + [1] * 254 + [2]),
        (512, 512, [0] + [1] * 510 + [2]),
        (1024, 1024, [0] * 2 + [1] * 1021 + [3]),
        (2048, 2048, [0] * 3 + [1] * 2044 + [4]),
        (256, 128, [1] + [2] * 126 + [3]),
        (512, 256, [1] + [2] * 254 + [3]),
        (256, 64, [3] + [4] * 62 + [5]),
        (256, 512, [0] * 257 + [1] * 254 + [2]),
        (100, 30, [3] * 21 + [4] * 8 + [5]),
        (16, 16, [0] + [1] * 14 + [2]),
        (32, 8, [3] + [4] * 6 + [5]),
        (10, 3, [3, 3, 4]),
        (128, 32, [3] + [4] * 30 + [5]),
        (7, 1, [7]),
    ],
)
def test_the_reference_schedule_is_the_published_one(masked: int, steps: int, counts: list[int]) -> None:
    assert released_counts(masked, steps) == counts


@given(masked=st.integers(0, 300), steps=st.integers(1, 300))
def test_exact_quotas_are_even_and_add_up(masked: int, steps: int) -> None:
    schedule = Quotas(masked, steps)
    counts = counts_of(schedule, masked)
    assert sum(counts) == masked
    assert schedule.steps == len(counts) == min(masked, steps)
    assert masked == 0 or max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)


@given(masked=st.integers(1, 60), steps=st.integers(1, 60), more=st.lists(st.integers(0, 5), max_size=60))
def test_quotas_owe_what_the_schedule_has_by_then_and_always_one(masked: int, steps: int, more: list[int]) -> None:
    schedule = Quotas(masked, steps)
    even = counts_of(schedule, masked)
    done = 0
    for step, extra in zip(range(schedule.steps), more, strict=False):
        left = masked - done
        if left:
            assert schedule.due(step, left) == max(1, sum(even[: step + 1]) - done)
            done = min(masked, done + int(schedule.due(step, left)) + extra)


def test_without_steps_each_masked_token_has_its_own() -> None:
    assert counts_of(schedule_of(DecodingParams(), 5), 5) == [1] * 5
    assert schedule_of(DecodingParams(preset="reference"), 5).steps == 5


def test_a_schedule_of_a_billion_steps_is_not_laid_out() -> None:
    schedule = Quotas(10, 10**9)
    assert schedule.steps == 10
    assert counts_of(schedule, 10) == [1] * 10


def test_the_surest_masked_positions_are_committed() -> None:
    confidence = torch.tensor([[0.9, 0.1, 0.8, 0.7], [0.1, 0.2, 0.3, 0.4]])
    masked = torch.tensor([[False, True, True, True], [True, True, True, False]])
    for choose in (by_schedule, as_released):
        assert choose(confidence, masked, torch.tensor([2, 1])).int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 0]]
        assert not choose(confidence, masked, torch.tensor([0, 0])).any()


def test_ties_go_to_the_left_however_a_row_is_padded() -> None:
    confidence, masked = torch.ones(1, 40), torch.ones(1, 40, dtype=torch.bool)
    masked[:, :7] = False
    assert by_schedule(confidence, masked, torch.tensor([3])).nonzero()[:, 1].tolist() == [7, 8, 9]


def test_the_released_choice_among_equals_is_torchs() -> None:
    confidence = torch.randint(0, 3, (6, 33), generator=torch.Generator().manual_seed(0)).float()
    masked = torch.ones_like(confidence, dtype=torch.bool)
    budget = torch.tensor([1, 4, 4, 9, 30, 1])
    chosen = as_released(confidence, masked, budget)
    for row, count in enumerate(budget.tolist()):
        assert set(chosen[row].nonzero()[:, 0].tolist()) == set(confidence[row].topk(count).indices.tolist())


@given(st.lists(st.sampled_from([-float("inf"), -1e38, 0.0, 1.0, float("inf"), float("nan")]), min_size=3, max_size=9))
def test_a_budget_is_met_whatever_the_confidence(confidence: list[float]) -> None:
    masked = torch.arange(len(confidence))[None] > 0
    chosen = by_schedule(torch.tensor([confidence]), masked, torch.tensor([2]))
    assert chosen.sum() == 2
    assert not chosen[0, 0]


@pytest.mark.parametrize("choose", [by_schedule, as_released])
def test_gumbel_noise_draws_without_replacement(choose: Callable[..., torch.Tensor]) -> None:
    samples, scores = 40_000, torch.tensor([1.0, 0.0, -1.0, 0.5])
    noise = gumbel(torch.rand(samples, 4, generator=torch.Generator().manual_seed(0)))
    everything = torch.ones(samples, 4, dtype=torch.bool)
    chosen = choose(scores + noise, everything, torch.full((samples,), 2))  # (samples, 4)
    p = scores.softmax(0)
    statistic = 0.0
    for i, j in combinations(range(4), 2):
        expected = samples * float(p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j]))  # first one, then the other
        statistic += (int((chosen[:, i] & chosen[:, j]).sum()) - expected) ** 2 / expected
    assert statistic < 20.5  # chi-square, 5 degrees of freedom, 99.9 %


def test_gumbel_noise_is_finite() -> None:
    assert gumbel(torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-24])).isfinite().all()


def test_origin_commits_each_position_by_itself() -> None:
    uniform = torch.rand(2, 10_000, generator=torch.Generator().manual_seed(0))
    masked = torch.ones_like(uniform, dtype=torch.bool)
    masked[:, ::2] = False
    chosen = commit(ReleasedRandomRule(), uniform, masked, torch.tensor([0.3, 1.0]))
    assert not (chosen & ~masked).any()
    assert abs(chosen[0].sum() / 5_000 - 0.3) < 0.03
    assert chosen[1].sum() == 5_000


# --- rules: what a step commits beyond its schedule

SURENESS = st.lists(st.floats(0, 1), min_size=1, max_size=7)
MASKED = st.lists(st.booleans(), min_size=7, max_size=7)


def laid_out(values: list[float], masked: list[bool]) -> tuple[Tensor, Tensor]:
    return torch.tensor([values]), torch.tensor([masked[: len(values)]])


@given(SURENESS, MASKED, st.floats(0.1, 1))
def test_a_threshold_takes_what_reaches_it(values: list[float], masked: list[bool], least: float) -> None:
    probability, where = laid_out(values, masked)
    level = torch.tensor([least])
    for by_confidence in (False, True):
        taken = beyond_schedule(ThresholdRule(least, by_confidence), probability, where)[0].tolist()
        assert taken == [m and p >= level for p, m in zip(probability[0], where[0], strict=True)]


@given(SURENESS, MASKED, st.sampled_from([0.3, 1.0, 2.0]))
def test_a_factor_takes_the_largest_number_that_fits(values: list[float], masked: list[bool], factor: float) -> None:
    probability, where = laid_out(values, masked)
    taken = beyond_schedule(FactorRule(factor), probability, where)
    ordered = sorted(probability[where].tolist(), reverse=True)
    single = torch.tensor(ordered, dtype=torch.float32)
    number = max([n for n in range(1, len(ordered) + 1) if (n + 1) * (1 - single[n - 1]) < factor], default=0)
    assert int(taken.sum()) == number
    assert not (taken & ~where).any()
    assert sorted(probability[taken].tolist(), reverse=True) == ordered[:number]


@given(st.lists(st.floats(0, 3), min_size=1, max_size=7), MASKED, st.floats(0, 4))
def test_an_entropy_bound_holds_without_the_largest(values: list[float], masked: list[bool], bound: float) -> None:
    entropy, where = laid_out(values, masked)
    taken = beyond_schedule(EntropyBoundRule(bound), -entropy, where)
    ordered = sorted(entropy[where].tolist())
    cumulated = torch.tensor([0.0, *ordered]).cumsum(0)[:-1] if ordered else torch.tensor([])
    assert int(taken.sum()) == int((cumulated <= bound).sum())
    assert sorted(entropy[taken].tolist()) == ordered[: int(taken.sum())]
    assert not where.any() or taken.any()  # always at least one


def test_a_factor_of_one_with_equal_probabilities_is_the_papers_rule() -> None:
    for n in range(1, 6):  # (n + 1) epsilon <= 1, with confidence above 1 - epsilon
        probability = torch.full((1, n), 1 - 0.99 / (n + 1))
        assert beyond_schedule(FactorRule(1.0), probability, torch.ones(1, n, dtype=torch.bool)).all()


def test_an_end_is_as_sure_as_the_least_sure_open_position_before_it() -> None:
    values = torch.tensor([[0.9, 0.2, 0.7, 0.8, 0.1, 0.95]])
    open_ = torch.tensor([[True, False, True, True, True, True]])
    ends = torch.tensor([[False, True, False, True, False, True]])
    lowered = ends_last(values, open_, ends)
    assert lowered.tolist() == torch.tensor([[0.9, 0.2, 0.7, 0.7, 0.1, 0.1]]).tolist()
    assert torch.equal(ends_last(values, open_, torch.zeros_like(ends)), values)
