"""Samples are read as others write them, and made so that a stop changes nothing."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from diffucoder import DecodingParams, DiffuCoder
from diffucoder.decoding.trace import read_traces
from diffucoder.errors import ConfigError
from diffucoder.evaluation.benchmarks import Task, load
from diffucoder.evaluation.samples import Generator, read_samples
from diffucoder.evaluation.settings import EvaluateSettings, OrderSettings


@pytest.fixture(scope="module")
def coder() -> DiffuCoder:
    return DiffuCoder.load()


@pytest.mark.parametrize("packed", [False, True])
def test_samples_are_read_in_the_order_of_the_tasks(tmp_path: Path, half: Task, packed: bool) -> None:
    lines = [{"task_id": name, "solution": name} for name in ("Test/1", "Test/0", "Test/1")]
    text = "\n".join(map(json.dumps, lines)) + "\n\n"
    path = tmp_path / "samples.jsonl"
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    samples = read_samples(path, [half, replace(half, task_id="Test/1")])
    assert [(s["task_id"], s["sample"]) for s in samples] == [("Test/0", 0), ("Test/1", 0), ("Test/1", 1)]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "holds none"),
        ("{", "line 1 is not JSON"),
        ("[]", "line 1 is not a JSON object"),
        ("[1, 2]", "line 1 is not a JSON object"),
        ('{"task_id": ["a"], "solution": ""}', r"task_id=\['a'\] is not in this benchmark"),
        ('{"task_id": "Test/0", "solution": 5, "completion": "x"}', "line 1: solution=5 is not a string"),
        ('{"task_id": "Test/0", "completion": null}', r"line 1 has keys \['task_id'\]; it needs"),
        ('{"task_id": "Other/0", "solution": ""}', "task_id='Other/0' is not in this benchmark; its first is 'Test/0'"),
        ('{"task_id": "Test/0", "code": ""}', "it needs 'completion' or 'solution'"),
        ('{"task_id": "Test/0", "solution": 1}', "solution=1 is not a string"),
    ],
)
def test_what_is_no_sample_is_refused_by_line(tmp_path: Path, half: Task, content: str, complaint: str) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=complaint):
        read_samples(path, [half])


def test_a_missing_file_is_refused(tmp_path: Path, half: Task) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_samples(tmp_path / "nothing", [half])


@pytest.mark.parametrize("lines", [0, 1, 2, 5, 6])
def test_a_stop_after_any_line_changes_no_sample(tmp_path: Path, coder: DiffuCoder, lines: int) -> None:
    tasks = load("tiny")[:3]
    params = DecodingParams(new_tokens=8, steps=2, temperature=1.0, num_samples=2)
    generator = Generator(coder, params, batch=2)
    whole = tmp_path / "whole.jsonl"
    generator.samples(tasks, whole)
    written = whole.read_text().splitlines(keepends=True)
    assert len(written) == 6
    stopped = tmp_path / "stopped.jsonl"
    stopped.write_text("".join(written[:lines]) + ('{"task_id": "ti' if lines < 6 else ""))

    def timeless(path: Path) -> list[dict[str, object]]:
        return [{**json.loads(line), "seconds": 0} for line in path.read_text().splitlines()]

    generator.samples(tasks, stopped)
    assert timeless(stopped) == timeless(whole)


def test_samples_of_other_tasks_are_not_taken_for_those_of_these(tmp_path: Path, coder: DiffuCoder) -> None:
    tasks = load("tiny")[:3]
    generator = Generator(coder, DecodingParams(new_tokens=8, steps=1), batch=1)
    path = tmp_path / "samples.jsonl"
    generator.samples(tasks[1:], path)
    samples = generator.samples(tasks, path)
    assert [sample["task_id"] for sample in samples] == [task.task_id for task in tasks]


def test_a_prompt_that_does_not_fit_costs_only_its_own_task(tmp_path: Path, coder: DiffuCoder) -> None:
    tasks = load("tiny")[:2]
    long = replace(tasks[0], task_id="long", request="x " * 2000)
    params = DecodingParams(new_tokens=8, steps=1)
    samples = Generator(coder, params).samples([tasks[0], long, tasks[1]], tmp_path / "samples.jsonl")
    assert [sample["tokens"] > 0 for sample in samples] == [True, False, True]
    assert samples[1]["finish_reason"].startswith("not asked: prompt of")


def test_base_models_continue_the_prompt(tmp_path: Path, coder: DiffuCoder, half: Task) -> None:
    generator = Generator(coder, DecodingParams(new_tokens=4, steps=1), raw=True)
    (sample,) = generator.samples([half], tmp_path / "samples.jsonl")
    assert sample["solution"].startswith(half.prompt)


@pytest.mark.parametrize("raw", [True, False])
def test_a_task_may_spell_special_tokens(tmp_path: Path, coder: DiffuCoder, half: Task, raw: bool) -> None:
    task = replace(half, prompt="# <|mask|>\n", request="What is <|im_end|>?", prefill="Sure:\n")
    Generator(coder, DecodingParams(new_tokens=4, steps=1), raw=raw, maps=1).samples([task], tmp_path / "samples.jsonl")
    (trace,) = read_traces(tmp_path / "traces.jsonl")
    tokenizer = coder.tokenizer
    expected = tokenizer.encode(task.prompt) if raw else tokenizer.encode_chat(task.request, prefill=task.prefill)
    assert trace.tokens[: trace.prompt_length] == expected


def test_a_hole_is_filled_between_prompt_and_suffix(tmp_path: Path, coder: DiffuCoder, half: Task) -> None:
    task = replace(half, suffix="\n    return y\n")
    params = DecodingParams(steps=2, num_samples=2, temperature=1.0)
    samples = Generator(coder, params).samples([task], tmp_path / "samples.jsonl")
    assert [sample["sample"] for sample in samples] == [0, 1]
    assert all("completion" in sample for sample in samples)


@pytest.mark.parametrize("suffix", ["\n    return y\n", ""])
@pytest.mark.parametrize(("hole", "length"), [("oracle", None), (5, 5), (1, 1)])
def test_a_hole_has_the_length_that_is_asked_for(
    tmp_path: Path, coder: DiffuCoder, half: Task, suffix: str, hole: str | int, length: int | None
) -> None:
    middle = "    y = x / 2"
    task = replace(half, request="", suffix=suffix, canonical=half.prompt + middle + suffix)
    (sample,) = Generator(coder, DecodingParams(), hole=hole).samples([task], tmp_path / "samples.jsonl")
    assert sample["tokens"] == (length or len(coder.tokenizer.encode(middle)))
    assert "completion" in sample


def test_every_published_middle_fits_between_prompt_and_suffix(shared: Path) -> None:
    for task in load("humaneval-infilling", shared / "data"):
        assert task.prompt + task.middle + (task.suffix or "") == task.canonical
        assert task.middle


@pytest.mark.parametrize(("hole", "holes"), [(None, ["oracle"]), ("likeliest", ["likeliest"]), ("4,8", [4, 8])])
def test_lengths_of_holes_are_a_sweep(hole: str | None, holes: list[str | int]) -> None:
    assert EvaluateSettings(benchmark="humaneval-infilling", hole=hole).holes() == holes


@pytest.mark.parametrize("hole", ["0", "4,-1", "best", ""])
def test_a_length_that_cannot_be_is_rejected(hole: str) -> None:
    with pytest.raises(ConfigError, match="hole="):
        EvaluateSettings(benchmark="humaneval-infilling", hole=hole).holes()


def test_a_sweep_is_every_pair() -> None:
    settings = EvaluateSettings(benchmark="tiny", steps="512,256", temperature="0.2,0.4")
    pairs = [(params.steps, params.temperature) for params in settings.sweep()]
    assert pairs == [(512, 0.2), (512, 0.4), (256, 0.2), (256, 0.4)]
    one = EvaluateSettings(benchmark="tiny", decoding=DecodingParams(steps=7))
    assert one.sweep() == [DecodingParams(steps=7)]
    with pytest.raises(ConfigError, match="steps='a' must be numbers"):
        EvaluateSettings(benchmark="tiny", steps="a").sweep()


def test_a_sweep_over_policies_is_in_the_order_of_the_policies() -> None:
    settings = OrderSettings(prompts="tiny", policy="random,entropy", steps="2,1")
    pairs = [(params.policy, params.steps) for params in settings.sweep()]
    assert pairs == [("random", 2), ("random", 1), ("entropy", 2), ("entropy", 1)]
    with pytest.raises(ConfigError, match="policy='best'"):
        OrderSettings(prompts="tiny", policy="best").sweep()
