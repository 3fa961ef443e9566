"""Files that strangers made: traces, samples, tasks, data, settings, run folders. Each is one line and exit code 2.

No traceback, no hang, no request, no code of theirs, no memory beyond a limit, no command to the terminal.
"""

import base64
import gzip
import io
import json
import os
import resource
import socket
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffucoder import files
from diffucoder.analysis.order import mean_map
from diffucoder.analysis.report import write
from diffucoder.analysis.settings import Conventions
from diffucoder.cli import main
from diffucoder.decoding.trace import Trace, as_json, global_ar_ness, pack_entropies, write_traces
from diffucoder.errors import CheckpointError, ConfigError, printable
from diffucoder.files import UnreadableError, parse_json, read_bytes, read_lines, read_whole_lines, write_json
from diffucoder.models.hub import SHIPPED

Json = dict[str, Any]
Refused = Callable[..., str]
ESCAPE = "\x1b]0;owned\x07\x1b[2J"
DEEP = "[" * 100_000
LEGAL_BUT_DEEP = "[" * 500 + "]" * 500


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """Call the command line in this process. Return its one line of error."""

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["diffucoder", *map(str, arguments)])
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(socket.socket, "connect", _no_request)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert ended.value.code == 2, (out, err)
        line = err.splitlines()[-1]
        assert line.startswith("error: "), err
        assert len(line) < 1200, len(line)
        assert "\x1b" not in out + err
        return line

    return call


def _no_request(*_: object) -> None:
    raise AssertionError("a file of a stranger made a request")


def zipped(content: bytes, times: int = 1) -> bytes:
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as file:  # the same bytes in every process of the tests
        for _ in range(times):
            file.write(content)
    return packed.getvalue()


# --- one reader ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of some kilobytes in place of megabytes."""
    monkeypatch.setattr(files, "LONGEST_LINE", 2**12)
    monkeypatch.setattr(files, "LARGEST_FILE", 2**14)


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"x" * 5000, "line 1 is longer than"),
        (b"{}\n" + b"x" * 5000 + b"\n", "line 2 is longer than"),
        (zipped(b" " * 5000), "line 1 is longer than"),
        (zipped(b"{}\n" * 1000, times=1000), "it unpacks to over 100 times its size"),
        (zipped(b"{}\n")[:-6], "end-of-stream"),
        (zipped(b"{}\n")[:10] + b"\xff" * 20, "Error -3"),
    ],
)
def test_lines_are_read_within_limits(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(content)
    with pytest.raises(UnreadableError, match=reason):
        list(read_lines(path))


def test_lines_within_the_limits_are_read_as_they_are(tmp_path: Path) -> None:
    rows = b"".join(
        b'{"task_id": "HumanEval/%d", "solution": "def f():\\n    return %d"}\n' % (k, k) for k in range(999)
    )
    for content in (rows, zipped(rows), rows.rstrip(), b"", zipped(b"")):
        path = tmp_path / "lines"
        path.write_bytes(content)
        plain = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        assert list(read_lines(path)) == list(enumerate(plain.splitlines(keepends=True), start=1))


@pytest.mark.usefixtures("small_limits")
def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"x" * 20_000)
    for path, reason in (
        (tmp_path / "pipe", "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "large", "larger than"),
        (Path("a\0b"), "null byte"),
    ):
        with pytest.raises(UnreadableError, match=reason):
            read_bytes(path)
    with pytest.raises(ConfigError, match=r"pipe' cannot be read \(it is not a regular file\)"):
        read_whole_lines(tmp_path / "pipe")


@pytest.mark.parametrize("text", [DEEP, LEGAL_BUT_DEEP, '{"a":' * 300 + "1" + "}" * 300, "1" * 5000, "", "{'a': 1}"])
def test_json_that_would_exhaust_a_process_is_not_json(text: str) -> None:
    with pytest.raises(ValueError, match="not JSON"):
        parse_json(text)


def test_half_characters_are_written_as_escapes(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": "\ud800x"})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"name": "\ud800x"}


def test_what_commands_a_terminal_is_shown_as_escapes() -> None:
    assert printable("a\tb\nc é 漢 👍") == "a\tb\nc é 漢 👍"
    assert printable(ESCAPE) == r"\x1b]0;owned\x07\x1b[2J"
    assert printable("a\r\x9b1m\u202eb\ud800") == r"a\r\x9b1m\u202eb\ud800"


# --- traces ----------------------------------------------------------------------------------------------------------

GOOD = as_json(
    Trace(tokens=[5, 6, 7], prompt_length=1, steps=[0, 1], confidence=[1.0] * 2, log_probs=[-0.1] * 2, forward_passes=2)
)
BOMB = base64.b64encode(zlib.compress(bytes(2**27), 9)).decode()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "someone/private-model"}, "names the model 'someone/private-model', which is not on this machine"),
        ({"model": "instruct"}, "not on this machine"),
        ({"model": "x" * 5000}, "not on this machine"),
        ({"model": "a\0b"}, "not on this machine"),
        ({"model": ESCAPE}, "not on this machine"),
        ({"tokens": [5, 6, 10**6]}, "token 1000000"),
        ({"tokens": [5, 6, -1]}, "a token is not"),
        ({"steps": [0, 10**9]}, "a step is not"),
        ({"steps": [0, -2]}, "a step is not"),
        ({"forward_passes": 10**30}, "forward_passes="),
        ({"confidence": [1.0]}, "do not have 2 values"),
        ({"log_probs": []}, "do not have 2 values"),
        ({"log_probs": [0.0, float("nan")]}, "a log-probability"),
        ({"log_probs": [0.0, 1e9]}, "a log-probability"),
        ({"revoked": [[0, 5, 1]]}, "an entry of revoked"),
        ({"revoked": [[9, 5, 0, 1]]}, "an entry of revoked"),
        ({"revoked": [[0, 10**30, 0, 1]]}, "a token is not"),
        ({"revoked": [[0, 10**6, 0, 1]]}, "token 1000000"),
        ({"revoked": [[0, 5, 0, 10**30]]}, "a step is not"),
        ({"entropies": "$$$"}, "entropies"),
        ({"entropies": "é"}, "entropies"),
        ({"entropies": base64.b64encode(zlib.compress(b"123456")).decode()}, "entropies"),
        ({"entropies": base64.b64encode(zlib.compress(bytes(64))[:-6]).decode()}, "entropies"),
        ({"entropies": BOMB}, "entropies"),
        ({"entropies": base64.b64encode(zlib.compress(b"\0\x7c" * 4)).decode()}, "an entropy is infinite"),
        ({"params": {"temperature": "hot"}}, "temperature"),
        ({"params": {"temperature": float("inf")}}, "temperature"),
        ({"params": {"temperature": 10**400}}, "temperature"),
        ({"params": {"policy": {"a": 1}}}, "params.policy"),
        ({"params": {"stop": [["a"]]}}, "params.stop"),
        ({"id": 5}, "id is"),
        ({"format": ESCAPE}, "not 'diffucoder-trace'"),
        ({"version": {"a": [1] * 1000}}, "not 'diffucoder-trace'"),
    ],
)
def test_a_hostile_trace_is_one_line(tmp_path: Path, refused: Refused, change: Json, reason: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("\n" + json.dumps({**GOOD, "model": "tiny", **change}) + "\n")
    line = refused("order", "--traces", path)
    assert reason in line
    assert "t.jsonl" in line


def test_settings_that_only_some_traces_have_are_drawn(tmp_path: Path) -> None:
    settings: list[Json] = [{}, {"temperature": None}, {"temperature": 0.5}, {"temperature": 1}, {"model": ["a"]}]
    entropies = pack_entropies([torch.ones(2)] * 2)
    rows = [{**GOOD, "model": "tiny", "params": params, "entropies": entropies} for params in settings]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = write(tmp_path / "report", [tmp_path / "t.jsonl"], Conventions())
    assert {run["settings"]["model"] for run in report["runs"]} == {"tiny"}
    assert (tmp_path / "report" / "temperature_ar_ness.svg").exists()


def test_drawings_and_texts_are_written_through_no_link(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({**GOOD, "model": "tiny"}) + "\n")
    report = tmp_path / "report"
    report.mkdir()
    names = ["ar_ness.png", "ar_ness.svg", "index.html", f"index.html.{os.getpid()}.partial"]
    for name in names:
        (report / name).symlink_to(tmp_path / "elsewhere")
    write(report, [tmp_path / "t.jsonl"], Conventions())
    assert not (tmp_path / "elsewhere").exists()


def test_a_name_may_be_as_long_as_names_can_be(tmp_path: Path) -> None:
    files.write_text(tmp_path / ("x" * 255), "text")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["text"]


@pytest.mark.parametrize("content", [b"", b"\xff", DEEP.encode(), b"{}", b"\x1f\x8bxx", b"[]\n", b'{"format": 1e999}'])
def test_what_is_not_a_file_of_traces_is_one_line(tmp_path: Path, refused: Refused, content: bytes) -> None:
    (tmp_path / "t.jsonl").write_bytes(content)
    refused("order", "--traces", tmp_path / "t.jsonl")


@pytest.mark.parametrize("name", ["traces.jsonl", "verdicts.jsonl", "settings.json"])
def test_a_folder_of_traces_with_a_pipe_is_one_line(tmp_path: Path, refused: Refused, name: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "traces.jsonl").write_text(json.dumps({**GOOD, "model": "tiny"}) + "\n")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused("order", "--traces", folder)


def test_a_trace_of_a_model_that_is_not_here_is_read_with_one_that_is(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    path = tmp_path / "t.jsonl"
    names = ["$x$ $\\frac$", "<script>alert(1)</script>", ESCAPE, "_hidden", "\ud800", "a|b\nc"]
    path.write_text("".join(json.dumps({**GOOD, "model": name, "id": f"{name}#0"}) + "\n" for name in names))
    monkeypatch.setattr(sys, "argv", ["diffucoder", "order", "--traces", str(path), "--model", "tiny", "--run", "out"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr().out
    assert not ended.value.code
    assert "\x1b" not in shown
    page = (tmp_path / "out/index.html").read_text()
    assert "<script>alert" not in page
    assert "\x1b" not in page
    assert len(json.loads((tmp_path / "out/report.json").read_text())["runs"]) == len(names)


def test_more_settings_than_can_be_compared_are_one_line(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({**GOOD, "model": "tiny", "params": {"x": k}}) + "\n" for k in range(100)))
    assert "holds over 64 models and settings" in refused("order", "--traces", path)


def test_verdicts_of_a_stranger_do_not_matter_to_the_order(tmp_path: Path) -> None:
    from diffucoder.analysis.runs import read_runs

    write_traces(tmp_path / "traces.jsonl", [Trace(**{**_fields(GOOD), "model": "tiny", "id": "a#0"})])
    (tmp_path / "verdicts.jsonl").write_text('{}\n{"task_id": ["a"], "sample": {}}\n{"task_id": "a", "sample": 0}\n')
    assert read_runs([tmp_path])[0].answers[0].passed is False


def _fields(content: Json) -> Json:
    return {name: value for name, value in content.items() if name not in ("format", "version")}


def test_the_order_of_a_long_answer_takes_linear_time() -> None:
    """A second quadratic in the length would be a billion of comparisons."""
    length = 2**15
    order = list(range(length))[::-1]
    assert global_ar_ness(order, 1) == pytest.approx(1 / length)
    assert global_ar_ness(order[::-1], 4) == 1


def test_many_prompts_and_one_long_answer_take_limited_memory() -> None:
    from diffucoder.analysis.order import _summary

    with pytest.raises(ConfigError, match="10,001 prompts with up to 30,000 positions are too many"):
        _summary([{"0": 1.0}] * 10_000 + [dict.fromkeys(map(str, range(30_000)), 1.0)])


def test_the_mean_of_maps_takes_limited_memory() -> None:
    torch.manual_seed(0)
    long, wide = torch.zeros(2**14, 1).numpy(), torch.zeros(2, 2**14).numpy()
    with pytest.raises(ConfigError, match="are too many to be averaged"):
        mean_map(iter([long, wide]))


# --- samples, tasks, data, settings -----------------------------------------------------------------------------------

SAMPLE: Json = {"task_id": "tiny/0", "solution": "x = 1"}
SAMPLES = {
    "deep": DEEP.encode(),
    "deep but JSON": f'{{"task_id": "a", "b": {LEGAL_BUT_DEEP}}}'.encode(),
    "many digits": b'{"task_id": ' + b"1" * 5000 + b"}",
    "not UTF-8": b"\xff\xfe{}",
    "columns": json.dumps({str(k): k for k in range(100_000)}).encode(),
    "a terminal's commands": json.dumps({**SAMPLE, "task_id": ESCAPE}).encode(),
    "a list for an id": json.dumps({**SAMPLE, "task_id": ["a"] * 1000}).encode(),
    "an object for a program": json.dumps({**SAMPLE, "solution": {"a": ["b"] * 1000}}).encode(),
    "cut archive": zipped(json.dumps(SAMPLE).encode() * 99)[:-9],
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_hostile_file_of_samples_is_one_line(tmp_path: Path, refused: Refused, name: str) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(SAMPLES[name] + b"\n")
    assert "s.jsonl" in refused("evaluate", "tiny", "--samples", path, "--unsafe")


@pytest.mark.parametrize(
    "row",
    [
        [],
        7,
        {"prompt": 5},
        {"prompt": "a", "tests": [1]},
        {"prompt": "a", "tests": ["assert f()"], "entry_point": ["f"]},
        {"prompt": "a", "tests": ["assert f()"], "solution": {"a": 1}},
        {"prompt": "a", "tests": "assert f()"},
        {"prompt": None},
    ],
)
def test_a_hostile_file_of_tasks_is_one_line(tmp_path: Path, refused: Refused, row: object) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"prompt": "a", "tests": ["assert f()"]}) + "\n" + json.dumps(row) + "\n")
    line = refused("evaluate", path, "--data", tmp_path, "--unsafe")
    assert "mine.jsonl" in line
    assert "row 2" in line


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("verdicts.jsonl", os.mkfifo),
        ("verdicts.jsonl", os.mkdir),
        ("settings.json", os.mkfifo),
        ("report.json", os.mkdir),
    ],
)
def test_a_run_folder_with_something_else_for_a_file_is_one_line(
    tmp_path: Path, refused: Refused, name: str, make: Callable[[Path], None]
) -> None:
    samples = tmp_path / "s.jsonl"
    samples.write_text(json.dumps({"task_id": "mine/0", "solution": "def f():\n    return 1"}) + "\n")
    (tmp_path / "mine.jsonl").write_text(json.dumps({"prompt": "a", "tests": ["assert f() == 1"]}) + "\n")
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / name)
    line = refused("evaluate", tmp_path / "mine.jsonl", "--samples", samples, "--run", tmp_path / "run", "--unsafe")
    assert name in line or "run folder" in line


def test_ids_of_tasks_do_not_name_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffucoder.evaluation.benchmarks import Calls, Task
    from diffucoder.evaluation.judge import _reference_path

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for task_id in ("../../../x", "/etc/passwd", "..", "a\0b", "é" * 5000, "\ud800", ESCAPE):
        path = _reference_path(Task(task_id, "f", "", "", "\ud800"), Calls(((),)))
        assert path.parent == tmp_path / "diffucoder/references"
        assert path.name.isascii()
        assert path.name.isprintable()
        assert len(path.name) < 200


@pytest.mark.parametrize("tokens", [[1, 2, 3], "many", None, -5, 1e300, 10**400])
def test_costs_that_are_no_numbers_count_as_nothing(tokens: object) -> None:
    from diffucoder.evaluation.report import ratio

    assert ratio([{"tokens": tokens, "forward_passes": 2}], "tokens", "forward_passes") == 0


@pytest.mark.parametrize(
    "content",
    [
        "a = " + "[" * 20_000,
        "steps = " + "1" * 5000,
        "run = '" + "x" * 5000 + "'\nsteps = 'x'",
        "steps = '\\u001b'",
        '"\\u001b[2J" = 1',
        "\0",
        f"run.{'a.' * 5000}b = 1",
        f"[decoding]\ntemperature.{'a.' * 5000}b = 1",
    ],
)
def test_a_hostile_recipe_is_one_line(tmp_path: Path, refused: Refused, content: str) -> None:
    (tmp_path / "recipe.toml").write_text(content)
    refused("train", "sft", tmp_path / "recipe.toml")


def test_a_setting_of_many_tables_is_one_line(refused: Refused) -> None:
    assert "over 200 deep" in refused("train", "sft", "--set", f"run.{'a.' * 5000}b=1")


def test_a_recipe_that_is_a_pipe_is_one_line(tmp_path: Path, refused: Refused) -> None:
    os.mkfifo(tmp_path / "recipe.toml")
    assert "not a regular file" in refused("train", "sft", tmp_path / "recipe.toml")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\n" * 2000, "over 1,000 records"),
        (DEEP.encode(), "not JSON that can be read"),
        (b'{"messages": [{"role": "\\u001b[2J"}]}', "roles"),
        (json.dumps({"messages": [{"role": "x" * 10_000}]}).encode(), "roles"),
        (zipped(b" " * 2**20, times=70), "line 1 is longer than 64 MiB"),
    ],
)
def test_hostile_data_is_one_line(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, content: bytes, reason: str
) -> None:
    monkeypatch.setattr("diffucoder.training.sources._MOST_SKIPPED", 1000)
    (tmp_path / "chats.jsonl").write_bytes(content)
    settings = ["run=run", "data=chats.jsonl", "cache=data", "lr=1e-4", "steps=1", "batch=1", "length=64"]
    assert reason in refused("train", "sft", *(part for each in settings for part in ("--set", each)))


def test_an_archive_that_unpacks_to_gigabytes_takes_no_memory(tmp_path: Path) -> None:
    """A process of its own that may have 4 GiB in all."""
    (tmp_path / "bomb.jsonl.gz").write_bytes(zipped(b" " * 2**20, times=6000))

    def limits() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

    command = [sys.executable, "-m", "diffucoder.cli", "evaluate", "tiny", "--unsafe"]
    command += ["--samples", str(tmp_path / "bomb.jsonl.gz")]
    ended = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=limits, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert ended.returncode == 2, ended.stderr
    assert "line 1 is longer than 64 MiB" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_tokenised_data_on_a_full_disk_say_what_to_do(tmp_path: Path) -> None:
    """The limit on the size of a file is in the place of the disk."""
    from diffucoder.tokenizer import Tokenizer
    from diffucoder.training.data import prepare

    (tmp_path / "a.txt").write_text("x = 1\n" * 20_000)
    tokenizer = Tokenizer.load(SHIPPED)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot be written: the disk is full; free some space, or name"):
            prepare(tmp_path / "a.txt", tokenizer, tmp_path / "cache", kind="documents")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert prepare(tmp_path / "a.txt", tokenizer, tmp_path / "cache", kind="documents").tokens > 20_000


def test_tokenised_data_that_point_outside_of_their_file_are_one_line(tmp_path: Path) -> None:
    from diffucoder.tokenizer import Tokenizer
    from diffucoder.training.data import prepare

    (tmp_path / "a.txt").write_text("x = 1\n")
    tokenizer = Tokenizer.load(SHIPPED)
    store = prepare(tmp_path / "a.txt", tokenizer, tmp_path / "cache", kind="documents")
    [table] = store.folder.rglob("*.arrow")
    content = table.read_bytes()
    ends = store.tokens.to_bytes(4, "little")  # the end of the only list
    at = content.rindex(ends)
    table.unlink()  # it is mapped
    table.write_bytes(content[:at] + (10**8).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(CheckpointError, match="cannot be read or written"):
        prepare(tmp_path / "a.txt", tokenizer, tmp_path / "cache", kind="documents")


def test_tokens_that_the_model_lacks_are_one_line(tmp_path: Path) -> None:
    from datasets import Dataset

    from diffucoder.training.data import TokenStore

    store = TokenStore(Dataset.from_dict({"ids": [[1, 2], [1, 9]], "answer": [99, 0]}), tmp_path, vocab_size=9)
    assert store.example(0)[1] == 2
    for read in (lambda: store.example(1), lambda: store.window(1, 2)):
        with pytest.raises(CheckpointError, match="has tokens that the model lacks; delete it"):
            read()
