"""A compiled step equals the eager one, keeps to a few shapes, and never waits for the device."""

import shutil
from typing import Any

import pytest
import torch
from scripted import canvas

from diffucoder import DecodingParams, Denoiser
from diffucoder.decoding.denoise import DecodeState, advance, denoise

WAYS: list[dict[str, Any]] = [
    {},
    {"policy": "margin", "threshold": 0.05},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 3},
    {"block": 4, "cache": "dual", "policy": "max_prob"},
    {"cache": "delayed", "entropy_bound": 2.5},
    {"horizon": 5, "drafts": 2},
]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles by way of g++")
def test_a_compiled_step_equals_the_eager_one(tiny: Denoiser) -> None:
    start = canvas([5, 6, 7, 8], [9, 10], [11], new_tokens=9, mask_id=tiny.mask_id, pad_id=1)
    ways = [WAYS[0], WAYS[2], WAYS[3]]  # each takes as long as a compiler does
    eager = [list(denoise(tiny, start, DecodingParams(**way))) for way in ways]
    tiny.use_lean(compiled=True)
    for way, expected in zip(ways, eager, strict=True):
        found = list(denoise(tiny, start, DecodingParams(**way)))
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.canvas, other.canvas)
            torch.testing.assert_close(one.confidence, other.confidence, rtol=0, atol=1e-5)


def test_a_compiled_model_is_fed_few_shapes(tiny: Denoiser) -> None:
    shapes = set()

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return True if name == "compiled" else getattr(tiny, name)

        def __call__(self, tokens: torch.Tensor, *, rows: torch.Tensor, **more: Any) -> Any:
            shapes.add((*tokens.shape, len(rows)))
            return tiny(tokens, rows=rows, **more)

    model: Any = Watched()
    for lengths in ([3], [4, 9, 2], [17, 1, 1, 1], [30, 5]):
        start = canvas(*([7] * length for length in lengths), new_tokens=8, mask_id=tiny.mask_id, pad_id=1)
        *_, alone = denoise(tiny, start, DecodingParams(policy="max_prob"))
        *_, padded = denoise(model, start, DecodingParams(policy="max_prob"))
        assert torch.equal(alone.canvas, padded.canvas)
    assert shapes <= {(rows, width, 32) for rows in (1, 2, 4) for width in (32, 64)}


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_step_does_not_wait_for_the_device_inside(tiny: Denoiser, way: dict[str, Any]) -> None:
    """On a device without values whoever asks for one fails; only what a step brings back is asked for, at its end."""
    start = canvas([5, 6, 7, 8], [9, 10], new_tokens=8, mask_id=tiny.mask_id, pad_id=1)
    tiny.use_lean()
    tiny.to("meta")
    states = [DecodeState(start, DecodingParams(**way), row=row) for row in range(2)]
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        advance(tiny, states)
