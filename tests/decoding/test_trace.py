"""Traces and AR-ness: the published examples, and scripted orders of generation (oracle 13)."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import MASK, Scripted, canvas, rugged, sure_of

from diffucoder.decoding.canvas import Canvas
from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.sequence import Sequence
from diffucoder.decoding.step import decode, denoise
from diffucoder.decoding.trace import Trace, as_json, global_ar_ness, local_ar_ness, read_traces, write_traces
from diffucoder.errors import ConfigError

MIXED = [5, 6, 7, 2, 3, 4, 1]


def traces_of(model: Any, start: Canvas, params: DecodingParams, name: str = "") -> list[Trace]:
    """The trace of each row and sample of a canvas."""
    start = start.repeat(params.num_samples)
    sequences = [Sequence(start, params, row=row) for row in range(len(start.tokens))]
    for _ in decode(model, sequences):
        pass
    return [sequence.trace(name) for sequence in sequences]


def test_left_to_right_is_1() -> None:
    order = list(range(1, 8))
    assert local_ar_ness(order, 1) == 1
    assert local_ar_ness(order, 1, boundary="include") == 6 / 7
    assert [local_ar_ness(order, k, ordered=True) for k in (1, 2, 3)] == [1, 1, 1]
    assert [global_ar_ness(order, k) for k in (1, 2, 3)] == [1, 1, 1]


def test_right_to_left_is_near_0() -> None:
    order = list(range(7, 0, -1))
    assert local_ar_ness(order, 1) == 0
    assert [global_ar_ness(order, k) for k in (1, 2)] == [1 / 7, 2 / 7]


def test_the_published_mixed_order() -> None:
    assert [local_ar_ness(MIXED, k) for k in (1, 2)] == [4 / 6, 2 / 5]
    assert [global_ar_ness(MIXED, k) for k in (1, 2)] == [1 / 7, 4 / 7]


def test_a_run_may_be_a_set_or_in_order() -> None:
    assert local_ar_ness([6, 5, 7], 2) == 1
    assert local_ar_ness([6, 5, 7], 2, ordered=True) == 0


def test_commitments_behind_the_end_interrupt_runs_and_are_not_counted() -> None:
    order = [0, 1, 9, 2, 8, 7, 3]  # an answer of four tokens; 7 to 9 are padding
    assert local_ar_ness([0, 1, 2, 3], 1) == 1
    assert local_ar_ness(order, 1, end=4) == 1 / 3  # 1 follows 0; a pad is before 2 and 3
    assert local_ar_ness(order, 1, end=4, boundary="include") == 1 / 4
    assert local_ar_ness(order, 1) == 1 / 6
    assert global_ar_ness(order, 1, end=4) == global_ar_ness([0, 1, 2, 3], 1) == 1
    assert math.isnan(local_ar_ness([9, 8], 1, end=4))
    assert math.isnan(global_ar_ness([9, 8], 1, end=4))


def test_too_few_tokens_have_no_ar_ness() -> None:
    assert math.isnan(local_ar_ness([3], 1))
    assert math.isnan(local_ar_ness([], 1, boundary="include"))
    assert math.isnan(global_ar_ness([], 1))


@pytest.mark.parametrize(("direction", "local", "overall"), [(1, 1, 1), (-1, 0, 1 / 30)])
def test_a_scripted_policy_has_the_ar_ness_of_its_order(direction: int, local: float, overall: float) -> None:
    model, start, params = (
        Scripted(sure_of(lambda place: direction * place)),
        canvas([1, 2], new_tokens=30),
        DecodingParams(),
    )
    [trace] = traces_of(model, start, params)
    assert trace.order == sorted(trace.order, reverse=direction < 0)
    assert local_ar_ness(trace.order, 1) == local
    assert global_ar_ness(trace.order, 1) == overall


def test_tokens_of_one_step_count_from_left_to_right() -> None:
    model = Scripted(sure_of(lambda place: -place))
    start, params = canvas([1, 2], new_tokens=4), DecodingParams(steps=2)
    [trace] = traces_of(model, start, params)
    assert trace.steps == [1, 1, 0, 0]
    assert trace.order == [4, 5, 2, 3]


def test_a_trace_holds_what_happened() -> None:
    params = DecodingParams(policy="max_prob", num_samples=2)
    start = canvas([1, MASK, 3], [4], new_tokens=2, terminators=(2,))
    steps = list(denoise(Scripted(rugged), start, params))
    traces = traces_of(Scripted(rugged), start, params, "scripted")
    assert [trace.prompt_length for trace in traces] == [1, 1, 1, 1]
    assert [len(trace.tokens) for trace in traces] == [5, 5, 3, 3]
    assert traces[0].steps[1] == -1  # the known token between two holes
    for row, trace in enumerate(traces):
        assert trace.tokens == steps[-1].canvas[row, 5 - len(trace.tokens) :].tolist()
        committed = torch.stack([step.committed[row] for step in steps]).any(-1)
        assert trace.forward_passes == int(committed.nonzero().max()) + 1
        assert all((step >= 0) == (score > 0) for step, score in zip(trace.steps, trace.confidence, strict=True))
        logs = [math.log(score) if score else 0 for score in trace.confidence]  # of max_prob it is the probability
        assert trace.log_probs == pytest.approx(logs, abs=1e-3)
        assert trace.mean_log_prob == pytest.approx(sum(logs) / sum(step >= 0 for step in trace.steps), abs=1e-3)
    assert traces[0].params["policy"] == "max_prob"
    assert traces[0].model == "scripted"


def test_what_was_filled_behind_a_terminator_has_no_step() -> None:
    start, params = canvas([1, 1], new_tokens=4, terminators=(3,)), DecodingParams()
    model = Scripted(sure_of(lambda place: place))
    [trace] = traces_of(model, start, params)
    assert (trace.steps, trace.forward_passes, trace.order) == ([0, 1, -1, -1], 2, [2, 3])


def test_traces_are_written_and_read(tmp_path: Path) -> None:
    traces = [
        Trace(
            tokens=[1, 2, 3],
            prompt_length=1,
            steps=[1, 0],
            confidence=[0.5, 0.25],
            log_probs=[-0.5, -1.0],
            forward_passes=2,
            model="é",
        ),
        Trace(tokens=[1], prompt_length=1, steps=[], confidence=[], log_probs=[], forward_passes=0, params={"seed": 3}),
    ]
    write_traces(tmp_path / "traces.jsonl", traces)
    assert read_traces(tmp_path / "traces.jsonl") == traces
    lines = (tmp_path / "traces.jsonl").read_text().splitlines()
    assert [json.loads(line)["format"] for line in lines] == ["diffucoder-trace"] * 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 1}, "version 1"),
        ({"version": 2}, "version 2"),
        ({"format": "other"}, "'other'"),
        ({"colour": "red"}, "fields"),
    ],
)
def test_other_formats_and_versions_are_refused(tmp_path: Path, change: dict[str, object], said: str) -> None:
    path = tmp_path / "traces.jsonl"
    write_traces(path, [Trace(tokens=[1], prompt_length=1, steps=[], confidence=[], log_probs=[], forward_passes=0)])
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=f":1 .*{said}"):
        read_traces(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", [None]), ("tokens", [10**20]), ("tokens", ["a"]), ("prompt_length", -5), ("steps", [1e400])],
)
def test_values_that_no_trace_has_are_one_line(tmp_path: Path, name: str, value: object) -> None:
    trace = Trace(tokens=[5], prompt_length=0, steps=[0], confidence=[1.0], log_probs=[0.0], forward_passes=1)
    content = json.dumps(as_json(trace) | {name: value})
    (tmp_path / "t.jsonl").write_text(content + "\n")
    with pytest.raises(ConfigError, match=r"t\.jsonl:1: ") as refused:
        read_traces(tmp_path / "t.jsonl")
    assert "\n" not in str(refused.value)


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    for text in ("hello", "[]", "{}", '"text"'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="is not a diffucoder-trace line"):
            read_traces(path)
