"""The lean body: the numbers of transformers' layers, whole canvases and windows, and the weights where they were."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffucoder.models.checkpoint import load_denoiser, save_denoiser
from diffucoder.models.denoiser import Denoiser
from diffucoder.models.lean import LeanBody

MakeLM = Callable[..., Any]


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 60, shape, generator=torch.Generator().manual_seed(seed))


def pair(causal_lm: MakeLM, kind: str = "qwen2", **overrides: Any) -> tuple[Denoiser, Denoiser]:
    """A model by transformers' layers, and the same by the lean body."""
    plain, lean = (Denoiser.from_causal_lm(causal_lm(kind, **overrides), mask_id=66) for _ in range(2))
    lean.use_lean()
    assert lean._lean is not None
    return plain, lean


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("heads", [4, 2])
def test_it_gives_the_scores_of_transformers_layers(causal_lm: MakeLM, kind: str, heads: int) -> None:
    plain, lean = pair(causal_lm, kind, num_key_value_heads=heads)
    ids = tokens(3, 9)
    valid = torch.arange(9) >= torch.tensor([0, 2, 5])[:, None]
    torch.testing.assert_close(lean(ids), plain(ids), rtol=0, atol=1e-5)
    torch.testing.assert_close(lean(ids, valid=valid)[valid], plain(ids, valid=valid)[valid], rtol=0, atol=1e-5)
    triangle = torch.ones(9, 9, dtype=torch.bool).tril()
    torch.testing.assert_close(lean(ids, attention=triangle), plain(ids, attention=triangle), rtol=0, atol=1e-5)


def test_scaled_positions_are_scaled_here_too(causal_lm: MakeLM) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    plain, lean = pair(causal_lm, "llama", rope_parameters=rope)
    unscaled, _ = pair(causal_lm, "llama")
    ids = tokens(1, 12)
    torch.testing.assert_close(lean(ids), plain(ids), rtol=0, atol=1e-5)
    assert (lean(ids) - unscaled(ids)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_hidden_states_without_a_mean_give_the_same_scores(causal_lm: MakeLM, kind: str) -> None:
    """A root mean square over H entries is a standard deviation over a few more, whose sum is 0 (`Centred`)."""
    plain, lean = pair(causal_lm, kind)
    for name, parameter in lean.named_parameters():
        if "norm" in name:  # of ones otherwise, by which nothing is seen
            parameter.mul_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) + 0.5)
    plain.load_state_dict(lean.state_dict())

    def copied(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        return lambda hidden: torch.nn.functional.linear(hidden, weight, bias)

    lean._lean = LeanBody.of(lean.model, copy=copied, centred=True)
    assert lean._lean is not None
    hidden = lean._lean(tokens(2, 9))  # (2, 9, H')
    assert hidden.shape[-1] > lean.config.hidden_size
    assert hidden.mean(-1).abs().max() < 1e-6
    ids, valid = tokens(3, 9), torch.arange(9) >= torch.tensor([0, 2, 5])[:, None]
    torch.testing.assert_close(lean(ids, valid=valid)[valid], plain(ids, valid=valid)[valid], rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_a_window_over_a_fresh_cache_is_the_whole_canvas(causal_lm: MakeLM, kind: str) -> None:
    plain, lean = pair(causal_lm, kind)
    ids, lengths = tokens(2, 10), torch.tensor([10, 7])  # the second row is shorter: three positions of padding
    valid = torch.arange(10) >= 10 - lengths[:, None]
    positions = (torch.arange(10) - (10 - lengths[:, None])).clamp(min=0)
    cache = lean.new_cache(lengths)
    whole = plain(ids, valid=valid)
    filled = lean(ids, valid=valid, positions=positions, cache=cache)
    torch.testing.assert_close(filled[valid], whole[valid], rtol=0, atol=1e-5)
    window = slice(5, 9)
    again = lean(ids[:, window], valid=valid[:, window], positions=positions[:, window], cache=cache)
    torch.testing.assert_close(again[:, 1:], whole[:, 6:9], rtol=0, atol=1e-5)  # the first has no neighbour there


def test_a_window_sees_the_rest_as_it_was(causal_lm: MakeLM) -> None:
    _, lean = pair(causal_lm)
    ids, places = tokens(1, 8), torch.arange(8)[None]
    cache = lean.new_cache(torch.tensor([8]))
    before = lean(ids, positions=places, cache=cache)
    changed = torch.cat([(ids[:, :1] + 1) % 60, ids[:, 1:]], 1)
    stale = lean(changed[:, 4:], positions=places[:, 4:], cache=cache)
    torch.testing.assert_close(stale[:, 1:], before[:, 5:], rtol=0, atol=1e-5)
    assert (lean(changed) - before)[:, 5:].abs().max() > 1e-3


def test_canvases_take_rows_of_a_cache_and_are_kept_apart(causal_lm: MakeLM) -> None:
    _, lean = pair(causal_lm)
    ids, at = tokens(2, 6), torch.arange(6).expand(2, 6)
    cache = lean.new_cache(torch.tensor([6, 6]))
    first, second = cache.take(6), cache.take(6)
    before = lean(ids, positions=at, cache=cache, places=[first.row, second.row])
    other = cache.take(6)  # a third, for which there is no room yet: the others stay as they are
    other.copy(second, 6)
    part = ids[[1, 1, 0], 2:].clone()
    part[1] = 3
    found = lean(part, positions=at[[0, 0, 0], 2:], cache=cache, places=[second.row, other.row, first.row])
    torch.testing.assert_close(found[0, 1:], before[1, 3:], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[2, 1:], before[0, 3:], rtol=0, atol=1e-5)
    assert (found[1] - found[0]).abs().max() > 1e-3


def test_a_row_is_free_once_nobody_holds_its_place(causal_lm: MakeLM) -> None:
    _, lean = pair(causal_lm)
    cache = lean.new_cache(torch.tensor([4]))
    first = cache.take(4)
    second = cache.take(9)  # a longer canvas: more slots for all
    assert (first.row, second.row, len(cache), cache.slots) == (0, 1, 2, 10)
    del first
    assert (cache.take(4).row, len(cache)) == (0, 2)


def test_padding_may_stand_on_either_side_and_be_all_of_a_row(causal_lm: MakeLM) -> None:
    plain, lean = pair(causal_lm)
    ids = tokens(4, 40)
    valid = torch.ones(4, 40, dtype=torch.bool)
    valid[1, 10:], valid[2, :35], valid[3] = False, False, False
    torch.testing.assert_close(lean(ids, valid=valid)[valid], plain(ids, valid=valid)[valid], rtol=0, atol=1e-5)


def test_a_cache_that_memory_cannot_grow_is_as_it_was(causal_lm: MakeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    _, lean = pair(causal_lm)
    cache = lean.new_cache(torch.tensor([4, 4]))
    held = cache.take(4), cache.take(4)
    before = list(cache.keys), list(cache.values), list(cache.lengths)
    calls = iter(range(100))

    def scarce(self: Tensor, *shape: int) -> Tensor:
        if next(calls) == 1:  # the first layer's keys have found room
            raise torch.OutOfMemoryError
        return torch.zeros(*shape)

    monkeypatch.setattr(Tensor, "new_zeros", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        cache.take(9)
    assert all(one is other for one, other in zip([*cache.keys, *cache.values], [*before[0], *before[1]], strict=True))
    assert (cache.lengths, len(cache), [place.row for place in held]) == (before[2], 2, [0, 1])


@pytest.mark.parametrize("places", [[0], [3], [5, 1], [2, 0, 4], [4, 3, 2, 1, 0, 5]])
def test_passes_over_any_rows_of_a_cache_equal_passes_over_their_own(causal_lm: MakeLM, places: list[int]) -> None:
    """Few rows of many are attended to as copies, most of them where they lie; padding of windows is left out."""
    _, lean = pair(causal_lm)
    lengths = torch.tensor([8, 5, 7, 8, 6, 8])
    cache, ids = lean.new_cache(lengths), tokens(6, 8)
    valid = torch.arange(8) >= 8 - lengths[:, None]
    at = (torch.arange(8) - (8 - lengths[:, None])).clamp(min=0)
    lean(ids, valid=valid, positions=at, cache=cache)
    changed = tokens(6, 8, seed=1)
    shown = (torch.arange(8) >= 3) & valid
    shown[:, 5] &= torch.arange(6) % 2 == 0  # gaps, and so windows of two widths
    widths = [int(shown[row].sum()) for row in places]
    window, real, where = (torch.zeros(len(places), max(widths), dtype=torch.long) for _ in range(3))
    for number, (row, width) in enumerate(zip(places, widths, strict=True)):
        for into, these in ((window, changed), (where, at), (real, valid.long())):
            into[number, -width:] = these[row, shown[row]]
    found = lean(window, valid=real.bool(), positions=where, cache=cache, places=places)
    for number, (row, width) in enumerate(zip(places, widths, strict=True)):
        alone = lean.new_cache(lengths[row : row + 1])
        own = slice(8 - int(lengths[row]), None)
        lean(ids[row : row + 1, own], positions=at[row : row + 1, own], cache=alone)
        expected = lean(
            window[number : number + 1, -width:], positions=where[number : number + 1, -width:], cache=alone
        )
        torch.testing.assert_close(found[number, -width:], expected[0], rtol=0, atol=1e-5)


def test_the_models_weights_are_views_and_stay_savable(causal_lm: MakeLM, tmp_path: Path) -> None:
    plain, lean = pair(causal_lm)
    attention = lean.model.base_model.layers[0].self_attn
    storages = {p.weight.untyped_storage().data_ptr() for p in (attention.q_proj, attention.k_proj, attention.v_proj)}
    assert len(storages) == 1
    save_denoiser(plain, tmp_path / "plain")
    save_denoiser(lean, tmp_path / "lean")
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "lean")]
    assert same[0] == same[1]
    again = load_denoiser(tmp_path / "lean", dtype=torch.float32, device="cpu")
    torch.testing.assert_close(again(tokens(1, 5)), plain(tokens(1, 5)), rtol=0, atol=0)


def test_changed_weights_are_seen_and_cast_ones_too(causal_lm: MakeLM) -> None:
    plain, lean = pair(causal_lm)
    for model in (plain, lean):
        for parameter in model.parameters():
            parameter.mul_(1.01)
    torch.testing.assert_close(lean(tokens(1, 5)), plain(tokens(1, 5)), rtol=0, atol=1e-5)
    half = lean.to(torch.bfloat16)(tokens(1, 5))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, plain.to(torch.bfloat16)(tokens(1, 5)), rtol=0.1, atol=0.5)


def test_gradients_and_released_numbers_come_from_transformers_layers(causal_lm: MakeLM) -> None:
    plain, lean = pair(causal_lm)
    ids = tokens(2, 7)
    torch.testing.assert_close(lean(ids, released=True), plain(ids), rtol=0, atol=0)
    with torch.enable_grad():
        lean(ids).sum().backward()
    assert lean.model.base_model.layers[0].self_attn.k_proj.weight.grad is not None


def test_a_snapshot_in_another_dtype_leaves_the_model_alone(causal_lm: MakeLM) -> None:
    plain, lean = pair(causal_lm)
    ids = tokens(1, 6)
    with plain.lean_snapshot(torch.bfloat16):
        rough = plain(ids)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), lean(ids), rtol=0.1, atol=0.5)
    assert plain.dtype == torch.float32
    assert plain._lean is None


@pytest.mark.parametrize(
    "overrides",
    [{"hidden_act": "gelu"}, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}],
)
def test_layers_it_does_not_know_are_left_to_transformers(causal_lm: MakeLM, overrides: dict[str, Any]) -> None:
    model = causal_lm("llama", **overrides)
    assert LeanBody.of(model) is None
    denoiser = Denoiser.from_causal_lm(model, mask_id=66)
    denoiser.use_lean()
    assert denoiser(tokens(1, 4)).shape == (1, 4, 67)
