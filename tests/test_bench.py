"""The benchmark counts right; what it times depends on the machine, so only its sense is checked."""

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from diffucoder import Denoiser
from diffucoder.bench import bench
from diffucoder.errors import ConfigError

MakeLM = Callable[..., Any]

# Of the `causal_lm` fixture: H = 32, 4 heads and 2 of keys and values, 8 wide each; 48 wide between; 2 layers, V = 67
Q_AND_O, K_AND_V, FEED_FORWARD = 2 * 32 * 32, 2 * 32 * 16, 3 * 32 * 48
LAYERS = 2 * (Q_AND_O + K_AND_V + FEED_FORWARD)
HEAD = 32 * 67


def by_hand(*, batch: int, prompt: int, new: int) -> float:
    """Operations of one pass: a multiply-add is two; attention meets every pair of positions twice in every layer."""
    positions = prompt + new
    attention = 2 * (2 * 2 * 32 * positions * positions)
    return batch * (2 * LAYERS * positions + attention + 2 * HEAD * new)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_operations_are_those_counted_by_hand(causal_lm: MakeLM, kind: str, tied: bool) -> None:
    model = Denoiser.from_causal_lm(causal_lm(kind, tie_word_embeddings=tied), mask_id=66)
    result = bench(model, prompt_tokens=5, new_tokens=7, batch=3, repeats=1)
    assert result.forward_flops == by_hand(batch=3, prompt=5, new=7)


def test_every_figure_is_positive_and_finite(tiny: Denoiser) -> None:
    result = bench(tiny, prompt_tokens=4, new_tokens=6, batch=2, repeats=2)
    figures = {name: value for name, value in asdict(result).items() if not isinstance(value, str)}
    assert all(value > 0 and math.isfinite(value) for value in figures.values()), figures
    assert (result.dtype, result.device, result.batch, result.positions) == ("float32", "cpu", 2, 10)
    assert result.parameters == sum(parameter.numel() for parameter in tiny.parameters())


def test_figures_agree_with_each_other(tiny: Denoiser) -> None:
    result = bench(tiny, prompt_tokens=4, new_tokens=6, repeats=1)
    assert result.flops_per_second == pytest.approx(result.forward_flops / (result.forward_ms / 1e3))
    assert result.share == pytest.approx(result.flops_per_second / result.matmul_flops_per_second)
    assert result.tokens_per_forward == 1  # one token a step


@pytest.mark.parametrize("size", ["prompt_tokens", "new_tokens", "batch", "repeats"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_that_leave_nothing_to_measure_are_refused(tiny: Denoiser, size: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{size}={value} leaves nothing to measure"):
        bench(tiny, **{size: value})


def test_a_canvas_longer_than_the_context_is_refused(tiny: Denoiser) -> None:
    with pytest.raises(ConfigError, match="129 positions exceed the model's context of 128"):
        bench(tiny, prompt_tokens=100, new_tokens=29)
