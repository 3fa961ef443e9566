"""What is attacked, and what must not happen: called in child processes by `fuzz.py` (through `diffucoder.limited`).

`answer_requests` sends requests to the application of the shipped model, in this process. `read_files` lays out the
files of an example of `hostile_files` and calls what reads them. A fault is text; "" is none. A rejection is none: the
server answers with a status below 500 and JSON in OpenAI's form, the command line with one line and exit code 2, a
function with one of the package's own errors.
"""

import asyncio
import io
import json
import logging
import os
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1"}

import httpx
import torch
from layout import RUNS, lay_out, run_command, workplace

from diffucoder import DiffuCoder
from diffucoder.config import load_settings
from diffucoder.decoding.params import DecodingParams
from diffucoder.errors import DiffuCoderError
from diffucoder.grading.extract import answered, program_from
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


# --- files: what reads them ------------------------------------------------------------------------------------------


def read_files(example: dict[str, Any]) -> Json:
    """Lay out the files of an example and read them. Return the outcome, its fault, and the memory."""
    target = example["target"]
    room = workplace()
    folder = room / "attacked"
    try:
        folder.mkdir()
        lay_out(folder, target, example["files"])
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


def _read(target: str, folder: Path, given: dict[str, str]) -> str | None:
    if target == "model":
        options = ["--dtype", "float32", "--device", "cpu", "--new-tokens", "2"]
        return run_command("generate", "--model", str(folder), *options, "a" * 40 + "xc")
    if target == "infill":
        more = [f"--{name}={value.encode('utf-8', 'replace').decode()}" for name, value in given.items()]
        return run_command("infill", str(folder / "holes.py"), "--steps", "2", *more)
    if target == "gguf":
        return run_command("convert", str(folder / "model.gguf"), str(folder / "out"))
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
        return run_command(*RUNS[target][:2], *more, *RUNS[target][2:], at=folder)
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
