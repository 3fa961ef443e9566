"""Files: atomic writes, JSON lines in and out, the cache folder.

A file written here is whole or not there at all. One that grows (`append_jsonl`) may lose its last line when the
process is killed; `read_whole_lines` reads what is complete.
"""

import errno
import gzip
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Json = dict[str, Any]  # Any: whatever a JSON object holds


def cache_folder() -> Path:
    """Where the package keeps what it can compute again: `diffucoder` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffucoder"


def write_text(path: str | Path, text: str) -> None:
    """Write a whole file, or leave it as it was; links and permissions stay. Raises OSError."""
    path = Path(path).resolve()
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # several processes may write the same file
    try:
        partial.write_text(text, encoding="utf-8")
        if path.exists():
            shutil.copymode(path, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: str | Path, value: object) -> None:
    """Write one JSON document, indented, whole or not at all. Raises OSError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[Json]) -> None:
    """Write one JSON object a line, whole or not at all. Raises OSError."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def append_jsonl(path: str | Path, rows: Iterable[Json], *, sync: bool = True) -> None:
    """Add one JSON object a line and, with `sync`, wait until the disk has them. Raises OSError."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
        file.flush()
        if sync:
            os.fsync(file.fileno())


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, comes from a full disk, a quota or a limit on the size of files."""
    if error is None:
        return False
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    texts = (
        *map(os.strerror, full),
        " requested and ",
    )  # of safetensors and datasets; numpy: "9 requested and 3 written"
    if getattr(error, "errno", None) in full or any(text in str(error) for text in texts):
        return True
    return disk_is_full(error.__cause__) or disk_is_full(error.__context__)


def read_whole_lines(path: str | Path) -> list[Json]:
    """The JSON objects of a file that may have been cut short: all up to the first line that is not whole."""
    rows: list[Json] = []
    if Path(path).exists():
        for line in Path(path).read_bytes().split(b"\n")[:-1]:
            try:
                rows.append(parse_json_line(line))
            except ValueError:
                break
    return rows


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Number, from 1, and content of each line of a plain or gzipped file. Raises OSError, EOFError or zlib.error."""
    path = Path(path)
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if zipped else path.open("rb") as file:
        yield from enumerate(file, start=1)


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, every character as it is, but no byte-order mark. Raises OSError, or ValueError."""
    return decode_text(Path(path).read_bytes())


def without_nulls(fields: Mapping[str, Any]) -> Json:
    """The fields that have a value: `datasets` writes null into each column that a row lacks."""
    return {name: value for name, value in fields.items() if value is not None}


def decode_text(content: bytes) -> str:
    """UTF-8 text, with or without a byte-order mark. Raises ValueError with the reason."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from None


def parse_json_line(line: bytes) -> Json:
    """The JSON object on a line, with or without a byte-order mark. Raises ValueError with the reason."""
    text = decode_text(line).rstrip("\r\n")
    if not text.strip():
        raise ValueError("line is empty")
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos + 1})") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets thousands deep
        raise ValueError(f"not JSON that can be read ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"not a JSON object but {type(fields).__name__}")
    return fields
