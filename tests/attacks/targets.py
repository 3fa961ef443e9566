"""What is attacked, and what must not happen: called in child processes by `fuzz.py` (through `diffucoder.limited`).

`answer_requests` sends requests to the application of the shipped model, in this process. `read_files` lays out the
files of an example of `hostile_files` and calls what reads them. A fault is text; "" is none. A rejection is none: the
server answers with a status below 500 and JSON in OpenAI's form, the command line with one line and exit code 2, a
function with one of the package's own errors.
"""

import asyncio
import gzip
import io
import json
import logging
import os
import resource
import shutil
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import cache
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1"}

import httpx
import torch
from hostile_files import CHAT, DOCUMENT, EXERCISE, SAMPLE, TRACE

from diffucoder import DiffuCoder
from diffucoder.cli import main
from diffucoder.config import load_settings
from diffucoder.decoding.params import DecodingParams
from diffucoder.errors import DiffuCoderError
from diffucoder.grading.extract import answered, program_from
from diffucoder.models.hub import SHIPPED
from diffucoder.serving.app import create_app
from diffucoder.serving.settings import EngineSettings, ServerSettings
from diffucoder.training.settings import STAGES

Json = Any  # whatever JSON can hold
DEADLINE = 2.0  # seconds of a request to the application
DRAINED = 60.0  # seconds of the clock until an engine whose requests are all answered has nothing to do

_contacts: list[str] = []


def _note_contact(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect" and isinstance(arguments[1], tuple):  # not a path: that is on this machine
        _contacts.append(f"connection to {arguments[1]}")
    elif event == "socket.getaddrinfo":
        _contacts.append(f"look-up of {arguments[0]}")


sys.addaudithook(_note_contact)
torch.set_num_threads(1)


def memory() -> int:
    """The most resident memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


# --- requests --------------------------------------------------------------------------------------------------------


class _Log(logging.Handler):
    """Keeps what is logged as a warning or worse."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@cache
def _application() -> tuple[Any, _Log]:
    torch.set_num_threads(1)
    coder = DiffuCoder.load(dtype=torch.float32, device="cpu")
    settings = ServerSettings(
        decoding=DecodingParams(new_tokens=4), engine=EngineSettings(deadline=DEADLINE, max_waiting=500)
    )
    log = _Log()
    logging.getLogger().addHandler(log)
    return create_app(coder, settings), log


def answer_requests(requests: list[dict[str, Any]]) -> Json:
    """Send the requests together. Return the status and the fault of each, the faults of all, and the memory."""
    app, log = _application()
    log.lines.clear()
    answers = asyncio.run(_send_all(app, requests))
    faults = [f"logged: {line[-3000:]}" for line in log.lines]
    engine = app.state.server.engine
    began = time.monotonic()
    while engine.alive and (left := engine.stats())["waiting"] + left["running"]:
        if time.monotonic() - began > DRAINED:
            faults.append(f"the engine still works for nobody: {left}")
            break
        time.sleep(0.01)
    if not engine.alive:
        faults.append("the engine stopped")
    return {"answers": answers, "faults": faults, "memory": memory()}


async def _send_all(app: Any, requests: list[dict[str, Any]]) -> list[tuple[int, str]]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=None) as client:
        return await asyncio.gather(*(_send(client, request) for request in requests))


async def _send(client: httpx.AsyncClient, request: dict[str, Any]) -> tuple[int, str]:
    headers = {name: value.encode("latin-1") for name, value in request["headers"].items()}
    content = request["body"].encode("latin-1")
    answer = await client.request(request["method"], request["path"], content=content, headers=headers)
    return answer.status_code, fault_of_answer(request["method"], answer.status_code, answer.headers, answer.content)


def fault_of_answer(method: str, status: int, headers: Any, content: bytes) -> str:
    """What is wrong with an answer; "" for nothing."""
    if status >= 500:
        return f"status {status}: {content[:300]!r}"
    if b'"server_error"' in content:
        return f"an event with a server error: {content[-300:]!r}"
    if status >= 400 and method != "HEAD" and headers.get("content-type", "").startswith("application/json"):
        error = json.loads(content).get("error")
        if not isinstance(error, dict) or not isinstance(error.get("message"), str) or "\n" in error["message"].strip():
            return f"status {status}, not one line in OpenAI's form: {content[:300]!r}"
    return ""


# --- files: what is laid out -----------------------------------------------------------------------------------------


def _lines(*rows: Json) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@cache
def _workplace() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    return folder


@cache
def _honest(target: str) -> Path:
    """The folder of the honest files of a target."""
    folder = _workplace() / f"honest-{target}"
    if target == "model":
        return SHIPPED
    folder.mkdir()
    rows = {"traces": TRACE, "chats": CHAT, "documents": DOCUMENT, "exercises": EXERCISE, "samples": SAMPLE}
    rows["benchmark"] = EXERCISE
    if target in rows:
        (folder / "rows.jsonl").write_bytes(_lines(*[rows[target]] * 2))
    elif target.startswith("recipe"):
        recipe = {"steps": 1, "batch": 2, "lr": 1e-4, "run": "x", "data": "rows.jsonl"}
        (folder / "recipe.toml").write_text(_toml(recipe))
    elif target == "gguf":
        _write_gguf(folder / "model.gguf")
    elif target.endswith("-run"):
        command = RUNS[target]
        (_workplace() / "rows.jsonl").write_bytes(_lines(CHAT, CHAT))
        assert not (fault := _command(*command, at=folder)), fault
    return folder


def _write_gguf(path: Path) -> None:
    """A random parent as llama.cpp has it."""
    from parents import tokenizer, write_parent
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 310, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = AutoConfig.for_model("llama", **sizes, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    write_parent(path, AutoModelForCausalLM.from_config(config), tokenizer())


RUNS = {
    "evaluate-run": ["evaluate", "tiny", "--limit", "1", "--steps", "2", "--dtype", "float32", "--run"],
    "order-run": ["order", "tiny", "--limit", "1", "--steps", "2", "--dtype", "float32", "--run"],
    "train-run": [
        "train",
        "sft",
        "--set",
        "data=rows.jsonl",
        "--set",
        "lr=1e-4",
        "--set",
        "steps=2",
        "--set",
        "batch=1",
    ],
}
RUNS["train-run"] += [
    "--set",
    "length=64",
    "--set",
    "save_every=1",
    "--set",
    "cache=cache",
    "--set",
    "bf16=false",
    "--set",
]


def _toml(settings: Json) -> str:
    lines = ""
    for name, value in settings.items():
        key = json.dumps(str(name))
        if isinstance(value, dict):
            value = ", ".join(f"{json.dumps(str(inner))} = {_toml_value(part)}" for inner, part in value.items())
            lines += f"{key} = {{{value}}}\n"
        else:
            lines += f"{key} = {_toml_value(value)}\n"
    return lines


def _toml_value(value: Json) -> str:
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, dict):
        return "{}"
    return json.dumps(value)


def _parse(name: str, content: bytes) -> tuple[Json, Callable[[Json], bytes]]:
    """The document in a file, and how it is written."""
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in content.splitlines()], lambda rows: _lines(*_rows(rows))
    if name.endswith(".toml"):
        return tomllib.loads(content.decode()), lambda fields: _toml(fields).encode("utf-8", "surrogatepass")
    if name.endswith(".safetensors"):
        size = int.from_bytes(content[:8], "little")

        def written(header: Json) -> bytes:
            text = json.dumps(header).encode()
            return len(text).to_bytes(8, "little") + text + content[8 + size :]

        return json.loads(content[8 : 8 + size]), written
    return json.loads(content), lambda document: json.dumps(document).encode()


def _rows(document: Json) -> list[Json]:
    return document if isinstance(document, list) else [document]


def _edited(name: str, content: bytes, edit: list[Any]) -> bytes:
    """The content of a file after an edit of `hostile_files`."""
    kind, *arguments = edit
    at = int(arguments[0] * len(content)) if kind in ("cut", "flip", "insert") else 0
    if kind in ("set", "drop"):
        with suppress(ValueError, UnicodeDecodeError, RecursionError):  # no document any more: as it is
            document, write = _parse(name, content)
            return write(_changed(document, kind, *arguments))
    if kind == "cut":
        return content[:at]
    if kind == "flip" and content:
        at = min(at, len(content) - 1)
        return content[:at] + bytes([arguments[1]]) + content[at + 1 :]
    if kind == "insert":
        return content[:at] + arguments[1].encode("latin-1") + content[at:]
    if kind == "text":
        return arguments[0].encode("latin-1")  # type: ignore[no-any-return]
    if kind == "repeat":
        return content * (arguments[0] if len(content) < 2**20 else 1)
    if kind == "deep":
        return arguments[0].encode() * arguments[1]  # type: ignore[no-any-return]
    return content


def _changed(document: Json, kind: str, path: list[Json], value: Json = None) -> Json:
    """`document` with a value set or dropped, if it has such a place."""
    if not path:
        return value
    place = document
    for name in path[:-1]:
        if isinstance(place, list) and isinstance(name, int) and place:
            place = place[name % len(place)]
        elif isinstance(place, dict) and name in place:
            place = place[name]
        else:
            return document
    name = path[-1]
    if isinstance(place, dict):
        place[str(name)] = value
        if kind == "drop":
            del place[str(name)]
    elif isinstance(place, list) and place and isinstance(name, int):
        place[name % len(place)] = value
        if kind == "drop":
            del place[name % len(place)]
    return document


def _lay_out(folder: Path, target: str, files: dict[str, list[list[Any]]]) -> None:
    """Make a folder of the honest files of a target with the edits of an example."""
    honest = _honest(target)
    if target == "model":  # the weights are large
        for path in honest.iterdir():
            (folder / path.name).symlink_to(path)
    else:
        shutil.copytree(honest, folder, dirs_exist_ok=True)
    if target == "order-run":  # a folder of a run for each model and setting
        folder = next(folder.glob("tiny-*"))
    for name, edits in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.is_file() else b""
        path.unlink(missing_ok=True)
        for edit in edits:
            content = _edited(name, content, edit)
        kind, *arguments = edits[-1] if edits else [""]
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "link":
            path.symlink_to(arguments[0])
        elif kind == "zip":
            with gzip.open(path, "wb", 1) as file:
                for _ in range(arguments[0]):
                    file.write(b" " * 2**20)
        elif kind != "gone":
            path.write_bytes(content)
    if target == "train-run":
        _make_whole(folder)


def _make_whole(folder: Path) -> None:
    """Let the checksums of a checkpoint fit its files, as an attacker would."""
    from diffucoder.training.checkpoints import WHOLE, _size_and_checksum

    for checkpoint in (folder / "checkpoints").glob("step-*"):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            whole = json.loads((checkpoint / WHOLE).read_text())
            files = [path for path in checkpoint.iterdir() if path.name != WHOLE and path.is_file()]
            whole["files"] |= {path.name: _size_and_checksum(path) for path in files if path.resolve() == path}
            (checkpoint / WHOLE).write_text(json.dumps(whole))


# --- files: what reads them ------------------------------------------------------------------------------------------


def read_files(example: dict[str, Any]) -> Json:
    """Lay out the files of an example and read them. Return the outcome, its fault, and the memory."""
    target = example["target"]
    room = _workplace()
    folder = room / "attacked"
    try:
        folder.mkdir()
        _lay_out(folder, target, example["files"])
        _contacts.clear()
        with _caught() as outcome:
            outcome[1] = _read(target, folder, example.get("options", {})) or ""
        if not outcome[1] and _contacts:
            outcome[1] = f"made requests: {_contacts[:2]}"
        for canary in (room / "fell-to-a-pickle", Path("fell-to-a-pickle")):
            if canary.exists():
                canary.unlink()
                outcome[1] = "ran code"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"outcome": outcome[0], "fault": outcome[1], "memory": memory()}


@contextmanager
def _caught() -> Iterator[list[str]]:
    """Whether what is called within is read or rejected; the traceback of any other error is the second entry."""
    outcome = ["read", ""]
    try:
        yield outcome
    except DiffuCoderError as error:
        outcome[0] = "rejected"
        outcome[1] = "" if "\n" not in str(error) else f"not one line: {str(error)[:300]!r}"
    except MemoryError:
        raise
    except BaseException:  # tokenizers' panics are no Exceptions
        outcome[:] = ["broken", traceback.format_exc()[-3000:]]
    if outcome[1] == "rejected":
        outcome[:] = ["rejected", ""]


def _command(*arguments: str, at: Path | None = None) -> str:
    """Call the command line in this process. Return what is wrong with how it ended, "" or "rejected" if nothing is."""
    if at is not None:
        option = f"run={at}" if arguments[-1] == "--set" else str(at)
        arguments = (*arguments, option)
    sys.argv = ["diffucoder", *arguments]
    code: Any = None
    errors = io.StringIO()
    try:
        with redirect_stderr(errors), redirect_stdout(io.StringIO()):
            main()
    except SystemExit as end:
        code = end.code
    printed = errors.getvalue()
    last = printed.strip().splitlines()[-1:] or [""]
    if "Traceback" in printed or code not in (0, 2, None):
        return f"exit code {code}: {printed[-1500:]}"
    if code == 2:
        return (
            "rejected"
            if last[0].startswith("error: ") and printed.count("error: ") >= 1
            else f"not one line: {printed!r}"
        )
    return ""


def _read(target: str, folder: Path, options: dict[str, str]) -> str | None:
    if target == "model":
        return _command(
            *(
                "generate",
                "--model",
                str(folder),
                "--dtype",
                "float32",
                "--device",
                "cpu",
                "--new-tokens",
                "2",
                "a" * 40 + "xc",
            )
        )
    if target == "infill":
        more = [f"--{name}={value.encode('utf-8', 'replace').decode()}" for name, value in options.items()]
        return _command("infill", str(folder / "holes.py"), "--steps", "2", *more)
    if target == "gguf":
        return _command("convert", str(folder / "model.gguf"), str(folder / "out"))
    if target == "reply":
        reply = (folder / "reply.txt").read_text("utf-8", "replace")
        program_from(reply, names=["solve"])
        answered("def f(x):\n", reply, "f")
        return None
    if target.startswith("recipe-"):
        load_settings(STAGES[target.removeprefix("recipe-")], folder / "recipe.toml")
        return None
    if target.endswith("-run"):
        more = ["--resume", "--set", "trackers=[]"] if target == "train-run" else []
        command = RUNS[target]
        return _command(*command[:2], *more, *command[2:], at=folder)
    return _read_rows(target, folder / "rows.jsonl", folder)


def _read_rows(target: str, path: Path, folder: Path) -> None:
    """Read a file of JSON lines as what it is."""
    from diffucoder.analysis.order import analyse
    from diffucoder.analysis.runs import read_runs
    from diffucoder.analysis.settings import Conventions
    from diffucoder.evaluation.benchmarks import load
    from diffucoder.evaluation.samples import read_samples
    from diffucoder.models.checkpoint import load_tokenizer
    from diffucoder.training.data import prepare
    from diffucoder.training.exercises import read_exercises
    from diffucoder.training.sources import records

    if target == "traces":
        runs = read_runs([path])
        json.dumps(analyse(runs, Conventions()))
        for run in runs:
            for answer in run.answers:
                answer.trace.entropy_map.sum()
    elif target == "samples":
        read_samples(path, load("tiny"))
    elif target == "benchmark":
        load(str(path))
    elif target == "exercises":
        with redirect_stderr(io.StringIO()):
            read_exercises(path)
    else:
        kind: Any = "chat" if target == "chats" else "documents"
        for record in records(path, kind):
            str(record)
        if path.stat().st_size % 8 == 0:  # not all, since it takes a tenth of a second
            with redirect_stderr(io.StringIO()):
                prepare(path, load_tokenizer(), folder / "cache", kind=kind)
