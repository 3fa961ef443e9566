"""Rows of training data from JSONL files, folders of files and hub datasets.

No row is dropped in silence: one that cannot be used becomes a `Skipped`, which names its file and line.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeVar

from diffucoder.errors import CheckpointError, ConfigError, install, printable
from diffucoder.files import Json, decode_text, parse_json_line, read_bytes, read_lines, without_nulls

Kind = Literal["documents", "chat"]
T = TypeVar("T")
Parse = Callable[[str, Json], T]  # (where, fields) -> row; raises ValueError with the reason

JSONL = (".jsonl", ".jsonl.gz")
SUFFIXES: Mapping[Kind, tuple[str, ...]] = {"documents": (".py", ".txt", ".md"), "chat": JSONL}  # read from folders
Sources = str | Path | Sequence[str | Path]
"""One source or several: a folder, a file, or `hub:owner/name[/config][@split]`."""
_HUB = re.compile(r"hub:(?P<name>[^/@]+/[^/@]+)(?:/(?P<config>[^@]+))?(?:@(?P<split>.+))?")

_MOST_SKIPPED = 10**6  # rows, which are all kept in memory until the end
_LONGEST_REASON = 300  # characters; it may quote the row


@dataclass(frozen=True)
class Record:
    """A document (`prompt` is empty), or an answer and the messages before it."""

    where: str
    text: str
    prompt: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A row that cannot be used: its file and line, and the reason."""

    where: str
    reason: str

    def __str__(self) -> str:
        return printable(f"{self.where}: {self.reason}")


def records(sources: Sources, kind: Kind, suffixes: Sequence[str] | None = None) -> Iterator[Record | Skipped]:
    """The documents or chats of `sources`, one source after the other; `suffixes` as in `SUFFIXES`, as are errors."""
    parse = parse_chat if kind == "chat" else parse_document
    return read_rows(sources, parse, SUFFIXES[kind] if suffixes is None else suffixes)


def source_names(sources: Sources) -> list[str]:
    return [str(sources)] if isinstance(sources, str | Path) else list(map(str, sources))


def read_rows(sources: Sources, parse: Parse[T], suffixes: Sequence[str] = JSONL) -> Iterator[T | Skipped]:
    """What `parse` makes of each row; of a folder, the files with `suffixes` are read in the order of their names.

    A file that is not JSONL is one row, {"text": its content}. Fields that are null are left out of a row. Raises
    ConfigError for a source that does not exist, CheckpointError for a hub dataset that cannot be reached or read.
    """
    for source in source_names(sources):
        if source.startswith("hub:"):
            yield from _hub_rows(source, parse)
        for path in find_files(source, suffixes):  # none of a hub dataset
            yield from _file_rows(path, parse)


def usable(rows: Iterable[T | Skipped], name: str, skipped: list[Skipped]) -> Iterator[T]:
    """Yield usable rows, append the others to `skipped`, and report those. ConfigError if none is usable."""
    count = 0
    for row in rows:
        if not isinstance(row, Skipped):
            count += 1
            yield row
            continue
        skipped.append(row)
        if len(skipped) > _MOST_SKIPPED:
            raise ConfigError(f"over {_MOST_SKIPPED:,} records of {name} cannot be used; the first: {skipped[0]}")
    if skipped and count:
        records = f"{len(skipped):,} of {len(skipped) + count:,} records"
        print(f"skipped {records}; the first: {skipped[0]}", file=sys.stderr)
    elif skipped:
        raise ConfigError(f"none of {len(skipped):,} records of {name} can be used; the first: {skipped[0]}")
    elif not count:
        raise ConfigError(f"{name} holds no record; name another source")


def read_usable(sources: Sources, parse: Parse[T]) -> list[T]:
    """The usable rows of `sources`. Errors of `read_rows` and `usable`."""
    return list(usable(read_rows(sources, parse), ", ".join(source_names(sources)), []))


def find_files(source: str, suffixes: Sequence[str]) -> list[Path]:
    """The file `source`, or sorted files of a folder, not those of tools; [] for a hub name. Raises ConfigError."""
    if source.startswith("hub:"):
        _hub_parts(source)
        return []
    path = Path(source)
    if path.is_file():
        if not path.name.endswith((*JSONL, *suffixes)):
            allowed = " ".join(sorted({*JSONL, *suffixes}))
            raise ConfigError(f"source {source!r} has none of the suffixes {allowed}; convert it, or name its folder")
        return [path]
    if not path.is_dir():
        raise ConfigError(f"source {source!r} is not a folder or a file; check the path, or write hub:owner/name")
    files = [file for file in _visible_files(path) if file.name.endswith(tuple(suffixes))]
    if not files:
        raise ConfigError(f"source {source!r} holds no file with suffix {' '.join(suffixes)}; name another folder")
    return files


def other_files(source: str, suffixes: Sequence[str]) -> list[Path]:
    """The files of a folder that `find_files` leaves out for their suffix."""
    if not Path(source).is_dir():
        return []
    return [file for file in _visible_files(Path(source)) if not file.name.endswith(tuple(suffixes))]


def _visible_files(path: Path) -> list[Path]:
    files = []
    for folder, inner, names in os.walk(path):
        inner[:] = [name for name in inner if not _is_foreign(Path(folder, name))]
        files += [Path(folder, name) for name in names if name[0] != "."]
    return sorted(file for file in files if file.is_file())


def _is_foreign(folder: Path) -> bool:
    """Whether a folder within a source holds what tools put there, not the user's own files."""
    return folder.name[0] == "." or folder.name == "node_modules" or (folder / "pyvenv.cfg").exists()


def _file_rows(path: Path, parse: Parse[T]) -> Iterator[T | Skipped]:
    """A row for each line of a JSONL file, else one for the file. A line that cannot be read ends the file."""
    number = 0
    try:
        if not path.name.endswith(JSONL):
            content = read_bytes(path)
            yield _row(str(path), content, lambda content: {"text": text_of(decode_text(content), "file")}, parse)
            return
        for number, line in read_lines(path):
            yield _row(f"{path}:{number}", line, parse_json_line, parse)
    except OSError as error:
        yield Skipped(f"{path}:{number + 1}", f"cannot be read from here on ({error})")


def _row(where: str, content: Any, read: Callable[[Any], Json], parse: Parse[T]) -> T | Skipped:
    try:
        return parse(where, without_nulls(read(content)))
    except ValueError as error:
        return Skipped(where, str(error)[:_LONGEST_REASON])


def _hub_rows(source: str, parse: Parse[T]) -> Iterator[T | Skipped]:
    parts = _hub_parts(source)
    try:
        datasets = import_module("datasets")  # late: it is optional, and its import takes seconds
    except ImportError:
        raise ConfigError(f"source {source!r} needs datasets; {install('train')}") from None
    number = 0
    try:
        rows = datasets.load_dataset(parts["name"], parts["config"], split=parts["split"], streaming=True)
        for number, fields in enumerate(rows, start=1):
            yield _row(f"{source}:{number}", fields, dict, parse)
    except Exception as error:  # the readers of many formats and the network raise anything
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


def parse_document(where: str, fields: Json) -> Record:
    return Record(where, text_field(fields, first_name(("text", "content"), fields)))


def parse_chat(where: str, fields: Json) -> Record:
    """A chat from `messages`, or from a request and its answer; Alpaca's `input` belongs to the request."""
    if fields.get("messages"):
        *prompt, last = check_messages(fields["messages"])
        return Record(where, last["content"], tuple(prompt))
    for request_name, answer_name in (("prompt", "answer"), ("instruction", "output")):
        if request_name in fields and answer_name in fields:
            request = text_field(fields, request_name)
            if request_name == "instruction" and fields.get("input"):
                request += "\n\n" + text_field(fields, "input")
            return Record(where, text_field(fields, answer_name), ({"role": "user", "content": request},))
    raise ValueError("has neither 'messages', nor 'prompt' and 'answer', nor 'instruction' and 'output'")


def check_messages(messages: Any) -> list[dict[str, str]]:  # Any: from a file
    """Role and content of each message: perhaps a system message, then user and assistant, who speaks last."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("field 'messages' is not a list of messages")
    checked = [{"role": message.get("role"), "content": message.get("content")} for message in messages]
    roles = [message["role"] for message in checked]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if any(role not in ("user", "assistant") for role in turns) or turns[-2:] != ["user", "assistant"]:
        raise ValueError(f"roles {', '.join(map(str, roles)) or 'none'} are not (system,) user, assistant, ...")
    for message in checked:
        if message != {"role": "system", "content": ""}:  # which replaces the default one
            text_of(message["content"], f"{message['role']} message")
    return checked


def first_name(names: Sequence[str], fields: Json) -> str:
    """The first of `names` that is a field, and not an empty one if another is not. Raises ValueError."""
    present = [name for name in names if name in fields]
    if not present:
        raise ValueError(f"has no field {' or '.join(map(repr, names))}")
    return next((name for name in present if fields[name]), present[0])


def text_field(fields: Json, name: str) -> str:
    return text_of(fields[name], f"field {name!r}")


def text_of(value: Any, what: str) -> str:  # Any: from a file
    """`value`, which must be text that is not blank. Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is {type(value).__name__}, not text")
    if not value.strip():
        raise ValueError(f"{what} is empty")
    return value
