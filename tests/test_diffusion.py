"""Oracle 6: complementary masks are disjoint and cover, the weighted loss is unbiased, all masked = cross-entropy."""

import math
from functools import partial

import pytest
import torch
from torch import Generator, Tensor

from diffucoder.diffusion import complementary_masks, corrupt, diffusion_loss, sample_time
from diffucoder.errors import ConfigError

MASK = 99


@pytest.fixture
def noise() -> Generator:
    return Generator().manual_seed(0)


def half(rows: int, length: int) -> Tensor:
    """(rows, length) bool: the right half of every row, as an answer behind its prompt."""
    return (torch.arange(length) >= length // 2).expand(rows, length)


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stratified", [True, False])
def test_times_are_uniform_between_eps_and_one(noise: Generator, stratified: bool) -> None:
    draw = partial(sample_time, 8, generator=noise, eps=0.2, stratified=stratified)
    times = torch.cat([draw() for _ in range(2500)])  # (20_000,)
    assert times.min() >= 0.2
    assert times.max() <= 1
    counts = torch.histc(times, bins=10, min=0.2, max=1.0)
    assert (counts - 2000).abs().max() < 5 * math.sqrt(2000)


def test_each_row_of_a_stratified_batch_is_uniform_by_itself(noise: Generator) -> None:
    times = torch.stack([sample_time(4, generator=noise) for _ in range(4000)])  # (4000, B)
    for quantile in (0.25, 0.5, 0.75):
        assert (times < quantile).float().mean(0).tolist() == pytest.approx([quantile] * 4, abs=0.04)


def test_a_stratified_batch_has_one_time_in_every_slice(noise: Generator) -> None:
    times = sample_time(16, generator=noise, eps=1e-9).sort().values
    assert (times * 16).floor().tolist() == list(range(16))


def test_stratified_times_lower_the_variance_of_a_batch_mean(noise: Generator) -> None:
    def variance(*, stratified: bool) -> float:
        means = [sample_time(8, generator=noise, stratified=stratified).square().mean() for _ in range(500)]
        return float(torch.stack(means).var())

    assert variance(stratified=True) < variance(stratified=False) / 10


@pytest.mark.parametrize("eps", [0.0, 1.0, -0.1])
def test_a_time_grid_that_ends_nowhere_is_refused(noise: Generator, eps: float) -> None:
    with pytest.raises(ConfigError, match="is not inside"):
        sample_time(2, generator=noise, eps=eps)


# --- masks -----------------------------------------------------------------------------------------------------------


def test_each_maskable_token_is_masked_with_the_probability_of_its_row(noise: Generator) -> None:
    t = torch.tensor([0.1, 0.5, 0.9])
    tokens, maskable = torch.arange(8000).expand(3, 8000) % 50, half(3, 8000)
    _, masked = corrupt(tokens, maskable, t, MASK, noise)
    assert (masked[:, 4000:].float().mean(-1) - t).abs().max() < 5 * math.sqrt(0.25 / 4000)


def test_tokens_of_a_row_are_masked_independently(noise: Generator) -> None:
    tokens, maskable = torch.zeros(20_000, 2, dtype=torch.long), torch.ones(20_000, 2, dtype=torch.bool)
    _, masked = corrupt(tokens, maskable, torch.full((20_000,), 0.5), MASK, noise)
    assert float(masked.all(-1).float().mean()) == pytest.approx(0.25, abs=0.02)


def test_corruption_changes_what_it_masks_and_nothing_else(noise: Generator) -> None:
    tokens, maskable = torch.arange(80).view(4, 20), half(4, 20)
    noisy, masked = corrupt(tokens, maskable, torch.full((4,), 0.5), MASK, noise)
    assert not (masked & ~maskable).any()
    assert masked.any()
    assert torch.equal(noisy == MASK, masked)
    assert torch.equal(noisy[~masked], tokens[~masked])
    assert torch.equal(tokens, torch.arange(80).view(4, 20))


def test_at_time_one_everything_maskable_is_masked(noise: Generator) -> None:
    tokens, maskable = torch.zeros(4, 2000, dtype=torch.long), half(4, 2000)
    _, masked = corrupt(tokens, maskable, torch.ones(4), MASK, noise)
    assert torch.equal(masked, maskable)


@pytest.mark.parametrize("time", [0.0, 0.3, 1.0])
def test_complementary_masks_are_disjoint_and_cover(noise: Generator, time: float) -> None:
    maskable = torch.rand(6, 500, generator=noise) < 0.7
    first, second = complementary_masks(maskable, torch.full((6,), time), noise)
    assert not (first & second).any()
    assert torch.equal(first | second, maskable)
    assert float(first.sum() / maskable.sum()) == pytest.approx(time, abs=0.05)


def test_the_same_generator_gives_the_same_noise() -> None:
    def draws(seed: int) -> list[Tensor]:
        generator = Generator().manual_seed(seed)
        tokens, maskable = torch.zeros(4, 50, dtype=torch.long), half(4, 50)
        t = sample_time(4, generator=generator)
        noisy, masked = corrupt(tokens, maskable, t, MASK, generator)
        return [t, noisy, masked, *complementary_masks(maskable, t, generator)]

    assert all(map(torch.equal, draws(3), draws(3)))
    assert not any(map(torch.equal, draws(3), draws(4)))


def test_nothing_is_drawn_from_the_global_generator(noise: Generator) -> None:
    before = torch.get_rng_state()
    t = sample_time(4, generator=noise)
    corrupt(torch.zeros(4, 9, dtype=torch.long), half(4, 9), t, MASK, noise)
    complementary_masks(half(4, 9), t, noise)
    assert torch.equal(torch.get_rng_state(), before)


# --- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normaliser", ["length", "masked"])
def test_all_masked_at_time_one_is_plain_cross_entropy(noise: Generator, normaliser: str) -> None:
    maskable = half(3, 10)
    _, masked = corrupt(torch.zeros(3, 10, dtype=torch.long), maskable, torch.ones(3), MASK, noise)
    cross_entropy = torch.rand(15, generator=noise)
    loss = diffusion_loss(cross_entropy, masked, torch.ones(3), maskable, normaliser=normaliser)
    assert float(loss) == pytest.approx(float(cross_entropy.mean()))


def mean_loss(costs: Tensor, noise: Generator, *, normaliser: str, rows: int, draws: int) -> float:
    """Average loss of `draws` batches of `rows` rows, where token i costs `costs[i]` whatever else is masked."""
    maskable, losses = torch.ones(rows, len(costs), dtype=torch.bool), []
    for _ in range(draws):
        t = sample_time(rows, generator=noise)
        _, masked = corrupt(torch.zeros_like(maskable, dtype=torch.long), maskable, t, MASK, noise)
        cross_entropy = costs.expand(rows, -1)[masked]
        losses.append(diffusion_loss(cross_entropy, masked, t, maskable, normaliser=normaliser))
    return float(torch.stack(losses).mean())


def test_the_loss_is_unbiased_under_length(noise: Generator) -> None:
    costs = torch.tensor([0.5, 3.0, 0.0, 1.0, 2.5, 0.2, 0.1, 4.0])
    estimate = mean_loss(costs, noise, normaliser="length", rows=2000, draws=40)
    assert estimate == pytest.approx(float(costs.mean()), rel=0.03)


def test_the_loss_of_a_perfect_model_is_the_negative_log_likelihood(noise: Generator) -> None:
    # Two equal bits. While both are masked each costs log 2; once one is known the other costs nothing.
    rows, eps = 200_000, 1e-3
    maskable = torch.ones(rows, 2, dtype=torch.bool)
    t = sample_time(rows, generator=noise, eps=eps)
    _, masked = corrupt(torch.zeros(rows, 2, dtype=torch.long), maskable, t, MASK, noise)
    cost = math.log(2) * masked.all(-1, keepdim=True).expand(rows, 2)[masked]
    loss = diffusion_loss(cost, masked, t, maskable, normaliser="length")
    likelihood = math.log(2) / 2  # per token
    assert float(loss) == pytest.approx(likelihood * (1 + eps), rel=0.01)


def test_the_masked_normaliser_is_larger_by_the_mean_inverse_time(noise: Generator) -> None:
    # E[1/t] = ln(1000) / 0.999: each row divides by what is masked in it, which cancels its t
    factor = mean_loss(torch.ones(4000), noise, normaliser="masked", rows=1, draws=4000)
    assert factor == pytest.approx(math.log(1000) / 0.999, rel=0.15)


def test_rows_that_share_the_masked_normaliser_bring_the_factor_down_to_two(noise: Generator) -> None:
    factor = mean_loss(torch.ones(20), noise, normaliser="masked", rows=2000, draws=20)
    assert factor == pytest.approx(2.0, rel=0.05)


def test_each_cross_entropy_is_weighted_by_its_own_row() -> None:
    masked = torch.tensor([[True, False, True], [False, True, False]])
    t = torch.tensor([0.5, 0.25])
    loss = diffusion_loss(torch.tensor([1.0, 2.0, 3.0]), masked, t, torch.ones(2, 3).bool(), normaliser="length")
    assert float(loss) == pytest.approx((1 / 0.5 + 2 / 0.5 + 3 / 0.25) / 6)


@pytest.mark.parametrize("normaliser", ["length", "masked"])
def test_a_batch_with_nothing_masked_costs_nothing(normaliser: str) -> None:
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    loss = diffusion_loss(torch.empty(0), nothing, torch.full((2,), 1e-3), ~nothing, normaliser=normaliser)
    assert float(loss) == 0


def test_an_unknown_normaliser_is_refused() -> None:
    masked = torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ConfigError, match="normaliser='mean' is not known; use one of length, masked"):
        diffusion_loss(torch.ones(1), masked, torch.ones(1), masked, normaliser="mean")
