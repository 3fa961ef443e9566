"""What a new user meets in the first hour. Each of the 24 faults that one found has a test, here or elsewhere:

1  holes filled with rubbish, no warning       test_cli: infill_prints_the_file_with_its_holes_filled (the note)
2  the README's picture was stale              test_watch: the picture in docs is the model's answer
3  long answers fall apart silently            more_new_tokens_than_trained_for_is_a_note
4  --in-place empties a file on a full disk    in_place_on_a_full_disk_keeps_the_file
5  the API key is printed                      a_short_key_is_not_printed
6  --in-place turns CRLF into LF               test_cli: infill_in_place_changes_the_holes_alone
7  extras that are not installed               test_train_cli: without_the_extra_training_says_what_to_install
8  chat: no commands, later turns are wrong    test_cli: chat_has_commands; chat_says_that_the_shipped_model_knows_...
9  convert on a full disk                      convert_on_a_full_disk_leaves_nothing
10 tracebacks                                  test_command_line (full disk, Ctrl-C); unreadable_traces_are_one_line
11 lists, numbers and names in Python          decoding/test_keywords
12 the page of a server with preset=fast       the_page_claims_nothing_about_settings_it_does_not_send
13 infill --num-samples is ignored             test_cli: infill_watches_traces_and_gives_every_sample
14 the name tiny works in some places          the_shipped_model_has_a_name_everywhere
15 --resume wants all settings; --model RUN    a_run_resumes_from_its_folder_alone; a_run_folder_is_not_a_model
16 silence without a terminal                  training_and_evaluation_print_their_progress
17 other kinds of files are left out silently  files_of_other_kinds_are_counted
18 "could tamper with" of broken tests         training/test_grpo: tests_that_a_program_could_tamper_with_...
19 intervals of nothing                        an_interval_of_one_task_is_wide
20 steps are not named                         each_setting_of_a_sweep_is_named
21 port, host and --cors are checked late      a_server_checks_its_address_before_it_loads_a_model
22 prompts that are not UTF-8                  a_prompt_that_is_not_unicode_shows_no_template
23 stale statements in the docs                the_layout_in_the_docs_is_the_one_on_disk
24 smaller ones                                small_mistakes_are_named
"""

import json
import os
import pty
import re
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from commands import Outcome, Run, assert_refused

from diffucoder import DiffuCoder, progress
from diffucoder.models.hub import SHIPPED

ROOT = Path(__file__).parents[2]
REQUEST = "Given a number, double the number."
QUICK = ("--dtype", "float32", "--steps", "2")
TRAIN = ("--set", "lr=1e-3", "--set", "batch=2", "--set", "context=16")


def with_small_files(limit: int, *arguments: object) -> Outcome:
    """Call the command line where files cannot grow over `limit` bytes, which is in the place of a full disk."""
    ended = subprocess.run(
        [sys.executable, "-m", "diffucoder", *map(str, arguments)],
        capture_output=True,
        text=True,
        preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)),
    )
    return Outcome(ended.returncode, ended.stdout, ended.stderr)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A folder of a file that is read and two that are not."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "a.py").write_text("def double(n):\n    return n * 2\n" * 40)
    (folder / "b.js").write_text("x")
    (folder / "c.c").write_text("x")
    return folder


# --- answers ---------------------------------------------------------------------------------------------------------


def test_more_new_tokens_than_trained_for_is_a_note(cli: Run) -> None:
    outcome = cli("generate", REQUEST, "--new-tokens", 300, *QUICK)
    assert outcome.code == 0
    assert re.search(r"note: prompt and answer take \d+ tokens, and tiny was trained on at most 192", outcome.err)
    assert "trained" not in cli("generate", REQUEST, "--new-tokens", 128, *QUICK).err


def test_a_long_file_is_filled_from_the_lines_around_its_hole(cli: Run, tmp_path: Path) -> None:
    path = tmp_path / "long.py"
    lines = [f"value_{number} = {number}\r\n" for number in range(5000)]
    lines[2500] = "value_2500 = <|hole:3|>\r\n"
    path.write_bytes("".join(lines).encode())
    outcome = cli("infill", path, "--in-place", *QUICK)
    assert (outcome.code, outcome.out) == (0, "")
    assert re.search(r"note: the text is longer than the model's context; it reads lines \d+ to \d+\n", outcome.err)
    before, _, after = "".join(lines).partition("<|hole:3|>")
    filled = path.read_bytes().decode()
    assert filled.startswith(before)
    assert filled.endswith(after)
    assert cli("edit", path, "--lines", "4000", "--in-place", *QUICK).code == 0
    assert path.read_bytes().decode().splitlines()[:3999] == filled.splitlines()[:3999]


def test_in_place_on_a_full_disk_keeps_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    text = "x = <|hole:2|>\n" + "# a comment\n" * 400
    path.write_text(text)
    outcome = with_small_files(1000, "infill", path, "--in-place", *QUICK)
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith("error: ")
    assert path.read_text() == text
    assert [file.name for file in tmp_path.iterdir()] == ["a.py"]


def test_chat_says_that_the_shipped_model_knows_single_requests_alone() -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "diffucoder", "chat"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, text=True) as process:
        os.write(ours, b"\n")  # an empty line ends the conversation
        assert process.stderr is not None
        notes = [line for line in process.stderr if line.startswith("note: ")]
    assert process.returncode == 0
    assert notes == ["note: tiny was trained on single requests; type /clear before each next one\n"]


def test_a_prompt_that_is_not_unicode_shows_no_template(cli: Run) -> None:
    outcome = cli("generate", "\udcff\udcfe")
    assert_refused(outcome, "is not Unicode; give it as UTF-8")
    assert "im_start" not in outcome.err


def test_the_shipped_model_has_a_name_everywhere(cli: Run, tmp_path: Path) -> None:
    assert cli("generate", REQUEST, "--model", "tiny", *QUICK) == cli("generate", REQUEST, *QUICK)
    assert DiffuCoder.load("tiny").name == "tiny"
    assert cli("convert", "tiny", tmp_path / "x.gguf").code == 0


# --- training and evaluation -----------------------------------------------------------------------------------------


def test_a_run_resumes_from_its_folder_alone(cli: Run, tmp_path: Path, code: Path) -> None:
    run = ("train", "adapt", "--set", f"run={tmp_path / 'r1'}", "--set", f"cache={tmp_path / 'cache'}")
    data = ("--set", f"data={code}", "--set", "model=tiny")
    assert cli(*run, *data, *TRAIN, "--set", "steps=2").code == 0
    outcome = cli(*run, "--resume", "--set", "steps=3")
    assert outcome.code == 0
    assert "goes on after step 2 of 3" in outcome.err
    config = json.loads((tmp_path / "r1" / "model" / "config.json").read_text())
    assert config["trained_length"] == 16
    missing = cli("train", "adapt", "--set", f"run={tmp_path / 'r2'}", "--resume")
    assert_refused(missing, "settings", "are missing")


def test_a_run_folder_is_not_a_model(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{}")
    assert_refused(cli("generate", REQUEST, "--model", tmp_path), f"name its finished model: {tmp_path / 'model'}")


def test_training_and_evaluation_print_their_progress(
    cli: Run, tmp_path: Path, code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    run = ("--set", f"run={tmp_path / 'r1'}", "--set", f"cache={tmp_path / 'cache'}", "--set", f"data={code}")
    outcome = cli("train", "adapt", *run, *TRAIN, "--set", "steps=3", "--set", "model=tiny")
    assert re.search(r"^r1: step 1/3, loss [\d.]+, \d+ s left$", outcome.err, re.MULTILINE)
    assert re.search(r"^r1: step 3/3, loss [\d.]+$", outcome.err, re.MULTILINE)
    outcome = cli("evaluate", "tiny", "--limit", 2, "--batch", 1, "--run", tmp_path / "e1", *QUICK)
    assert "batches generated: 1/2" in outcome.err
    assert "samples graded: 2/2" in outcome.err
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Double n."}\n{"prompt": "Halve n."}\n')
    outcome = cli("order", prompts, "--run", tmp_path / "o1", "--batch", 1, *QUICK)
    assert "batches generated: 2/2" in outcome.err


def test_files_of_other_kinds_are_counted(cli: Run, tmp_path: Path, code: Path) -> None:
    run = ("--set", f"run={tmp_path / 'r1'}", "--set", f"cache={tmp_path / 'cache'}", "--set", f"data={code}")
    outcome = cli("train", "adapt", *run, *TRAIN, "--set", "steps=1", "--set", "model=tiny")
    assert re.search(rf"{code}: only .*\.py.* are read; left out 2, as {code / 'b.js'}", outcome.err)


def test_an_interval_of_one_task_is_wide(cli: Run, tmp_path: Path) -> None:
    out = cli("evaluate", "tiny", "--limit", 1, "--run", tmp_path / "run", *QUICK).out
    low, high = re.findall(r"95 %: ([\d.]+)% - ([\d.]+)%", out)[0]
    assert float(high) - float(low) > 50
    assert "tiny: 1 task, 1 sample" in out


def test_each_setting_of_a_sweep_is_named(cli: Run, tmp_path: Path) -> None:
    arguments = ("evaluate", "tiny", "--limit", 1, "--run", tmp_path / "run", "--dtype", "float32", "--steps", "2,4")
    out = cli(*arguments).out
    assert re.findall(r"^tiny: .*steps: (\d)", out, re.MULTILINE) == ["2", "4"]


def test_convert_on_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    outcome = with_small_files(100_000, "convert", SHIPPED, tmp_path / "out.gguf")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1, outcome.err
    assert list(tmp_path.iterdir()) == []


def test_unreadable_traces_are_one_line(cli: Run, tmp_path: Path) -> None:
    assert_refused(cli("order", "--traces", sys.executable), "is not a diffucoder-trace line")
    assert_refused(cli("order", "tiny", "--limit", 1, "--run", "/proc/x"), "/proc/x")


# --- the server ------------------------------------------------------------------------------------------------------


def test_a_short_key_is_not_printed(cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("sekrit\n")
    outcome = cli("serve", "--api-key-file", tmp_path / "key")
    assert_refused(outcome, "the key has 6 characters; use 8 to 512")
    monkeypatch.setenv("DIFFUCODER_API_KEY", "sekrit")
    assert cli("serve").err == outcome.err
    assert "sekrit" not in outcome.err


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (
            ("--host", "203.0.113.7", "--no-key"),
            ("cannot listen on 203.0.113.7:8000", "give --host an address of this"),
        ),
        (("--host", "nowhere.invalid", "--no-key"), ("cannot listen on nowhere.invalid", "give --host")),
        (("--cors", "example.org"), ("--cors 'example.org' is not an origin", "https://example.org, or *")),
        (("--cors", "https://example.org/page"), ("--cors 'https://example.org/page' is not an origin",)),
        (("--log-level", "loud"), ("--log-level", "'info'")),
        (("--port", "70000"), ("--port",)),
    ],
)
def test_a_server_checks_its_address_before_it_loads_a_model(
    cli: Run, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(DiffuCoder, "load", fail)
    assert_refused(cli("serve", *options), *parts)


# --- texts -----------------------------------------------------------------------------------------------------------


def test_the_layout_in_the_docs_is_the_one_on_disk() -> None:
    design = (ROOT / "docs" / "design.md").read_text()
    assert "to come" not in design
    for name in re.findall(r"`(diffucoder/[\w/]+\.py)`", design):
        assert (ROOT / name).exists(), name


def test_the_page_claims_nothing_about_settings_it_does_not_send() -> None:
    page = (ROOT / "diffucoder" / "serving" / "page" / "page.js").read_text()
    for unsent in (
        'field.name === "steps" && field.value === "0"',
        'field.name === "threshold" && field.value === "1"',
    ):
        assert f'if ({unsent}) return "the server\'s default";' in page


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("order", "nofile.jsonl"), ("file 'nofile.jsonl' is not there",)),
        (("evaluate", "nofile.jsonl"), ("file 'nofile.jsonl' is not there",)),
        (("generate", "--prompts", "/dev/null"), ("has no requests; write one a line",)),
        (("serve", "--set", "preset"), ("not of the form key=value",)),
        (("train", "sft"), ("settings run,", "are missing")),
    ],
)
def test_small_mistakes_are_named(cli: Run, arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    assert_refused(cli(*arguments), *parts)
