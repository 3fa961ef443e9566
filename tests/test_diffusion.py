"""Oracle 6: complementary masks are disjoint and cover, the weighted loss is unbiased, all masked = cross-entropy.

And the laws of the draws: keyed noise, times, spans, annealed attention.
"""

import math
from collections.abc import Iterable
from functools import partial
from itertools import product
from typing import Literal

import pytest
import torch
from torch import Generator, Tensor

from diffucoder.diffusion import (
    Estimator,
    View,
    annealed_attention,
    complementary_masks,
    corrupt,
    keyed_generator,
    loss_weights,
    random_spans,
    sample_time,
    score_views,
)
from diffucoder.errors import ConfigError

MASK = 99
Method = Literal["uniform", "stratified", "antithetic"]
METHODS: tuple[Method, ...] = ("uniform", "stratified", "antithetic")
Micro = tuple[Tensor, Tensor, Tensor, Tensor]
"""A micro-batch: cross-entropies (M,), what is masked (B, T), times (B,), what is maskable (B, T)."""


@pytest.fixture
def noise() -> Generator:
    return Generator().manual_seed(0)


def half(rows: int, length: int) -> Tensor:
    """(rows, length) bool: the right half of every row, as an answer behind its prompt."""
    return (torch.arange(length) >= length // 2).expand(rows, length)


def step_loss(micros: Iterable[Micro], normaliser: str) -> Tensor:
    """The loss of a step, as `loss_weights` defines it over the micro-batches."""
    total, divisor = torch.zeros(()), 0.0
    for cross_entropy, masked, t, maskable in micros:
        weights, share = loss_weights(masked, t, maskable, normaliser=normaliser)
        total, divisor = total + (weights * cross_entropy).sum(), divisor + share
    return total / max(1, divisor)


# --- keyed noise -----------------------------------------------------------------------------------------------------


def test_keyed_noise_is_a_function_of_the_key_alone() -> None:
    keyed_generator(1, 2, 3)  # what was drawn before does not matter
    assert torch.equal(torch.rand(9, generator=keyed_generator(5, 0)), torch.rand(9, generator=keyed_generator(5, 0)))
    # and stays the same from release to release: runs that are under way go on with it
    assert torch.randint(1000, (4,), generator=keyed_generator(0, -1, 7)).tolist() == [187, 307, 529, 837]


def test_keys_of_different_lengths_order_and_sign_differ() -> None:
    keys = [(), (0,), (0, 0), (1, 0), (0, 1), (-1,), (1,), (2**63 - 1,), (-(2**63),), (2**32,)]
    seeds = {keyed_generator(*key).initial_seed() for key in keys}
    assert len(seeds) == len(keys)


def test_close_keys_are_uncorrelated() -> None:
    draws = torch.stack([torch.rand(400, generator=keyed_generator(0, s, r)) for s, r in product(range(20), range(10))])
    correlation = torch.corrcoef(draws) - torch.eye(200)  # (200, 200), of standard deviation 1/20
    assert correlation.abs().max() < 6 / 20
    assert float(correlation.square().sum() / (200 * 199)) == pytest.approx(1 / 400, rel=0.05)
    assert draws[:, 0].histc(4, 0, 1).sub(50).abs().max() < 5 * math.sqrt(50)  # the first draw is uniform over keys


def test_a_generator_for_each_row_gives_a_row_the_same_noise_in_any_company() -> None:
    tokens, maskable, t = torch.arange(80).view(4, 20), half(4, 20), torch.tensor([0.3, 0.5, 0.7, 0.9])

    def draws(rows: list[int]) -> list[Tensor]:
        def keyed() -> list[Generator]:
            return [keyed_generator(0, row) for row in rows]

        noisy, masked = corrupt(tokens[rows], maskable[rows], t[rows], MASK, keyed())
        return [noisy, masked, *complementary_masks(maskable[rows], t[rows], keyed())]

    together = draws([0, 1, 2, 3])
    for drawn, all_ in zip(draws([2]), together, strict=True):
        assert torch.equal(drawn[0], all_[2])
    for drawn, all_ in zip(draws([3, 0]), together, strict=True):
        assert torch.equal(drawn, all_[[3, 0]])


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_times_are_uniform_between_eps_and_one(noise: Generator, method: Method) -> None:
    draw = partial(sample_time, 8, generator=noise, eps=0.2, method=method)
    times = torch.cat([draw() for _ in range(2500)])  # (20_000,)
    assert times.min() >= 0.2
    assert times.max() <= 1
    counts = torch.histc(times, bins=10, min=0.2, max=1.0)
    assert (counts - 2000).abs().max() < 5 * math.sqrt(2000)


@pytest.mark.parametrize("method", METHODS)
def test_each_row_of_a_batch_is_uniform_by_itself(noise: Generator, method: Method) -> None:
    times = torch.stack([sample_time(5, generator=noise, method=method) for _ in range(4000)])  # (4000, B)
    for quantile in (0.25, 0.5, 0.75):
        assert (times < quantile).float().mean(0).tolist() == pytest.approx([quantile] * 5, abs=0.04)


def test_a_stratified_batch_has_one_time_in_every_slice(noise: Generator) -> None:
    times = sample_time(16, generator=noise, eps=1e-9).sort().values
    assert (times * 16).floor().tolist() == list(range(16))


@pytest.mark.parametrize("rows", [1, 2, 7, 8])
def test_antithetic_times_come_in_pairs_that_mirror_each_other(noise: Generator, rows: int) -> None:
    eps = 0.1
    u = (sample_time(rows, generator=noise, eps=eps, method="antithetic") - eps) / (1 - eps)
    assert len(u) == rows
    pairs = u[: rows // 2 * 2].view(-1, 2)
    assert pairs.sum(1).tolist() == pytest.approx([1.0] * (rows // 2))


@pytest.mark.parametrize(("method", "ratio"), [("stratified", 10), ("antithetic", 5)])
def test_spread_times_lower_the_variance_of_a_batch_mean(noise: Generator, method: Method, ratio: int) -> None:
    def variance(method: Method) -> float:
        means = [sample_time(8, generator=noise, method=method).square().mean() for _ in range(500)]
        return float(torch.stack(means).var())

    assert variance(method) < variance("uniform") / ratio


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
    random_spans(9, noise)
    annealed_attention(9, 0.5, keyed_generator(0))
    assert torch.equal(torch.get_rng_state(), before)


# --- spans -----------------------------------------------------------------------------------------------------------


def runs(inside: Tensor) -> int:
    """How many stretches of True there are."""
    padded = torch.cat([torch.zeros(1), inside.float()])
    return int((padded.diff() > 0).sum())


def test_spans_are_at_most_as_many_as_asked_for(noise: Generator) -> None:
    for holes in (1, 3):
        found = [runs(random_spans(40, noise, holes=holes)) for _ in range(300)]
        assert max(found) == holes
    assert random_spans(40, noise).shape == (40,)


def test_one_span_has_uniform_ends(noise: Generator) -> None:
    # The length of a span between two uniform ends is triangular: a third of the text on average
    spans = torch.stack([random_spans(30, noise, holes=1) for _ in range(4000)]).float()  # (4000, 30)
    assert float(spans.mean()) == pytest.approx(1 / 3, abs=0.02)
    assert spans.mean(0).tolist() == pytest.approx(spans.mean(0).flip(0).tolist(), abs=0.05)  # either end alike


@pytest.mark.parametrize("length", [0, 1])
def test_the_shortest_texts_have_spans_too(noise: Generator, length: int) -> None:
    assert {len(random_spans(length, noise)) for _ in range(20)} == {length}


# --- annealed attention ----------------------------------------------------------------------------------------------


def test_no_share_is_causal_and_a_whole_one_is_full(noise: Generator) -> None:
    assert torch.equal(annealed_attention(9, 0.0, noise), torch.ones(9, 9, dtype=torch.bool).tril())
    assert annealed_attention(9, 1.0, noise).all()


@pytest.mark.parametrize("share", [1e-4, 0.3, 0.8])
def test_a_share_between_opens_that_share_of_the_keys_to_the_right(noise: Generator, share: float) -> None:
    length = 400
    attention = annealed_attention(length, share, noise)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    assert attention[causal].all()
    right = attention[~causal].float()
    assert float(right.mean()) == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / len(right)))


# --- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normaliser", ["length", "masked", "masked_micro"])
def test_all_masked_at_time_one_is_plain_cross_entropy(noise: Generator, normaliser: str) -> None:
    maskable = half(3, 10)
    _, masked = corrupt(torch.zeros(3, 10, dtype=torch.long), maskable, torch.ones(3), MASK, noise)
    cross_entropy = torch.rand(15, generator=noise)
    loss = step_loss([(cross_entropy, masked, torch.ones(3), maskable)], normaliser)
    assert float(loss) == pytest.approx(float(cross_entropy.mean()))


def mean_loss(costs: Tensor, noise: Generator, *, normaliser: str, rows: int, draws: int) -> float:
    """Average loss of `draws` batches of `rows` rows, where token i costs `costs[i]` whatever else is masked."""
    maskable, losses = torch.ones(rows, len(costs), dtype=torch.bool), []
    for _ in range(draws):
        t = sample_time(rows, generator=noise)
        _, masked = corrupt(torch.zeros_like(maskable, dtype=torch.long), maskable, t, MASK, noise)
        cross_entropy = costs.expand(rows, -1)[masked]
        losses.append(step_loss([(cross_entropy, masked, t, maskable)], normaliser))
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
    loss = step_loss([(cost, masked, t, maskable)], "length")
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
    micro = (torch.tensor([1.0, 2.0, 3.0]), masked, t, torch.ones(2, 3).bool())
    assert float(step_loss([micro], "length")) == pytest.approx((1 / 0.5 + 2 / 0.5 + 3 / 0.25) / 6)
    assert float(step_loss([micro], "masked")) == pytest.approx((1 / 0.5 + 2 / 0.5 + 3 / 0.25) / 3)


def micro_batches(noise: Generator, rows: int, size: int) -> list[Micro]:
    """A step of `rows` random rows in micro-batches of `size`; the numbers do not depend on the size."""
    maskable = torch.rand(rows, 30, generator=noise) < 0.8
    t = sample_time(rows, generator=noise)
    masked = corrupt(torch.zeros(rows, 30, dtype=torch.long), maskable, t, MASK, noise)[1]
    costs = torch.rand(rows, 30, generator=noise)
    cuts = [slice(at, at + size) for at in range(0, rows, size)]
    return [(costs[cut][masked[cut]], masked[cut], t[cut], maskable[cut]) for cut in cuts]


@pytest.mark.parametrize("normaliser", ["length", "masked"])
@pytest.mark.parametrize("size", [1, 3])
def test_several_micro_batches_are_one_big_batch(normaliser: str, size: int) -> None:
    cut, whole = (micro_batches(Generator().manual_seed(1), 12, rows) for rows in (size, 12))
    assert float(step_loss(cut, normaliser)) == pytest.approx(float(step_loss(whole, normaliser)), rel=1e-6)


def test_the_released_normaliser_is_the_mean_of_micro_batches_by_their_own_counts(noise: Generator) -> None:
    micros = micro_batches(noise, 12, 3)
    each = [float((cost / t[masked.nonzero()[:, 0]]).sum() / masked.sum()) for cost, masked, t, _ in micros]
    assert float(step_loss(micros, "masked_micro")) == pytest.approx(sum(each) / len(each), rel=1e-6)


@pytest.mark.parametrize("normaliser", ["length", "masked", "masked_micro"])
def test_a_batch_with_nothing_masked_costs_nothing(normaliser: str) -> None:
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    loss = step_loss([(torch.empty(0), nothing, torch.full((2,), 1e-3), ~nothing)], normaliser)
    assert float(loss) == 0


def test_an_unknown_normaliser_is_refused() -> None:
    masked = torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ConfigError, match="normaliser='mean' is not known; use one of length, masked"):
        loss_weights(masked, torch.ones(1), masked, normaliser="mean")


# --- scores of completions (coupled-GRPO) ----------------------------------------------------------------------------


def views(
    rows: int, length: int, *, estimator: Estimator = "coupled", ratios: Tensor | None = None, padding: int = 0
) -> tuple[list[View], Tensor, Tensor]:
    """Views of rows whose right half is a completion, with `padding` on the left; with completion and prompt."""
    completion = torch.nn.functional.pad(half(rows, length), (padding, 0))
    prompt = torch.nn.functional.pad(~half(rows, length), (padding, 0))
    ratios = torch.full((1, rows, 2), 0.3) if ratios is None else ratios
    noise = [keyed_generator(1, row) for row in range(rows)]
    return score_views(completion, prompt, ratios, noise, estimator=estimator), completion, prompt


def test_coupled_views_hide_everything_and_then_each_token_once_in_a_pair() -> None:
    (whole, *pairs), completion, _ = views(4, 20, ratios=torch.rand(3, 4, 2) * 0.6 + 0.2)
    assert torch.equal(whole.masked, completion)
    assert len(pairs) == 6
    for first, second in zip(pairs[::2], pairs[1::2], strict=True):
        assert not (first.masked & second.masked).any()
        assert torch.equal(first.masked | second.masked, completion)


def test_coupled_weights_are_one_over_the_ratio_of_their_own_mask() -> None:
    ratios = torch.rand(3, 4, 2) * 0.6 + 0.2
    (whole, *pairs), completion, _ = views(4, 20, ratios=ratios)
    assert torch.equal(whole.weight, completion / 4)
    for ratio, first, second in zip(ratios[:, :, :1], pairs[::2], pairs[1::2], strict=True):
        torch.testing.assert_close(first.weight, first.masked / (4 * ratio))
        torch.testing.assert_close(second.weight, second.masked / (4 * (1 - ratio)))


def test_decoupled_views_are_as_many_and_drawn_by_themselves() -> None:
    ratios = torch.tensor([[[0.2, 0.5]]]).expand(1, 2000, 2)
    (_, first, second), completion, _ = views(2000, 20, estimator="decoupled", ratios=ratios)
    shares = [(view.masked.sum() / completion.sum()).item() for view in (first, second)]
    both = ((first.masked & second.masked).sum() / completion.sum()).item()
    assert [*shares, both] == pytest.approx([0.2, 0.5, 0.1], abs=0.02)
    assert second.weight[second.masked].unique().tolist() == pytest.approx([1 / (2 * 0.5)])


def test_one_pass_estimators_weigh_every_token_once() -> None:
    for estimator in ("full_mask", "d1"):
        (view,), completion, _ = views(500, 20, estimator=estimator)
        assert torch.equal(view.weight, completion.float())
        assert view.masked[completion].all()
    (view,), completion, prompt = views(500, 20, estimator="d1", padding=3)
    assert (view.masked & prompt).sum() / prompt.sum() == pytest.approx(0.15, abs=0.02)
    assert not view.masked[:, :3].any()


@pytest.mark.parametrize("estimator", ["coupled", "decoupled", "d1"])
def test_masks_of_a_row_do_not_depend_on_its_padding(estimator: Estimator) -> None:
    bare, padded = (views(3, 20, estimator=estimator, padding=padding)[0] for padding in (0, 7))
    for one, other in zip(bare, padded, strict=True):
        assert torch.equal(one.masked, other.masked[:, 7:])


@pytest.mark.parametrize("pairs", [1, 3])
def test_coupling_saves_the_variance_that_the_theory_says(pairs: int) -> None:
    """2 L v^2 / (L + 1)^2 for the score, with v the mean of M l / t: DiffuCoder, appendix A.4."""
    rows = 30_000
    completion = torch.ones(rows, 3, dtype=torch.bool)
    ratios = torch.rand(pairs, rows, 2, generator=keyed_generator(2)) * 0.6 + 0.2

    def log_prob(masked: Tensor) -> Tensor:
        """Of every token: the less probable, the more of its neighbours are hidden."""
        return -0.5 - masked.float().mean(-1, keepdim=True) - torch.tensor([0.0, 1.0, 2.0])

    def scores(estimator: Estimator, seed: int) -> list[Tensor]:
        noise = [keyed_generator(seed, row) for row in range(rows)]
        found = score_views(completion, ~completion, ratios, noise, estimator=estimator)
        return [view.weight * log_prob(view.masked) for view in found]

    coupled, decoupled = scores("coupled", 3), scores("decoupled", 4)
    v = torch.stack(decoupled[1:]).mean((0, 1)) * (pairs + 1)  # (3,)
    saved = sum(decoupled).var(0) - sum(coupled).var(0)  # type: ignore[union-attr]  # sums of tensors
    torch.testing.assert_close(saved, 2 * pairs * v**2 / (pairs + 1) ** 2, rtol=0.1, atol=0)
    torch.testing.assert_close(sum(coupled).mean(0), sum(decoupled).mean(0), rtol=0.02, atol=0)  # type: ignore[union-attr]
