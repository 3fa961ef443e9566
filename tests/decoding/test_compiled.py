"""A compiled step equals the eager one, keeps to a few shapes, and never waits for the device."""

import shutil
from typing import Any

import pytest
import torch
from scripted import canvas

from diffucoder import DecodingParams, Denoiser
from diffucoder.decoding.step import Sequence, advance, denoise
from diffucoder.models.layers import Layout

WAYS: list[dict[str, Any]] = [
    {},
    {"policy": "margin", "threshold": 0.05},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 3},
    {"block": 4, "cache": "dual", "policy": "max_prob"},
    {"cache": "delayed", "entropy_bound": 2.5},
    {"revoke": 0.5, "cache": "delayed"},
]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles by way of g++")
def test_a_compiled_step_equals_the_eager_one(tiny: Denoiser) -> None:
    start = canvas([5, 6, 7, 8], [9, 10], [11], new_tokens=9, mask_id=tiny.mask_id, pad_id=1)
    ways = [WAYS[0], WAYS[2], WAYS[3]]  # each takes as long as a compiler does
    eager = [list(denoise(tiny, start, DecodingParams(**way))) for way in ways]
    tiny.use_fast_layers(compiled=True)
    for way, expected in zip(ways, eager, strict=True):
        found = list(denoise(tiny, start, DecodingParams(**way)))
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.canvas, other.canvas)
            torch.testing.assert_close(one.confidence, other.confidence, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", [{}, {"cache": "delayed"}], ids=str)
def test_compiled_layers_are_fed_few_shapes(tiny: Denoiser, way: dict[str, Any]) -> None:
    params = DecodingParams(policy="max_prob", **way)
    prompts = [[[7] * length for length in lengths] for lengths in ([3], [4, 9, 2], [17, 1, 1, 1], [30, 5])]
    starts = [canvas(*rows, new_tokens=8, mask_id=tiny.mask_id, pad_id=1) for rows in prompts]
    tiny.use_fast_layers()
    eager = [list(denoise(tiny, start, params))[-1].canvas for start in starts]
    layers = tiny.fast
    assert layers is not None
    run, shapes = layers._run, set()

    def watched(tokens: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: Layout) -> torch.Tensor:
        [rectangle] = layout.rectangles
        shapes.add((len(tokens), rectangle.rows, rectangle.width))
        return run(tokens, cos, sin, layout)

    layers._run, tiny.compiled = watched, True  # as if they were
    for start, expected in zip(starts, eager, strict=True):
        *_, last = denoise(tiny, start, params)
        assert torch.equal(last.canvas, expected)
    assert shapes <= {(n, rows, width) for n in (64, 128, 192) for rows in (1, 2, 4) for width in (32, 64)}


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_step_does_not_wait_for_the_device_inside(tiny: Denoiser, way: dict[str, Any]) -> None:
    """On a device without values whoever asks for one fails; only what a step brings back is asked for, at its end."""
    start = canvas([5, 6, 7, 8], [9, 10], new_tokens=8, mask_id=tiny.mask_id, pad_id=1)
    tiny.use_fast_layers()
    tiny.to("meta")
    states = [Sequence(start, DecodingParams(**way), row=row) for row in range(2)]
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        advance(tiny, states)
