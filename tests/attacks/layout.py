"""The files of an example of `hostile_files`: the honest ones of its target, with its edits.

Not for: reading them (`targets`).
"""

import gzip
import io
import json
import os
import shutil
import sys
import tempfile
import tomllib
import zlib
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache
from pathlib import Path
from typing import Any

from hostile_files import CHAT, DOCUMENT, EXERCISE, SAMPLE, TRACE

from diffucoder.cli import main
from diffucoder.models.hub import SHIPPED

Json = Any  # whatever JSON can hold
ROOM = "FUZZ_ROOM"  # variable that names the folder in which a child makes its own


def _lines(*rows: Json) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@cache
def workplace() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=os.environ.get(ROOM)))
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    return folder


@cache
def honest(target: str) -> Path:
    """The folder of the honest files of a target."""
    folder = workplace() / f"honest-{target}"
    folder.mkdir(exist_ok=True)
    if target == "model":
        shutil.copytree(SHIPPED, folder, dirs_exist_ok=True)
    rows = {"traces": TRACE, "chats": CHAT, "documents": DOCUMENT, "exercises": EXERCISE, "samples": SAMPLE}
    rows["benchmark"] = EXERCISE
    if target in rows:
        (folder / "rows.jsonl").write_bytes(_lines(*[rows[target]] * 2))
    elif target.startswith("recipe"):
        recipe = {"steps": 2, "batch": 8, "lr": 1e-4, "run": "x", "data": "rows.jsonl"}
        if target == "recipe-pretrain":
            recipe["tokenizer"] = "x"
        (folder / "recipe.toml").write_text(_toml(recipe))
    elif target == "gguf":
        _write_gguf(folder / "model.gguf")
    elif target.endswith("-run"):
        (workplace() / "rows.jsonl").write_bytes(_lines(CHAT, CHAT))
        assert not (fault := run_command(*RUNS[target], at=folder)), fault
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


def lay_out(folder: Path, target: str, files: dict[str, list[list[Any]]]) -> None:
    """Make a folder of the honest files of a target with the edits of an example."""
    source = honest(target)
    copy = os.link if target == "model" else shutil.copy  # weights are large, and nobody writes to them
    shutil.copytree(source, folder, dirs_exist_ok=True, copy_function=copy)
    if target == "order-run":  # a folder of a run for each model and setting
        folder = next(folder.glob("tiny-*"))
    for name, edits in files.items():
        path = _place(folder, name)
        content = path.read_bytes() if path.is_file() else b""
        path.unlink(missing_ok=True)
        for edit in edits:
            content = _edited(path.name, content, edit)
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
    """Let the sizes and checksums of a checkpoint fit its files, as an attacker would."""
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            whole = json.loads((checkpoint / "whole.json").read_text())
            for path in checkpoint.iterdir():
                if path.name != "whole.json" and path.is_file() and not path.is_symlink():
                    content = path.read_bytes()
                    whole["files"][path.name] = [len(content), zlib.crc32(content)]
            (checkpoint / "whole.json").write_text(json.dumps(whole))


def _place(folder: Path, name: str) -> Path:
    """The file of a name in the folder of an example; "*2" is the third of those that there are."""
    path = folder / name
    if path.name.startswith("*"):
        present = sorted(file for file in path.parent.iterdir() if file.name != "whole.json")
        path = present[int(path.name[1:]) % len(present)]
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def run_command(*arguments: str, at: Path | None = None) -> str:
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
