"""What holds for every command: version, help, the user's defaults, and errors of the system in one line."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import Run, assert_refused, process

from diffucoder import __version__

REQUEST = "Given a number, double the number."
COMMANDS = (
    *("generate", "infill", "edit", "fix", "chat", "serve", "models", "convert", "evaluate", "order", "bench", "train"),
)


def run(*arguments: str, stdout: int | None = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "diffucoder", *arguments]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=300)


def test_the_version_is_printed(cli: Run) -> None:
    assert cli("--version") == (0, f"diffucoder {__version__}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_short_and_long_help_are_the_same_and_every_summary_fits(cli: Run, command: str) -> None:
    assert cli(command, "-h") == cli(command, "--help")
    [summary] = [line for line in cli("-h").out.splitlines() if line.startswith(f"  {command} ")]
    assert not summary.endswith("...")


def test_help_lists_the_words_to_type_in_groups(cli: Run) -> None:
    out = cli("generate", "-h").out
    for heading in ("Arguments:", "Options:", "Sampling:", "Order:", "Speed:"):
        assert f"\n{heading}\n" in out
    assert "--policy random|max_prob|margin|entropy" in out
    assert "--cache none|prefix|dual|delayed" in out
    assert "--dtype float32|bfloat16|float16" in out


def test_a_shell_completes_commands_options_and_choices() -> None:
    def completed(words: str) -> str:
        environment = {**os.environ, "_DIFFUCODER_COMPLETE": "complete_bash", "COMP_WORDS": words}
        environment["COMP_CWORD"] = str(len(words.split(" ")) - 1)
        command = [sys.executable, "-c", "from diffucoder.cli import main; main()"]
        return subprocess.run(command, capture_output=True, text=True, env=environment).stdout

    assert "infill" in completed("diffucoder in").split()
    assert "--temperature" in completed("diffucoder generate --temp").split()
    assert completed("diffucoder generate --policy m").split() == ["max_prob", "margin"]


# --- the user's defaults ---------------------------------------------------------------------------------------------


@pytest.fixture
def defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config.toml"
    monkeypatch.setenv("DIFFUCODER_CONFIG", str(path))
    return path


def test_defaults_of_a_file_hold_unless_an_option_is_given(cli: Run, defaults: Path, tmp_path: Path) -> None:
    from diffucoder.decoding.trace import read_traces

    defaults.write_text(
        'dtype = "float32"\nsteps = 4\n[generate]\nnew_tokens = 8\nstop = ["zzz"]\n[infill]\nsteps = 1\n'
    )
    trace = tmp_path / "trace.jsonl"

    def params(*options: object) -> tuple[object, ...]:
        assert cli("generate", REQUEST, "--trace", trace, *options).code == 0
        found = read_traces(trace)[0].params
        return found["new_tokens"], found["steps"], found["stop"]

    assert params() == (8, 4, ["zzz"])
    assert params("--steps", 2) == (8, 2, ["zzz"])


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("step = 4", ("'step'", "did you mean 'steps'?")),
        ("[generate]\nnew_token = 4", ("'new_token' in [generate]", "did you mean 'new_tokens'?")),
        ("[generat]\nsteps = 4", ("'generat'", "did you mean 'generate'?")),
        ("[train]\nlr = 4", ("'train'",)),
        ("generate = 4", ("'generate'",)),
        ("steps = 'x'", ("--steps", "integer")),
        ("steps = ", ("is not TOML",)),
    ],
)
def test_wrong_defaults_are_one_line(cli: Run, defaults: Path, content: str, parts: tuple[str, ...]) -> None:
    defaults.write_text(content)
    assert_refused(cli("generate", REQUEST), *parts)


def test_variables_name_model_and_dtype(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUCODER_MODEL", "nobody")
    assert_refused(cli("generate", REQUEST), "model 'nobody'")
    assert cli("generate", REQUEST, "--model", "tiny", "--steps", 1).code == 0
    monkeypatch.setenv("DIFFUCODER_DTYPE", "float99")
    assert_refused(cli("bench", "--model", "tiny"), "float99")


# --- errors of the system --------------------------------------------------------------------------------------------


def test_a_request_comes_from_a_pipe_without_a_dash(cli: Run) -> None:
    assert cli("generate", "--steps", 2, stdin=REQUEST) == cli("generate", REQUEST, "--steps", 2)


@pytest.mark.parametrize("arguments", [("models",), ("--help",), ("generate", REQUEST, "--steps", "1")])
def test_a_full_disk_behind_the_output_is_one_line(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        ended = run(*arguments, stdout=full.fileno())
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert "disk is full" in ended.stderr


def test_a_reader_that_leaves_ends_the_command_quietly() -> None:
    command = [sys.executable, "-m", "diffucoder", "generate", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.parametrize("seconds", [0.15, 0.4, 1.0, 2.0])
def test_ctrl_c_at_any_moment_is_no_traceback(seconds: float) -> None:
    command = [sys.executable, "-m", "diffucoder", "generate", REQUEST]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert b"Traceback" not in err or b"site.py" in err  # the interpreter's own start


def test_a_file_that_cannot_be_written_is_one_line() -> None:
    assert_refused(process("order", "tiny", "--limit", "1", "--run", "/proc/nothing"), "/proc/nothing")


def test_a_prompts_file_that_is_not_there_is_one_line(cli: Run) -> None:
    assert_refused(cli("generate", "--prompts", "/nonexistent"), "'/nonexistent' cannot be read")


def test_help_imports_no_command_and_lists_their_own_summaries(cli: Run) -> None:
    program = (
        "import sys; from diffucoder.cli import main; sys.argv[1:] = ['--help']\n"
        "try: main()\n"
        "except SystemExit: assert not {'torch', 'pydantic', 'diffucoder.cli.common'} & sys.modules.keys()"
    )
    listed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    for command in COMMANDS:
        [summary] = re.findall(rf"^  {command} +(.*)$", listed, re.MULTILINE)
        assert cli(command, "--help").out.splitlines()[2].strip().startswith(summary)
