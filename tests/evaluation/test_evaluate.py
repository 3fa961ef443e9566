"""From samples to a report: figures that add up, and the same bytes however often the run was stopped."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffucoder.decoding.params import DecodingParams
from diffucoder.errors import ConfigError
from diffucoder.evaluation.benchmarks import Task, load
from diffucoder.evaluation.judge import grade_samples
from diffucoder.evaluation.run import Evaluation, evaluate, model_settings, task_settings
from diffucoder.evaluation.run_folder import default_folder, open_run_folder, run_key, weights_hash
from diffucoder.evaluation.samples import Generator, read_samples
from diffucoder.evaluation.settings import EvaluateSettings
from diffucoder.files import Json
from diffucoder.grading.sandbox import Sandbox

GOOD, INTEGER, BAD = (f"def half(x):\n    return {body}\n" for body in ("x / 2", "x // 2", "x"))


@pytest.fixture
def tasks(half: Task) -> list[Task]:
    return [replace(half, task_id=f"Test/{number}") for number in range(3)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two samples a task: of the first both pass, of the second one, of the third none."""
    solutions = [(0, GOOD), (0, GOOD), (1, GOOD), (1, INTEGER), (2, INTEGER), (2, BAD)]
    path = tmp_path / "samples.jsonl"
    lines = [json.dumps({"task_id": f"Test/{number}", "solution": solution}) for number, solution in solutions]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_figures_are_those_of_the_verdicts(tasks: list[Task], file: Path, sandbox: Sandbox) -> None:
    told = Evaluation("test", tasks, sandbox).of_samples(file, None, {"why": "test"})
    assert told["pass@1"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert told["base_pass@1"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert "pass@5" not in told
    low, high = told["pass@1_interval"]
    assert low <= told["pass@1"] <= high
    assert (told["tasks"], told["samples"], told["untrusted"], told["missing"]) == (3, 6, 0, [])
    assert [verdict["passed"] for verdict in told["verdicts"]["Test/1"]] == [True, False]
    assert told["settings"] == {"why": "test"}
    assert told["versions"]["python"]


def test_tasks_without_samples_and_tasks_that_cannot_run_are_told(
    tasks: list[Task], file: Path, sandbox: Sandbox
) -> None:
    more = [
        *tasks[:1],
        replace(tasks[1], libraries=("nobody_made_this",)),
        tasks[2],
        replace(tasks[2], task_id="Test/3"),
    ]
    told = Evaluation("test", more, sandbox).of_samples(file, None, {})
    assert (told["tasks"], told["missing"]) == (2, ["Test/3"])
    assert told["skipped"] == {"Test/1": "needs nobody_made_this"}


@pytest.mark.parametrize(("program", "low", "high"), [(GOOD, 0.4385, 1.0), (BAD, 0.0, 0.5615)])
def test_all_right_and_all_wrong_leave_some_doubt(
    tasks: list[Task], tmp_path: Path, sandbox: Sandbox, program: str, low: float, high: float
) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text("\n".join(json.dumps({"task_id": task.task_id, "solution": program}) for task in tasks))
    report = Evaluation("test", tasks, sandbox).of_samples(path, None, {})
    assert report["pass@1_interval"] == pytest.approx((low, high), abs=1e-4)


def test_a_limit_takes_the_first_tasks(tasks: list[Task], file: Path, sandbox: Sandbox) -> None:
    told = Evaluation("test", tasks, sandbox, limit=1).of_samples(file, None, {})
    assert (told["tasks"], told["pass@1"], told["missing"]) == (1, 1.0, [])


@pytest.mark.parametrize("lines", range(7))
def test_a_stop_after_any_verdict_changes_no_byte_of_the_report(
    tasks: list[Task], file: Path, sandbox: Sandbox, tmp_path: Path, lines: int
) -> None:
    evaluation = Evaluation("test", tasks, sandbox)
    evaluation.of_samples(file, tmp_path / "whole", {})
    verdicts = (tmp_path / "whole" / "verdicts.jsonl").read_text().splitlines(keepends=True)
    open_run_folder(tmp_path / "stopped", run_key({}))
    torn = "".join(verdicts[:lines]) + "".join(verdicts[lines : lines + 1])[:20]
    (tmp_path / "stopped" / "verdicts.jsonl").write_text(torn)
    evaluation.of_samples(file, tmp_path / "stopped", {})
    for name in ("report.json", "verdicts.jsonl"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_is_graded_is_not_graded_again(tasks: list[Task], file: Path, sandbox: Sandbox, tmp_path: Path) -> None:
    samples = read_samples(file, tasks)
    heard: list[tuple[int, str]] = []

    def progress(things: object, count: int, what: str) -> object:
        heard.append((count, what))
        return things

    def graded() -> list[Json]:
        path = tmp_path / "verdicts.jsonl"
        return grade_samples(tasks, samples, sandbox, path=path, progress=progress)  # type: ignore[arg-type]

    assert graded() == graded()
    assert heard == [(3, "published solutions run"), (6, "samples graded"), (0, "samples graded")]


def test_verdicts_of_other_tasks_are_not_taken_for_those_of_these(
    tasks: list[Task], file: Path, sandbox: Sandbox, tmp_path: Path
) -> None:
    fewer = [replace(tasks[0], libraries=("nobody_made_this",)), *tasks[1:]]  # as before --packages was given
    Evaluation("test", fewer, sandbox).of_samples(file, tmp_path / "run", {})
    told = Evaluation("test", tasks, sandbox).of_samples(file, tmp_path / "run", {})
    assert told == Evaluation("test", tasks, sandbox).of_samples(file, None, {})
    assert (told["tasks"], told["pass@1"]) == (3, pytest.approx(0.5))


def test_packages_belong_to_what_decides_the_tasks(tmp_path: Path) -> None:
    open_run_folder(tmp_path, task_settings("tiny", [], 3, ()))
    with pytest.raises(ConfigError, match=r"belongs to packages=None, not \['site'\]"):
        open_run_folder(tmp_path, task_settings("tiny", [], 3, [Path("site")]))


def test_a_run_is_not_continued_with_another_release_of_its_benchmark(tmp_path: Path) -> None:
    row = {
        "task_id": "HumanEval/0",
        "entry_point": "twice",
        "prompt": "def twice(n):\n",
        "canonical_solution": "    return n * 2\n",
    }
    for wanted in (4, 6):
        test = f"def check(candidate):\n    assert candidate(2) == {wanted}\n"
        (tmp_path / "HumanEval.jsonl").write_text(json.dumps(row | {"test": test}) + "\n")
        settings = task_settings("humaneval", load("humaneval", tmp_path), None, ())
        if wanted == 4:
            open_run_folder(tmp_path / "run", settings)
    with pytest.raises(ConfigError, match="belongs to content="):
        open_run_folder(tmp_path / "run", settings)


def test_a_run_is_identified_by_the_decoding_settings_that_differ_from_their_defaults() -> None:
    coder: Any = SimpleNamespace(name="tiny", model=SimpleNamespace(dtype="float32"))
    params = DecodingParams(steps=4, temperature=0.0)
    settings = model_settings(Generator(coder, params), weights="")
    assert settings["params"] == params.model_dump(mode="json")  # the report has all of them
    key = run_key({"benchmark": "tiny"} | settings)
    assert key["params"] == {"steps": 4}
    assert (key["version"], key["benchmark"], key["batch"]) == (2, "tiny", 8)


def test_runs_from_before_a_setting_was_there_are_gone_on_with(tmp_path: Path) -> None:
    params = DecodingParams(steps=4).model_dump(mode="json")
    older = {name: value for name, value in params.items() if name != "threshold"}
    before, now = ({"benchmark": "tiny", "params": known} for known in (older, params))
    assert default_folder(tmp_path, now) == default_folder(tmp_path, before)
    open_run_folder(tmp_path, run_key(before))
    open_run_folder(tmp_path, run_key(now))
    with pytest.raises(ConfigError, match=r"belongs to params={'steps': 4}, not {'steps': 4, 'threshold': 0.9}"):
        open_run_folder(tmp_path, run_key({"benchmark": "tiny", "params": params | {"threshold": 0.9}}))


def test_runs_of_an_older_kind_of_key_are_not_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text('{"benchmark": "tiny", "params": {}}')
    with pytest.raises(ConfigError, match=r"belongs to version=None, not 2; give another --run"):
        open_run_folder(tmp_path, run_key({"benchmark": "tiny", "params": {}}))


@pytest.mark.parametrize("shard", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
@pytest.mark.parametrize("position", [0, 2 << 20, -1])
def test_a_model_is_identified_by_every_byte_of_every_shard(tmp_path: Path, shard: str, position: int) -> None:
    for number in (1, 2):
        (tmp_path / f"model-0000{number}-of-00002.safetensors").write_bytes(bytes(3 << 20))
    before = weights_hash(str(tmp_path))
    content = bytearray(3 << 20)
    content[position] = 1
    (tmp_path / shard).write_bytes(content)
    assert weights_hash(str(tmp_path)) != before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "merges.txt"])
def test_a_model_is_identified_by_its_config_and_tokenizer_too(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    hashes = {weights_hash(str(tmp_path))}
    for content in ("a", "b"):
        (tmp_path / name).write_text(content)
        hashes.add(weights_hash(str(tmp_path)))
    (tmp_path / "README.md").write_text("decides nothing")
    assert weights_hash(str(tmp_path)) in hashes
    assert len(hashes) == 3


def test_a_model_of_the_hub_is_identified_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models--owner--name" / "snapshots" / ("0123456789abcdef" + "0" * 24)
    folder.mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    assert weights_hash("owner/name") == weights_hash("instruct") == "0123456789abcdef"


def test_weights_are_told_apart_by_their_last_byte(tmp_path: Path) -> None:
    size = 3 << 20
    hashes = set()
    for name, last in (("a", b"x"), ("b", b"y"), ("c", b"x")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(size) + last)
        hashes.add(weights_hash(str(tmp_path / name)))
    assert len(hashes) == 2


def test_a_run_folder_belongs_to_its_settings(tmp_path: Path) -> None:
    open_run_folder(tmp_path, {"steps": 4, "batch": 2})
    open_run_folder(tmp_path, {"steps": 4, "batch": 2})
    with pytest.raises(ConfigError, match=r"belongs to steps=4, not 5; give another --run"):
        open_run_folder(tmp_path, {"steps": 5, "batch": 2})


def test_a_report_names_the_length_of_holes(tmp_path: Path, sandbox: Sandbox) -> None:
    row = {"task_id": "SingleLineInfilling/HumanEval/0/L0", "entry_point": "half", "test": "def check(f): pass"}
    row |= {"prompt": "def half(x):\n", "canonical_solution": "    return x / 2", "suffix": "\n"}
    (tmp_path / "HumanEval-SingleLineInfilling.jsonl").write_text(json.dumps(row))
    settings = EvaluateSettings(benchmark="humaneval-infilling", data=tmp_path, run=tmp_path / "run", hole="4,8")
    reports = list(evaluate(settings))
    assert [report["settings"]["hole"] for report, _ in reports] == [4, 8]
    assert [folder and folder.name for _, folder in reports] == ["hole-4", "hole-8"]
    with pytest.raises(ConfigError, match="hole='4' is for infilling benchmarks"):
        list(evaluate(EvaluateSettings(benchmark="tiny", limit=1, hole="4")))
