"""Oracle 2: the `reference` preset equals the released code, recorded and rewritten, in every step."""

from collections import Counter
from typing import Any

import pytest
import torch
from scripted import MASK, Scripted, canvas, released, rugged

from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.step import Sequence, advance, denoise
from diffucoder.models.denoiser import Denoiser


def test_every_recorded_step_is_reproduced(dream_tiny: Denoiser, recordings: list[Any]) -> None:
    for recording in recordings:
        steps = list(denoise(dream_tiny, recording.canvas, recording.params))
        assert torch.equal(torch.stack([step.canvas for step in steps]), recording.history)
        assert torch.equal(steps[-1].canvas, recording.sequences)
        assert steps[-1].forward_passes == recording.params.steps


def test_recorded_requests_are_reproduced_in_one_batch_of_all(dream_tiny: Denoiser, recordings: list[Any]) -> None:
    rows = [(recording, row) for recording in recordings for row in range(len(recording.sequences))]
    states = [Sequence(recording.canvas, recording.params, row=row) for recording, row in rows]
    while active := [state for state in states if state.finish_reason is None]:
        advance(dream_tiny, active)
    for state, (recording, row) in zip(states, rows, strict=True):
        assert torch.equal(state.tokens, recording.sequences[row][recording.canvas.valid[row]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize(
    "dream",
    [{"steps": 9}, {"steps": 4, "top_p": 0.7}, {"steps": 7, "top_k": 3}, {"steps": 20, "top_p": 0.9, "top_k": 4}],
    ids=str,
)
def test_the_released_loop_is_reproduced(dream: dict[str, Any], alg: str, dtype: torch.dtype) -> None:
    model = Scripted(rugged, dtype=dtype)  # in bf16 many confidences are equal
    start = canvas([1, 2, 3], [4, 5, 6], [2, 2, 2], new_tokens=16)
    expected = released(model.logits, start.tokens, alg=alg, **dream)
    steps = denoise(model, start, DecodingParams.from_dream(alg=alg, **dream))
    assert torch.equal(torch.stack([step.canvas for step in steps]), torch.stack(expected))


SAMPLES = 3_000


@pytest.mark.parametrize(
    "dream",
    [
        {"steps": 3, "alg": "origin", "temperature": 1.0},
        {"steps": 3, "alg": "maskgit_plus", "temperature": 0.8, "top_k": 4},
        {"steps": 2, "alg": "topk_margin", "temperature": 1.0, "top_p": 0.8},
        {"steps": 3, "alg": "entropy", "temperature": 0.5, "alg_temp": 0.3},
        {"steps": 2, "alg": "entropy", "alg_temp": 0.5, "eps": 0.2},
    ],
    ids=str,
)
def test_the_released_loop_has_the_same_distribution(dream: dict[str, Any]) -> None:
    model = Scripted(lambda tokens, place: 1.5 * rugged(tokens, place), chunk=SAMPLES)
    start = canvas([1, 2], new_tokens=3)
    torch.manual_seed(0)
    theirs = released(model.logits, start.tokens.repeat(SAMPLES, 1), **dream)
    params = DecodingParams.from_dream(num_return_sequences=SAMPLES, **dream)
    ours = [step.canvas for step in denoise(model, start, params)]
    for mine, yours in zip(ours, theirs, strict=True):
        assert_same_distribution(mine, yours)


def assert_same_distribution(one: torch.Tensor, other: torch.Tensor) -> None:
    """Two-sample chi-square over whole rows; rare ones share a cell."""
    counts = [Counter(map(tuple, rows.tolist())) for rows in (one, other)]
    total = counts[0] + counts[1]
    cell = {row: row if total[row] >= 20 else None for row in total}
    cells = [Counter[object]() for _ in counts]
    for count, into in zip(counts, cells, strict=True):
        for row, number in count.items():
            into[cell[row]] += number
    keys = set(cells[0]) | set(cells[1])
    statistic = sum((cells[0][k] - cells[1][k]) ** 2 / (cells[0][k] + cells[1][k]) for k in keys)
    freedom = max(len(keys) - 1, 1)
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 6, (statistic, freedom)  # about 4 sigma


def test_a_mask_is_never_proposed_even_where_the_model_wants_one() -> None:
    model = Scripted(lambda tokens, place: rugged(tokens, place) + 9 * (torch.arange(12) == MASK))
    *_, last = denoise(model, canvas([1, 2], new_tokens=6), DecodingParams.from_dream(steps=6, alg="entropy"))
    assert not (last.canvas == MASK).any()
