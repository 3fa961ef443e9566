"""The fast layers: the numbers of transformers' layers, whole canvases and parts, and the weights where they were."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffucoder.models.checkpoint import load_denoiser, save_denoiser
from diffucoder.models.denoiser import Denoiser
from diffucoder.models.layers import FastLayers, plan_layout

MakeLM = Callable[..., Any]


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 60, shape, generator=torch.Generator().manual_seed(seed))


def scores(
    model: Denoiser,
    ids: Tensor,
    *,
    valid: Tensor | None = None,
    feed: Tensor | None = None,
    cache_rows: Sequence[int] | None = None,
    **more: Any,
) -> Tensor:
    """(B, T, V) logits of all positions that a decoding pass can score; nan elsewhere."""
    valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    feed = valid if feed is None else feed
    wanted = (model.scorable(feed) & valid).nonzero()
    [found] = model.score(
        ids,
        valid=valid,
        feed=feed,
        wanted=wanted,
        reduce=lambda logits, _: logits.clone(),
        cache_rows=cache_rows,
        **more,
    )
    everything = found.new_full((*ids.shape, model.vocab_size), torch.nan)
    everything[tuple(wanted.T)] = found
    return everything


def assert_scores(found: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    """Equal in all positions that were scored; at least one is."""
    scored = ~found.isnan().any(-1)
    assert scored.any()
    torch.testing.assert_close(found[scored], expected[scored], rtol=0, atol=atol)


def pair(causal_lm: MakeLM, kind: str = "qwen2", **overrides: Any) -> tuple[Denoiser, Denoiser]:
    """A model by transformers' layers, and the same by the fast ones."""
    plain, fast = (Denoiser.from_causal_lm(causal_lm(kind, **overrides), mask_id=66) for _ in range(2))
    fast.use_fast_layers()
    assert fast.fast is not None
    return plain, fast


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("heads", [4, 2])
def test_they_give_the_scores_of_transformers_layers(causal_lm: MakeLM, kind: str, heads: int) -> None:
    plain, fast = pair(causal_lm, kind, num_key_value_heads=heads)
    ids = tokens(3, 9)
    valid = torch.arange(9) >= torch.tensor([0, 2, 5])[:, None]
    assert_scores(scores(fast, ids), plain(ids))
    assert_scores(scores(fast, ids, valid=valid), plain(ids, valid=valid))
    assert_scores(scores(plain, ids, valid=valid), plain(ids, valid=valid))  # without fast layers


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_a_model_without_the_shift_scores_what_it_is_fed(causal_lm: MakeLM, kind: str) -> None:
    fast = Denoiser.from_causal_lm(causal_lm(kind), mask_id=66, shifted=False)
    plain = Denoiser.from_causal_lm(causal_lm(kind), mask_id=66, shifted=False)
    fast.use_fast_layers()
    ids = tokens(2, 7)
    found = scores(fast, ids)
    assert not found.isnan().any()
    assert_scores(found, plain(ids))
    row = fast.cache.acquire(7)
    scores(fast, ids[:1], cache_rows=[row])
    part = torch.tensor([[False, False, True, True, False, False, True]])
    again = scores(fast, ids[:1], feed=part, cache_rows=[row])
    assert (~again.isnan().any(-1)).equal(part)
    assert_scores(again, plain(ids[:1]))


def test_scaled_positions_are_scaled_here_too(causal_lm: MakeLM) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    plain, fast = pair(causal_lm, "llama", rope_parameters=rope)
    unscaled, _ = pair(causal_lm, "llama")
    ids = tokens(1, 12)
    assert_scores(scores(fast, ids), plain(ids))
    assert (plain(ids) - unscaled(ids)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_a_window_over_a_fresh_cache_is_the_whole_canvas(causal_lm: MakeLM, kind: str) -> None:
    plain, fast = pair(causal_lm, kind)
    ids, lengths = tokens(2, 10), torch.tensor([10, 7])  # the second row is shorter: three positions of padding
    valid = torch.arange(10) >= 10 - lengths[:, None]
    rows = [fast.cache.acquire(length) for length in lengths.tolist()]
    whole = plain(ids, valid=valid)
    assert_scores(scores(fast, ids, valid=valid, cache_rows=rows), whole)
    window = torch.zeros_like(valid)
    window[:, 5:9] = True
    again = scores(fast, ids, valid=valid, feed=window, cache_rows=rows)
    assert (~again.isnan().any(-1)).nonzero().tolist() == [[row, at] for row in (0, 1) for at in (6, 7, 8)]
    assert_scores(again, whole)


def test_a_window_sees_the_rest_as_it_was(causal_lm: MakeLM) -> None:
    _, fast = pair(causal_lm)
    ids = tokens(1, 8)
    row = fast.cache.acquire(8)
    before = scores(fast, ids, cache_rows=[row])
    changed = torch.cat([(ids[:, :1] + 1) % 60, ids[:, 1:]], 1)
    window = torch.arange(8)[None] >= 4
    assert_scores(scores(fast, changed, feed=window, cache_rows=[row]), before)
    assert (scores(fast, changed) - before)[:, 5:].abs().max() > 1e-3


def test_canvases_have_rows_of_a_cache_and_are_kept_apart(causal_lm: MakeLM) -> None:
    _, fast = pair(causal_lm)
    ids = tokens(2, 6)
    first, second = fast.cache.acquire(6), fast.cache.acquire(6)
    before = scores(fast, ids, cache_rows=[first, second])
    third = fast.cache.acquire(6)  # there is no room for it yet: the others stay as they are
    other = tokens(1, 6, seed=1)
    scores(fast, other, cache_rows=[third])
    late = (torch.arange(6) >= 2).expand(3, 6)
    found = scores(fast, torch.cat([ids[1:], other, ids[:1]]), feed=late, cache_rows=[second, third, first])
    assert_scores(found[:1], before[1:])
    assert_scores(found[2:], before[:1])
    assert (found[1] - found[0])[3:].abs().max() > 1e-3


def test_rows_are_acquired_and_released(causal_lm: MakeLM) -> None:
    _, fast = pair(causal_lm)
    cache = fast.cache
    first = cache.acquire(4)
    second = cache.acquire(9)  # a longer canvas: more slots for all
    assert (first, second, cache.rows, cache.slots) == (0, 1, 2, 9)
    cache.release(first)
    assert (cache.acquire(4), cache.rows, cache.in_use) == (0, 2, 2)
    cache.release(first)
    cache.release(second)
    assert (cache.rows, cache.slots, cache.in_use) == (0, 0, 0)
    assert sum(layer.numel() for layer in (*cache.keys, *cache.values)) == 0


def test_padding_may_be_all_of_a_row(causal_lm: MakeLM) -> None:
    plain, fast = pair(causal_lm)
    ids = tokens(3, 40)
    valid = torch.ones(3, 40, dtype=torch.bool)
    valid[1, :35] = False
    valid[2] = False
    assert_scores(scores(fast, ids, valid=valid), plain(ids, valid=valid))


def test_a_cache_that_memory_cannot_grow_is_as_it_was(causal_lm: MakeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast = pair(causal_lm)
    cache = fast.cache
    held = cache.acquire(4), cache.acquire(4)
    before = [*cache.keys, *cache.values]
    calls = iter(range(100))

    def scarce(layer: Tensor, _: Sequence[int]) -> Tensor:
        if next(calls) == 1:  # the first layer's keys have found room
            raise torch.OutOfMemoryError
        return layer.clone()

    monkeypatch.setattr("torch.nn.functional.pad", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        cache.acquire(9)
    assert all(one is other for one, other in zip([*cache.keys, *cache.values], before, strict=True))
    assert (cache.lengths(held), cache.rows, cache.in_use) == ([4, 4], 2, 2)


@pytest.mark.parametrize("places", [[0], [3], [5, 1], [2, 0, 4], [4, 3, 2, 1, 0, 5]])
@pytest.mark.parametrize("compiled", [False, True])
def test_passes_over_any_rows_of_a_cache_equal_passes_over_their_own(
    causal_lm: MakeLM, places: list[int], compiled: bool
) -> None:
    """Few rows of many are attended to as copies, most of them where they are; padding of windows is left out."""
    _, fast = pair(causal_lm)
    _, alone = pair(causal_lm)
    fast.compiled = compiled  # fed as compiled layers are
    lengths = torch.tensor([8, 5, 7, 8, 6, 8])
    rows = [fast.cache.acquire(length) for length in lengths.tolist()]
    ids = tokens(6, 8)
    valid = torch.arange(8) >= 8 - lengths[:, None]
    scores(fast, ids, valid=valid, cache_rows=rows)
    changed = tokens(6, 8, seed=1)
    feed = (torch.arange(8) >= 3) & valid
    feed[:, 5] &= torch.arange(6) % 2 == 0  # gaps, and so windows of two widths
    found = scores(fast, changed[places], valid=valid[places], feed=feed[places], cache_rows=places)
    for number, row in enumerate(places):
        own = slice(8 - int(lengths[row]), None)
        place = alone.cache.acquire(int(lengths[row]))
        scores(alone, ids[row : row + 1, own], cache_rows=[place])
        expected = scores(alone, changed[row : row + 1, own], feed=feed[row : row + 1, own], cache_rows=[place])
        assert (~found[number, own].isnan()).equal(~expected[0].isnan())
        assert_scores(found[number : number + 1, own], expected)


WIDTHS = torch.tensor([70, 3, 40, 0, 33, 16, 65, 17])


@pytest.mark.parametrize("step", [1, 32])
@pytest.mark.parametrize("cached", [False, True])
def test_rows_of_many_widths_are_rectangles_of_their_own(
    causal_lm: MakeLM, monkeypatch: pytest.MonkeyPatch, cached: bool, step: int
) -> None:
    plain, fast = pair(causal_lm)
    monkeypatch.setattr(fast, "_feed_step", lambda _: step)
    ids = tokens(8, 70)
    late = torch.arange(70) >= 70 - WIDTHS[:, None]
    valid, rows = late, None
    if cached:  # whole canvases, of which parts of these widths are fed again
        valid = torch.ones_like(late)
        rows = [fast.cache.acquire(70) for _ in range(8)]
        scores(fast, ids, valid=valid, cache_rows=rows)
    found = scores(fast, ids, valid=valid, feed=late, cache_rows=rows)
    assert_scores(found, plain(ids, valid=valid))
    assert (~found.isnan().any(-1)).equal(fast.scorable(late))


def test_rectangles_are_of_rows_within_a_factor_of_two_and_compiled_layers_have_one(causal_lm: MakeLM) -> None:
    _, fast = pair(causal_lm)
    late = torch.arange(70) >= 70 - WIDTHS[:, None]
    more: dict[str, Any] = {"step": 1, "cache": fast.cache, "cache_rows": None}
    widths = {}
    for name, static, device in (("cpu", False, "cpu"), ("compiled", True, "cpu"), ("elsewhere", False, "meta")):
        fed, layout = plan_layout(late, late.long(), static=static, device=torch.device(device), **more)
        widths[name] = sorted((each.rows, each.width) for each in layout.rectangles)
        assert sorted(fed.tolist()) == late.flatten().nonzero()[:, 0].tolist()
    by_cpu = [(1, 17), (2, 16), (2, 40), (2, 70)]
    assert widths == {"cpu": by_cpu, "compiled": [(8, 96)], "elsewhere": [(8, 70)]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_up_what_is_fed_changes_nothing(causal_lm: MakeLM, dtype: torch.dtype) -> None:
    _, fast = pair(causal_lm)
    fast = fast.to(dtype)
    ids = tokens(3, 9)
    valid = torch.arange(9) >= torch.tensor([0, 2, 5])[:, None]
    one_by_one = torch.cat([scores(fast, ids[row : row + 1], valid=valid[row : row + 1]) for row in range(3)])
    assert_scores(scores(fast, ids, valid=valid), one_by_one, atol=1e-5 if dtype == torch.float32 else 0.3)


def test_a_token_that_is_repeated_to_round_up_is_seen_once(causal_lm: MakeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast = pair(causal_lm)
    monkeypatch.setattr(fast, "_feed_step", lambda _: 8)
    ids = tokens(2, 4)
    valid = torch.arange(4) >= torch.tensor([0, 1])[:, None]  # seven tokens: with one more, as many as two full rows
    assert_scores(scores(fast, ids, valid=valid), plain(ids, valid=valid))


def test_the_models_weights_are_views_and_stay_savable(causal_lm: MakeLM, tmp_path: Path) -> None:
    plain, fast = pair(causal_lm)
    attention = fast.model.base_model.layers[0].self_attn
    storages = {p.weight.untyped_storage().data_ptr() for p in (attention.q_proj, attention.k_proj, attention.v_proj)}
    assert len(storages) == 1
    save_denoiser(plain, tmp_path / "plain")
    save_denoiser(fast, tmp_path / "fast")
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "fast")]
    assert same[0] == same[1]
    again = load_denoiser(tmp_path / "fast", dtype=torch.float32, device="cpu")
    torch.testing.assert_close(again(tokens(1, 5)), plain(tokens(1, 5)), rtol=0, atol=0)


def test_changed_weights_are_seen_and_cast_ones_too(causal_lm: MakeLM) -> None:
    plain, fast = pair(causal_lm)
    for model in (plain, fast):
        for parameter in model.parameters():
            parameter.mul_(1.01)
    assert_scores(scores(fast, tokens(1, 5)), plain(tokens(1, 5)))
    half = scores(fast.to(torch.bfloat16), tokens(1, 5))
    assert half.dtype == torch.bfloat16
    assert fast.fast is not None
    torch.testing.assert_close(half[:, 1:], plain.to(torch.bfloat16)(tokens(1, 5))[:, 1:], rtol=0.1, atol=0.5)


def test_gradients_and_released_numbers_come_from_transformers_layers(causal_lm: MakeLM) -> None:
    plain, fast = pair(causal_lm)
    ids = tokens(2, 7)
    assert_scores(scores(fast, ids, reference=True), plain(ids), atol=0)
    with torch.enable_grad():
        fast(ids).sum().backward()
    assert fast.model.base_model.layers[0].self_attn.k_proj.weight.grad is not None


def test_a_snapshot_in_another_dtype_leaves_the_model_alone(causal_lm: MakeLM) -> None:
    plain, _ = pair(causal_lm)
    ids = tokens(1, 6)
    with plain.fast_snapshot(torch.bfloat16):
        rough = scores(plain, ids)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float()[:, 1:], plain(ids)[:, 1:], rtol=0.1, atol=0.5)
    assert plain.dtype == torch.float32
    assert plain.fast is None


@pytest.mark.parametrize(
    "overrides",
    [{"hidden_act": "gelu"}, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}],
)
def test_layers_it_does_not_know_are_left_to_transformers(causal_lm: MakeLM, overrides: dict[str, Any]) -> None:
    model = causal_lm("llama", **overrides)
    assert FastLayers.of(model) is None
    denoiser = Denoiser.from_causal_lm(model, mask_id=66)
    denoiser.use_fast_layers()
    assert denoiser.fast is None
    assert_scores(scores(denoiser, tokens(1, 4)), denoiser(tokens(1, 4)))
