"""`diffucoder evaluate` as a user meets it: one command from a model, or a file of completions, to a report."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import Run, assert_refused, process

from diffucoder.errors import SandboxError
from diffucoder.grading.sandbox import isolation

QUICK = ("--new-tokens", "24", "--steps", "6", "--dtype", "float32")


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    try:
        isolation()
    except SandboxError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_the_shipped_model_is_evaluated_on_its_own_problems(cli: Run, tmp_path: Path) -> None:
    code, out, _ = cli("evaluate", "tiny", "--limit", 4, "--dtype", "float32", "--json")
    report = json.loads(out)
    assert (code, report["tasks"], report["samples"], report["untrusted"]) == (0, 4, 4, 0)
    assert report["pass@1"] == sum(verdict["passed"] for verdict in report["verdicts"].values()) / 4
    assert report["settings"]["model"] == "tiny"
    assert report["settings"]["params"]["new_tokens"] == 64
    (folder,) = (tmp_path / "runs/evaluate").iterdir()
    stored = json.loads((folder / "report.json").read_text())
    assert {key: report[key] for key in stored} == stored


def test_a_table_is_printed_and_a_sweep_has_a_run_each(cli: Run, tmp_path: Path) -> None:
    arguments = ("evaluate", "tiny", "--limit", 2, "--new-tokens", 8, "--steps", "2,1", "--temperature", "0,1")
    code, out, _ = cli(*arguments, "--run", "sweep")
    assert code == 0
    assert out.count("pass@1") == 4
    names = {path.name for path in (tmp_path / "sweep").iterdir()}
    assert names == {f"steps-{steps}-temperature-{heat}" for steps in (2, 1) for heat in (0, 1)}


def test_a_kill_in_the_middle_gives_the_identical_report(cli: Run, tmp_path: Path) -> None:
    arguments = ("evaluate", "tiny", "--limit", "10", "--batch", "2", *QUICK, "--run")
    command = [sys.executable, "-m", "diffucoder.cli", *arguments, "killed"]
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) as running:
        lines = tmp_path / "killed" / "samples.jsonl"
        end = time.monotonic() + 120
        while not (lines.exists() and lines.read_text().count("\n") >= 2):
            assert running.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < end
            time.sleep(0.005)
        running.send_signal(signal.SIGKILL)
    assert not (tmp_path / "killed" / "report.json").exists()
    for folder in ("killed", "whole"):
        assert cli(*arguments, folder).code == 0
    assert (tmp_path / "killed/report.json").read_bytes() == (tmp_path / "whole/report.json").read_bytes()


def test_other_settings_do_not_mix_in_one_folder(cli: Run) -> None:
    assert cli("evaluate", "tiny", "--limit", 1, *QUICK, "--run", "one").code == 0
    refused = cli("evaluate", "tiny", "--limit", 2, *QUICK, "--run", "one")
    assert_refused(refused, "run folder 'one' belongs to limit=1, not 2", "--run")


def test_a_model_is_evaluated_on_humaneval(cli: Run, shared: Path) -> None:
    code, out, _ = cli("evaluate", "humaneval", "--limit", 5, *QUICK, "--data", shared / "data", "--json")
    report = json.loads(out)
    assert (code, report["tasks"], next(iter(report["verdicts"]))) == (0, 5, "HumanEval/0")


@pytest.mark.parametrize(
    ("benchmark", "name", "count"),
    [("humaneval+", "humaneval", 12), ("mbpp+", "mbpp", 12), ("bigcodebench-hard", "bcb_hard", 12)],
)
def test_published_completions_get_their_published_verdicts(
    shared: Path, benchmark: str, name: str, count: int
) -> None:
    folder = shared / "replay" / "1.5b"
    arguments = (
        "--samples",
        folder / f"{name}-samples.jsonl.gz",
        "--data",
        shared / "data",
        "--limit",
        count,
        "--json",
    )
    outcome = process("evaluate", benchmark, *arguments)
    assert outcome.code == 0, outcome
    report = json.loads(outcome.out)
    published = json.loads(gzip.decompress((folder / f"{name}-results.json.gz").read_bytes()))["eval"]
    assert report["tasks"] + len(report["skipped"]) == count
    for task_id, verdict in report["verdicts"].items():
        (expected,) = published[task_id]
        if "status" in expected:
            assert verdict["passed"] == (expected["status"] == "pass"), task_id
        else:
            assert verdict["base"] == (expected["base_status"] == "pass"), task_id
            assert verdict["plus"] == (expected["plus_status"] == "pass"), task_id


def test_what_cannot_be_is_refused_in_one_line(cli: Run, tmp_path: Path) -> None:
    assert_refused(cli("evaluate", "humanevil"), "unknown benchmark 'humanevil'; did you mean 'humaneval'?")
    assert_refused(cli("evaluate", "mbpp", "--data", tmp_path), "is not in", "MbppPlus.jsonl.gz")
    assert_refused(cli("evaluate", "tiny", "--samples", "none.jsonl"), "'none.jsonl' cannot be read")
    assert_refused(cli("evaluate", "tiny", "--samples", "a", "--model", "b"), "give one of the two")
    assert_refused(cli("evaluate", "tiny", "--steps", "many"), "steps='many' must be numbers")
    assert_refused(cli("evaluate", "tiny", "--packages", "nowhere"), "'nowhere' is not a folder")


@pytest.mark.parametrize(("option", "value"), [("--steps", 4), ("--raw", None), ("--batch", 2), ("--top-p", 0.5)])
def test_what_is_for_a_model_is_refused_with_samples(cli: Run, option: str, value: object) -> None:
    arguments = [option] if value is None else [option, value]
    refused = cli("evaluate", "tiny", "--samples", "a", *arguments)
    assert_refused(refused, f"--samples are graded as they are, and {option} is for a model; give one of the two")


def test_a_run_folder_that_cannot_be_one_is_refused_in_one_line(cli: Run, tmp_path: Path) -> None:
    samples = tmp_path / "samples.jsonl"
    samples.write_text('{"task_id": "tiny/0", "solution": ""}\n')
    arguments = ("evaluate", "tiny", "--samples", samples, "--run")
    (tmp_path / "file").write_text("")
    assert_refused(cli(*arguments, "file"), "run folder 'file' cannot be used (File exists); give another --run")
    assert_refused(cli(*arguments, "/proc/nope"), "run folder '/proc/nope' cannot be used (", "give another --run")
    for name, content in (("broken", "{"), ("list", "[]"), ("bytes", "\x80")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.json").write_bytes(content.encode("latin-1"))
        assert_refused(cli(*arguments, name), f"'{name}/settings.json' cannot be read", "give another --run")


def test_a_limit_that_leaves_no_sample_is_named(cli: Run, tmp_path: Path) -> None:
    samples = tmp_path / "samples.jsonl"
    samples.write_text('{"task_id": "tiny/400", "solution": ""}\n')
    refused = cli("evaluate", "tiny", "--samples", samples, "--limit", 3)
    assert_refused(refused, "limit=3 leaves none of the tasks that 'tiny' has samples of; raise it or leave it out")
