"""The preset `fast`: what it stands for, and that it is measured once and chosen by what was measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import canvas

from diffucoder import DecodingParams, Denoiser, DiffuCoder
from diffucoder.decoding import tuning
from diffucoder.decoding.denoise import DecodeState, denoise
from diffucoder.decoding.tuning import ENTROPY_BOUND, THRESHOLD, WAYS, tuned

FAST = DecodingParams(preset="fast")


@pytest.fixture
def times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What a pass takes each way, as if it had been measured; may be changed."""
    made = {way.name: 1.0 for way in WAYS}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "measure", lambda *_: dict(made))
    return made


def start(tiny: Denoiser, *lengths: int) -> Any:
    return canvas(*([7] * length for length in lengths), new_tokens=8, mask_id=tiny.mask_id, pad_id=1)


def test_other_presets_are_what_they_say(tiny: Denoiser) -> None:
    for params in (DecodingParams(), DecodingParams(preset="reference"), DecodingParams(threshold=0.5)):
        assert tuned(params, tiny, start(tiny, 3)) is params


@pytest.mark.parametrize(
    ("quick", "settings"),
    [
        ("whole", {}),
        ("delayed", {"cache": "delayed"}),
        ("drafts", {"drafts": 3}),
    ],
)
def test_fast_is_exact_with_what_is_quickest_here(
    tiny: Denoiser, times: dict[str, float], quick: str, settings: dict[str, Any]
) -> None:
    times[quick] = 0.1
    expected = DecodingParams(entropy_bound=ENTROPY_BOUND, **settings)
    assert tuned(FAST, tiny, start(tiny, 3, 5)) == expected


def test_what_is_asked_for_stays(tiny: Denoiser, times: dict[str, float]) -> None:
    times["delayed"] = 0.1
    kept: Any = {"cache": "delayed"}

    def settings(**own: Any) -> DecodingParams:
        return tuned(FAST.replace(**own), tiny, start(tiny, 3))

    assert settings(temperature=0.5, seed=3) == DecodingParams(
        temperature=0.5, seed=3, entropy_bound=ENTROPY_BOUND, **kept
    )
    assert settings(policy="margin") == DecodingParams(policy="margin", threshold=THRESHOLD, **kept)
    assert settings(threshold=0.8) == DecodingParams(threshold=0.8, **kept)
    assert settings(steps=4) == DecodingParams(steps=4, **kept)
    assert settings(block=2) == DecodingParams(block=2, entropy_bound=ENTROPY_BOUND)
    assert settings(branches=3) == DecodingParams(branches=3, entropy_bound=ENTROPY_BOUND)
    assert settings(adaptive=True, policy="max_prob") == DecodingParams(adaptive=True, policy="max_prob")


def test_passes_are_timed_once_for_a_size_of_canvas(
    tiny: Denoiser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured, real = [], tuning.measure
    monkeypatch.setattr(tuning, "measure", lambda model, *size: measured.append(size) or real(model, *size))
    for _ in range(2):
        tuned(FAST, tiny, start(tiny, 3))
        tuned(FAST, tiny, start(tiny, 9, 4, 2))
        tuned(FAST.replace(num_samples=4), tiny, start(tiny, 3))
    assert measured == [(1, 32, 32), (4, 32, 32)]
    kept = json.loads((tmp_path / "diffucoder" / "passes.json").read_text())
    assert len(kept) == 2
    assert all(taken > 0 for each in kept.values() for taken in each.values())


@pytest.mark.parametrize("file", ["", "{", "[]", '{"other": {}}'])
def test_a_broken_file_of_times_is_measured_anew(tiny: Denoiser, tmp_path: Path, times: Any, file: str) -> None:
    (tmp_path / "diffucoder").mkdir()
    (tmp_path / "diffucoder" / "passes.json").write_text(file)
    times["drafts"] = 0.1
    assert tuned(FAST, tiny, start(tiny, 3)).drafts == 3


def test_where_no_file_can_be_written_it_is_measured_each_time(
    tiny: Denoiser, tmp_path: Path, times: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    times["delayed"] = 0.1
    assert tuned(FAST, tiny, start(tiny, 3)).cache == "delayed"


def test_a_model_of_other_layers_is_decoded_whole(
    tiny: Denoiser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiny.model.config.hidden_act = "gelu"
    assert tuned(FAST, tiny, start(tiny, 3)).cache == "none"


def test_fast_decodes_as_what_it_stands_for(tiny: Denoiser, times: dict[str, float]) -> None:
    times["delayed"] = 0.1
    problem = start(tiny, 3, 5)
    *_, fast = denoise(tiny, problem, FAST)
    *_, plain = denoise(tiny, problem, tuned(FAST, tiny, problem))
    assert torch.equal(fast.canvas, plain.canvas)
    with pytest.raises(AssertionError, match="call tuned first"):
        DecodeState(problem, FAST)


def test_an_answer_says_what_fast_was(times: dict[str, float]) -> None:
    times["delayed"] = 0.1
    coder = DiffuCoder.load()
    answer = coder.generate("Write a function that takes a string and removes the vowels.", FAST)
    assert answer.trace.params | {"preset": "exact", "entropy_bound": ENTROPY_BOUND} == answer.trace.params
    assert answer.trace.params["cache"] == "delayed"
    assert answer.forward_passes < 16
    filled = coder.fill("def double(n):\n    return <|hole:3|>\n", FAST)
    assert filled.trace.params["cache"] == "delayed"
