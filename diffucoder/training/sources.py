"""Sources of training text, read as a stream of records: folders, JSONL files, hub datasets.

For: finding files, reading them, judging what is in them. Not for: tokens (`data`) or what is kept on disk (`shards`).

A record is a document, which is text alone, or a chat, which is messages and the answer to them; `parsed_rows` reads
whatever else a JSONL file holds, by a reader of its caller's. What cannot be read is never dropped in silence: it comes
out of the same stream as a `Skipped`, named by its file and line.
"""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeVar

from diffucoder.errors import CheckpointError, ConfigError

Kind = Literal["documents", "chat"]
Json = dict[str, Any]  # Any: whatever a JSON record holds

JSONL = (".jsonl", ".jsonl.gz")
SUFFIXES: Mapping[Kind, tuple[str, ...]] = {"documents": (".py", ".txt", ".md"), "chat": JSONL}  # looked for in folders
_HUB = re.compile(r"hub:(?P<name>[^/@]+/[^/@]+)(?:/(?P<config>[^@]+))?(?:@(?P<split>.+))?")
_PAIRS = (("prompt", "answer"), ("instruction", "output"))  # how data sets call a request and its answer


@dataclass(frozen=True)
class Record:
    """A document (`prompt` is empty), or an answer and the messages before it."""

    where: str
    text: str
    prompt: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A record that cannot be used: its file and line, and the reason."""

    where: str
    why: str


T = TypeVar("T")
Parse = Callable[[str, Json], T]  # (where, fields); ValueError with the reason where they make no record


def describe(source: str, suffixes: Sequence[str]) -> Json:
    """What tells one state of `source` from another: the names, sizes and times of its files.

    A hub dataset is known by its name alone, since asking whether it has changed would need a network every time.
    ConfigError where there is nothing to read.
    """
    if source.startswith("hub:"):
        return {"source": source, **_hub_parts(source)}
    listing, count, size = hashlib.sha256(), 0, 0
    for path in _files(source, suffixes):
        stat = path.stat()
        listing.update(f"{path.as_posix()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
        count, size = count + 1, size + stat.st_size
    return {"source": source, "files": count, "bytes": size, "listing": listing.hexdigest()}


def records(
    sources: Sequence[str], *, kind: Kind, suffixes: Sequence[str], text_field: str = "text"
) -> Iterator[Record | Skipped]:
    """The records of all `sources`, one after the other; files of a folder in the order of their names.

    `text_field` is where a JSONL or hub document has its text; left at "text", "content" is taken too. ConfigError for
    a source that is not there, CheckpointError for a hub dataset that cannot be reached or read.
    """
    parse: Parse[Record] = _chat if kind == "chat" else lambda where, fields: _document(where, fields, text_field)
    for source in sources:
        if source.startswith("hub:"):
            yield from _hub_records(source, parse)
            continue
        for path in _files(source, suffixes):
            yield from _jsonl_records(path, parse) if path.name.endswith(JSONL) else _file_records(path)


def parsed_rows(sources: Sequence[str], parse: Parse[T]) -> Iterator[T | Skipped]:
    """What `parse` makes of each row of JSONL files, folders of them and hub datasets; errors as `records` has them."""
    for source in sources:
        if source.startswith("hub:"):
            yield from _hub_records(source, parse)
            continue
        for path in _files(source, JSONL):
            yield from _jsonl_records(path, parse)


# --- where records are read from -------------------------------------------------------------------------------------


def _files(source: str, suffixes: Sequence[str]) -> list[Path]:
    """The file that `source` is, or the files with these suffixes below the folder that it is, sorted."""
    path, endings = Path(source), tuple(suffixes)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.name.endswith(endings) and p.is_file())
        if not found:
            raise ConfigError(f"source {source!r} holds no file with suffix {' '.join(endings)}; name another folder")
        return found
    if not path.is_file():
        raise ConfigError(f"source {source!r} is no folder and no file; check the path, or write hub:owner/name")
    if not path.name.endswith((*JSONL, *endings)):
        allowed = " ".join(dict.fromkeys((*JSONL, *endings)))
        raise ConfigError(f"source {source!r} has none of the suffixes {allowed}; convert it, or name its folder")
    return [path]


def _file_records(path: Path) -> Iterator[Record | Skipped]:
    """A whole file as one document."""
    try:
        yield Record(str(path), text_of(_decode(path.read_bytes()), "file"))
    except OSError as error:
        yield Skipped(str(path), f"cannot be read ({error.strerror})")
    except ValueError as error:
        yield Skipped(str(path), str(error))


def _jsonl_records(path: Path, parse: Parse[T]) -> Iterator[T | Skipped]:
    """A record a line. Where reading breaks off, what follows is lost, and the line is named."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                where = f"{path}:{number}"
                try:
                    yield parse(where, _fields(line))
                except ValueError as error:
                    yield Skipped(where, str(error))
    except (OSError, EOFError, zlib.error) as error:
        yield Skipped(f"{path}:{number + 1}", f"cannot be read from here on ({error})")


def _hub_records(source: str, parse: Parse[T]) -> Iterator[T | Skipped]:
    for number, row in _hub_rows(source):
        where = f"{source}:{number}"
        try:
            yield parse(where, row)
        except ValueError as error:
            yield Skipped(where, str(error))


def _hub_rows(source: str) -> Iterator[tuple[int, Json]]:
    """The rows of a hub dataset, streamed, counted from 1."""
    parts, number = _hub_parts(source), 0
    try:
        datasets = import_module("datasets")  # late: it is optional, and takes seconds
    except ImportError:
        raise ConfigError(f'source {source!r} needs datasets; pip install "diffucoder[train]"') from None
    try:
        rows = datasets.load_dataset(parts["name"], parts["config"], split=parts["split"], streaming=True)
        for number, row in enumerate(rows, start=1):
            yield number, row
    except Exception as error:  # whatever the readers of a hundred formats and a network raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"source {source!r} cannot be read at row {number + 1} ({reason}); "
            "check its name, config and split, and the network"
        ) from error


def _hub_parts(source: str) -> dict[str, str | None]:
    """Name, config (None: the default one) and split of `hub:owner/name/config@split`."""
    match = _HUB.fullmatch(source)
    if match is None:
        raise ConfigError(f"source {source!r} is not of the form hub:owner/name, with /config and @split as needed")
    return {**match.groupdict(), "split": match["split"] or "train"}


# --- what makes a record ---------------------------------------------------------------------------------------------


def _document(where: str, fields: Json, text_field: str) -> Record:
    names = ("text", "content") if text_field == "text" else (text_field,)
    name = next((name for name in names if name in fields), None)
    if name is None:
        raise ValueError(f"has no field {' or '.join(map(repr, names))}")
    return Record(where, text_of(fields[name], f"field {name!r}"))


def _chat(where: str, fields: Json) -> Record:
    """From `messages`, or a request and its answer; what Alpaca calls `input` is the rest of the request."""
    if "messages" in fields:
        *prompt, last = _messages(fields["messages"])
        return Record(where, last["content"], tuple(prompt))
    names = next((pair for pair in _PAIRS if all(name in fields for name in pair)), None)
    if names is None:
        raise ValueError("has neither 'messages', nor 'prompt' and 'answer', nor 'instruction' and 'output'")
    request, answer = (text_of(fields[name], f"field {name!r}") for name in names)
    if names[0] == "instruction" and fields.get("input"):
        request += "\n\n" + text_of(fields["input"], "field 'input'")
    return Record(where, answer, ({"role": "user", "content": request},))


def _messages(messages: Any) -> list[dict[str, str]]:  # Any: from a file
    """Role and content of each message: an optional system message, then user and assistant, who speaks last."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("field 'messages' is no list of messages")
    roles = [message.get("role") for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if any(role not in ("user", "assistant") for role in turns) or turns[-2:] != ["user", "assistant"]:
        raise ValueError(f"roles {', '.join(map(str, roles)) or 'none'} are not (system,) user, assistant, ...")
    return [{"role": message["role"], "content": _content(message)} for message in messages]


def _content(message: Json) -> str:
    content = message.get("content")
    if message["role"] == "system" and content == "":
        return ""  # says that there is to be no system message, not even the default one
    return text_of(content, f"{message['role']} message")


def _fields(line: bytes) -> Json:
    """The JSON object on a line."""
    text = text_of(_decode(line).rstrip("\r\n"), "line")
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos + 1})") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets thousands deep
        raise ValueError(f"not JSON that can be read ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"not a JSON object but {type(fields).__name__}")
    return fields


def _decode(content: bytes) -> str:
    """Text without the mark that some editors put before UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from None


def text_of(value: Any, what: str) -> str:  # Any: from a file
    """`value`, which must be text with something in it."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is {type(value).__name__}, not text")
    if not value.strip():
        raise ValueError(f"{what} is empty")
    return value
