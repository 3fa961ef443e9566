"""`diffucoder order` as a user meets it: prompts to a report, a sweep that was killed, traces from elsewhere."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import Run, assert_refused

from diffucoder.decoding.trace import read_traces
from diffucoder.errors import SandboxError
from diffucoder.grading.sandbox import isolation
from diffucoder.models.checkpoint import load_tokenizer
from diffucoder.models.hub import SHIPPED

QUICK = ("--new-tokens", "24", "--dtype", "float32")


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    try:
        isolation()
    except SandboxError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_a_sweep_has_a_run_for_every_setting_and_one_report(cli: Run, tmp_path: Path) -> None:
    arguments = ("order", "tiny", "--limit", 3, "--steps", "24,12", "--temperature", "0.2,1.2", "--num-samples", 2)
    code, out, _ = cli(*arguments, *QUICK, "--maps", 2, "--batch", 2, "--json")
    told = json.loads(out)
    assert code == 0
    assert told == json.loads((tmp_path / "runs/order/tiny/report.json").read_text())
    labels = [each["label"] for each in told["runs"]]
    assert labels == [f"steps {steps}, temperature {heat}" for steps in (24, 12) for heat in (0.2, 1.2)]
    assert len(told["differences"]) == 6
    for each in told["runs"]:
        assert (each["prompts"], each["samples"], each["graded"]) == (3, 6, 6)
        assert {"pass@1", "pass@2", "distinct", "rank_keyword"} <= each["figures"].keys()
        assert len(each["first_pass_entropy_by_position"]) == 24
    for folder in (path for path in (tmp_path / "runs/order/tiny").iterdir() if path.is_dir()):
        traces = read_traces(folder / "traces.jsonl")
        assert [trace.id for trace in traces] == [f"tiny/{task}#{n}" for task in range(3) for n in range(2)]
        kept = [len(trace.entropy_map) for trace in traces]
        assert min(kept[:4]) > 1  # all steps of the first batch
        assert kept[4:] == [1, 1]


def test_a_kill_in_the_middle_gives_the_identical_report_and_traces(cli: Run, tmp_path: Path) -> None:
    quick = ("--limit", "4", "--batch", "1", "--new-tokens", "8", "--dtype", "float32")
    arguments = ("order", "tiny", "--temperature", "0,1", *quick, "--run")
    command = [sys.executable, "-m", "diffucoder.cli", *arguments, "killed"]
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) as running:
        end = time.monotonic() + 120
        while sum(path.read_text().count("\n") for path in tmp_path.glob("killed/*/samples.jsonl")) < 3:
            assert running.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < end
            time.sleep(0.005)
        running.send_signal(signal.SIGKILL)
    assert not (tmp_path / "killed" / "report.json").exists()
    for folder in ("killed", "whole"):
        assert cli(*arguments, folder).code == 0
    assert (tmp_path / "killed/report.json").read_bytes() == (tmp_path / "whole/report.json").read_bytes()
    for path in tmp_path.glob("whole/*/traces.jsonl"):
        assert path.read_bytes() == (tmp_path / "killed" / path.parent.name / path.name).read_bytes()


def test_models_are_compared_by_their_folders(cli: Run, tmp_path: Path) -> None:
    shutil.copytree(SHIPPED, tmp_path / "after")
    told = cli("order", "tiny", "--limit", 2, "--model", "tiny", "--model", "after", *QUICK, "--json").out
    [difference] = json.loads(told)["differences"]
    assert (difference["a"], difference["b"], difference["prompts"]) == ("tiny", "after", 2)
    assert {row["mean"] for row in difference["figures"].values()} <= {0, None}  # the same weights


def test_prompts_of_ones_own_need_no_tests(cli: Run, tmp_path: Path) -> None:
    lines = [{"prompt": "Given a number, double the number."}, {"prompt": "Square it.", "id": "square"}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, _ = cli("order", "own.jsonl", *QUICK, "--json")
    (run,) = json.loads(out)["runs"]
    assert (code, run["samples"], run["graded"]) == (0, 2, 0)
    assert list(run["by_prompt"]) == ["own/0", "square"]
    assert "pass@1" not in run["figures"]
    assert_refused(cli("evaluate", "own.jsonl"), "has no tests to evaluate answers by")


MATHEMATICS = [  # as GSM8K is published: a calculator's marks, and the result behind ####
    {"question": "Ann has 2 apples and buys 3. How many has she?", "answer": "She has 2+3=<<2+3=5>>5 apples.\n#### 5"},
    {
        "question": "A mill grinds 500 bags a day. How many in 2 days, if half are sold each day?",
        "answer": "It grinds 500*2=<<500*2=1000>>1,000 bags.\nOf these 1000/2=<<1000/2=500>>500 are left.\n#### 500",
    },
]


def test_code_is_compared_with_mathematics_as_published(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in MATHEMATICS))
    quick = ("--new-tokens", 8, "--dtype", "float32", "--num-samples", 2, "--temperature", 0.5)
    code, out, _ = cli("order", "gsm8k", "--data", tmp_path, *quick, "--json")
    (run,) = json.loads(out)["runs"]
    assert (code, list(run["by_prompt"]), run["samples"], run["graded"]) == (0, ["gsm8k/0", "gsm8k/1"], 4, 0)
    [folder] = (path for path in (tmp_path / "runs/order/gsm8k").iterdir() if path.is_dir())
    asked = [trace.tokens[: trace.prompt_length] for trace in read_traces(folder / "traces.jsonl")]
    said = [load_tokenizer().decode(tokens, skip_special=False) for tokens in asked]
    assert [row["question"] in text for row, text in zip(MATHEMATICS, said[::2], strict=True)] == [True, True]
    assert cli("order", "tiny", "--limit", 2, *quick).code == 0
    [other] = (path for path in (tmp_path / "runs/order/tiny").iterdir() if path.is_dir())
    told = json.loads(cli("order", "--traces", other, "--traces", folder, "--json").out)
    assert [each["label"] for each in told["runs"]] == ["prompts tiny", "prompts gsm8k"]
    assert told["differences"][0]["prompts"] == 0  # none that both were asked


def test_traces_of_other_commands_are_reported_on(cli: Run, tmp_path: Path) -> None:
    for policy in ("entropy", "random"):
        asked = ("generate", "Double the number.", "--policy", policy, "--num-samples", 3, "--temperature", 0.5)
        assert cli(*asked, *QUICK, "--trace", f"{policy}.jsonl").code == 0
    code, out, _ = cli("order", "--traces", "entropy.jsonl", "--traces", "random.jsonl", "--ordered")
    assert code == 0
    assert "policy entropy: 1 prompts, 3 samples" in out
    told = json.loads((tmp_path / "runs/order/traces/report.json").read_text())
    assert told["conventions"]["ordered"] is True
    assert [each["figures"]["tokens"]["prompts"] for each in told["runs"]] == [1, 1]


def test_what_cannot_be_is_refused_in_one_line(cli: Run, tmp_path: Path) -> None:
    assert_refused(cli("order"), "give PROMPTS for a model, or --traces")
    assert_refused(cli("order", "tiny", "--traces", "x"), "one of the two")
    assert_refused(cli("order", "--traces", "nowhere"), "'nowhere' holds no traces")
    assert_refused(cli("order", "tiny", "--policy", "best"), "policy='best'")
    assert_refused(cli("order", "tiny", "--boundary", "none"), "boundary='none'")
    assert_refused(cli("order", "nowhere.jsonl"), "file 'nowhere.jsonl' is not there; check the path")
    (tmp_path / "broken.jsonl").write_text('{"prompt": 3}\n')
    assert_refused(cli("order", "broken.jsonl"), "prompt must be a string")
