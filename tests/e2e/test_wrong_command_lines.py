"""Wrong command lines and inputs over all commands: one line on standard error, exit code 2, no traceback."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Run

from diffucoder.cli.app import _COMMANDS, _command

REQUEST = "Given a number, double the number."
WAYS = {  # how each command is called when nothing is wrong with it
    "generate": (REQUEST,),
    "infill": ("{hole}",),
    "edit": ("{code}", "--lines", "1"),
    "fix": ("{code}",),
    "chat": (),
    "serve": ("--port", "0"),
    "models": (),
    "convert": ("tiny", "{new}"),
    "evaluate": ("tiny",),
    "order": ("tiny",),
    "bench": (),
}
STAGES = ("pretrain", "adapt", "sft", "grpo")
# values that no option of this type can have
WRONG_VALUES = {"<int>": ("many", "1.5", "-7"), "<float>": ("much", "nan", "-1")}
BAD_FILES = ("missing", "folder", "binary", "latin", "json", "toml")
FILE_OPTIONS = (
    ("generate", "--prompts", "{bad}.jsonl"),
    ("generate", REQUEST, "--model", "{bad}"),
    ("infill", "{bad}"),
    ("edit", "{bad}", "--lines", "1"),
    ("fix", "{code}", "--tests", "{bad}"),
    ("chat", "--model", "{bad}"),
    ("bench", "--model", "{bad}"),
    ("convert", "{bad}", "{new}"),
    ("convert", "{bad}", "{new}.gguf"),
    ("evaluate", "{bad}.jsonl"),
    ("evaluate", "tiny", "--samples", "{bad}"),
    ("order", "--traces", "{bad}"),
    ("serve", "--api-key-file", "{bad}"),
    ("train", "sft", "{bad}"),
    ("train", "adapt", "--set", "run={new}", "--set", "lr=1", "--set", "steps=1", "--set", "data={bad}"),
)
OTHERS = (
    ("infill", "{code}"),
    ("fix", "{missing}"),
    ("fix", "{folder}"),
    ("fix", "{binary}"),
    ("infill", "{hole}", "--in-place", "--num-samples", "2"),
    ("edit", "{code}", "--lines", "9"),
    ("edit", "{code}", "--lines", "2:1"),
    ("edit", "{code}", "--lines", "x"),
    ("edit", "{code}"),
    ("generate", REQUEST, "--prompts", "{code}"),
    ("generate", REQUEST, "--threshold", "0.9", "--factor", "1"),
    ("generate", REQUEST, "--cache", "prefix"),
    ("generate", REQUEST, "--new-tokens", "100000"),
    ("generate", "word " * 1000),
    ("generate", " "),
    ("generate", "\udcff"),
    ("generate", REQUEST, "more"),
    ("serve", "--set", "steps"),
    ("serve", "--set", "stepz=1"),
    ("serve", "--limit", "max_batch=0"),
    ("serve", "--replicas", "2"),
    ("serve", "--host", "0.0.0.0"),
    ("serve", "--cors", "x"),
    ("evaluate", "tinny"),
    ("evaluate", "gsm8k", "--data", "{folder}"),
    ("evaluate", "tiny", "--limit", "0"),
    ("order",),
    ("convert", "tiny"),
    ("convert", "tiny", "{folder}x.gguf", "--pad"),
    ("train", "nothing"),
    ("train", "sft", "--set", "run"),
    ("train", "sft", "--set", "lr=fast", "--set", "run={new}"),
    ("train", "sft", "--set", "epoch=1"),
    ("train", "grpo", "--set", "decoding.stepz=1"),
    ("train", "adapt", "--resume"),
    ("nothing",),
    ("--nothing",),
)


def wrong_lines() -> Iterator[tuple[str, ...]]:
    """Command lines, each with one fault."""
    for command, arguments in WAYS.items():
        yield (command, *arguments, "--no-such-option")
        yield (command, *arguments, "one", "too", "many")
        parsed = _command(command)
        context = parsed.make_context(command, [], resilient_parsing=True)
        for parameter in parsed.params:
            record = parameter.get_help_record(context)
            option, _, kind = (record or ("",))[0].partition(" ")
            if not option.startswith("--") or not kind or option == "--lines":  # an argument, a switch
                continue
            yield (command, *arguments, option)  # its value is missing
            for value in WRONG_VALUES.get(kind, ("no_such_choice",) if "|" in kind else ()):
                yield (command, *arguments, f"{option}={value}")
    for stage in STAGES:
        yield ("train", stage, "--no-such-option")
        yield ("train", stage, "--set")
        yield ("train", stage, "--set", "stepz=1")
    for line in FILE_OPTIONS:
        for kind in BAD_FILES:
            yield tuple(part.replace("{bad}", f"{{{kind}}}") for part in line)
    yield from OTHERS


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """The paths that the lines name."""
    contents = {
        "hole": b"x = <|hole:2|>\n",
        "code": b"x = 1\ny = 2\n",
        "binary": bytes(range(256)) * 20,
        "latin": "café = <|hole|>\n".encode("latin-1"),
        "json": b'{"prompt": ',
        "toml": b"steps = [",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"{name}.jsonl").write_bytes(content)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.jsonl").mkdir()
    return {name: str(tmp_path / name) for name in (*contents, "folder", "missing", "new")}


def test_wrong_command_lines_are_one_line(
    cli: Run, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = list(dict.fromkeys(wrong_lines()))
    assert len(lines) >= 150
    faults = []
    for line in lines:
        arguments = [part.format(**files) if "{" in part else part for part in line]
        code, out, err = cli(*arguments)
        if (code, out) != (2, "") or err.count("\n") != 1 or not err.startswith("error: ") or "Traceback" in err:
            faults.append(f"{line}: {code}, {out[:200]!r}, {err[-400:]!r}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("arguments", [("models",), ("generate", "--help"), ("train", "sft", "--help")])
def test_an_output_that_is_full_is_one_line(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffucoder.cli import main

    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "argv", ["diffucoder", *arguments])
    monkeypatch.setattr(sys, "stdout", Full())
    monkeypatch.setattr("diffucoder.cli.app._drop_output", lambda: None)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "disk is full" in err


def test_every_command_has_its_wrong_lines() -> None:
    assert {*WAYS, "train"} == set(_COMMANDS)
