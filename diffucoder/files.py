"""Files: atomic writes, JSON lines in and out, the cache folder.

A file written here is whole or not there at all. One that grows (`append_jsonl`) may lose its last line when the
process is killed; `read_whole_lines` reads what is complete.

A file that is read may be anybody's: reading waits for no pipe and no device, and takes a limited amount of memory,
whatever the file holds or unpacks to.
"""

import errno
import gzip
import io
import json
import os
import shutil
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffucoder.errors import ConfigError

Json = dict[str, Any]  # Any: whatever a JSON object holds

LONGEST_LINE = 2**26  # bytes; the longest line of a published benchmark has 200,000
LARGEST_FILE = 2**28  # bytes of a file that is read as a whole
_MOST_UNPACKED = 100  # times its packed size, after LONGEST_LINE; JSON of programs has 5 to 30
DEEPEST = 200  # levels of lists and objects: code that walks through them must not run out of stack


class UnreadableError(OSError):
    """A path is not a regular file, or the file is over a limit or damaged."""

    def __init__(self, reason: str) -> None:
        """`reason` completes the sentence: the file cannot be read (...)."""
        super().__init__(reason)
        self.strerror = reason


def cache_folder() -> Path:
    """Return the folder for data that can be computed again: `diffucoder` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffucoder"


def write_text(path: str | Path, text: str) -> None:
    """Write a whole file, or change nothing; permissions stay. Raises OSError.

    A link is replaced: in a stranger's folder it could lead to any file. Resolve the path of one that may be followed.
    """
    path = Path(path)
    # several processes may write the same file, and its name may be as long as names can be
    partial = path.parent / f"{path.name[:50]}.{os.getpid()}.partial"
    try:
        partial.unlink(missing_ok=True)
        with partial.open("x", encoding="utf-8", errors="backslashreplace") as file:  # "x" follows no link
            file.write(text)  # JSON may spell half characters
        if path.exists() and not path.is_symlink():
            shutil.copymode(path, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def written_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill. At the end it replaces `folder`; if that fails, it is removed."""
    partial = folder.with_name(f"{folder.name}.partial")
    remove(partial)  # of a process that was killed
    partial.mkdir()
    try:
        yield partial
        remove(folder)
        partial.replace(folder)
    finally:
        remove(partial)


def remove(path: Path) -> None:
    """Remove a folder with its content, or a link or file of its name; no error if that is not possible."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


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
    """Return whether an error or its cause is a full disk, a quota or a limit on the size of files."""
    if error is None:
        return False
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # as safetensors and datasets quote them; numpy has "9 requested and 3 written"
    texts = (*map(os.strerror, full), " requested and ")
    if getattr(error, "errno", None) in full or any(text in str(error) for text in texts):
        return True
    return disk_is_full(error.__cause__) or disk_is_full(error.__context__)


def open_file(path: str | Path) -> io.BufferedReader:
    """Open a regular file to read, never a pipe or a device, which may have no end. Raises OSError."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a null byte in the name
        raise UnreadableError(str(error)) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UnreadableError("it is not a regular file")
    return os.fdopen(handle, "rb")


def read_bytes(path: str | Path, *, most: int | None = None) -> bytes:
    """Return the content of a file of at most `most` bytes, by default `LARGEST_FILE`. Raises OSError."""
    with open_file(path) as file:
        _check_size(os.fstat(file.fileno()).st_size, most or LARGEST_FILE)
        return file.read()


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise UnreadableError(f"it is larger than {most // 2**20} MiB")


def read_json(path: str | Path) -> Json:
    """Return the JSON object in a file. Raises OSError, or ValueError with the reason."""
    return parse_object(decode_text(read_bytes(path)))


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield number, from 1, and content of each line of a plain or gzipped file. Raises OSError.

    UnreadableError for a line longer than `LONGEST_LINE`, and an archive that is damaged or unpacks to far more than
    text does.
    """
    with open_file(path) as file:
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        readline: Callable[[int], bytes] = gzip.GzipFile(fileobj=file).readline if zipped else file.readline
        number = 0
        unpacked = 0
        try:
            while line := readline(LONGEST_LINE + 1):
                number += 1
                unpacked += len(line)
                if len(line) > LONGEST_LINE:
                    raise UnreadableError(f"line {number} is longer than {LONGEST_LINE // 2**20} MiB")
                if zipped and unpacked > LONGEST_LINE + _MOST_UNPACKED * file.tell():
                    raise UnreadableError(f"it unpacks to over {_MOST_UNPACKED} times its size; unpack it yourself")
                yield number, line
        except (EOFError, zlib.error) as error:
            raise UnreadableError(str(error)) from None


def read_unpacked(path: str | Path) -> bytes:
    """Return the content of a plain or gzipped text file, unpacked at most `LARGEST_FILE` bytes. Raises OSError."""
    lines: list[bytes] = []
    size = 0
    for _, line in read_lines(path):
        size += len(line)
        _check_size(size, LARGEST_FILE)
        lines.append(line)
    return b"".join(lines)


def read_whole_lines(path: str | Path) -> list[Json]:
    """Return the JSON objects of a file that may be cut short: all before the first line that is not whole.

    [] if there is no file. Raises ConfigError if it cannot be read.
    """
    rows: list[Json] = []
    try:
        for _, line in read_lines(path):
            if not line.endswith(b"\n"):
                break
            rows.append(parse_json_line(line))
    except FileNotFoundError:
        pass
    except OSError as error:
        reason = f"cannot be read ({error.strerror}); remove it, or name another folder"
        raise ConfigError(f"{str(path)!r} {reason}") from None
    except ValueError:  # the first line that is not whole
        pass
    return rows


def without_nulls(fields: Mapping[str, Any]) -> Json:
    """Return the fields that have a value, because `datasets` writes null into each column that a row lacks."""
    return {name: value for name, value in fields.items() if value is not None}


def decode_text(content: bytes) -> str:
    """Decode UTF-8 text, with or without a byte-order mark. Raises ValueError with the reason."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from None


def parse_json_line(line: bytes) -> Json:
    """Parse the JSON object on a line, with or without a byte-order mark. Raises ValueError with the reason."""
    text = decode_text(line).rstrip("\r\n")
    if not text.strip():
        raise ValueError("line is empty")
    return parse_object(text)


def parse_object(text: str, *, deepest: int = DEEPEST) -> Json:
    """The object of a JSON document. Raises ValueError with the reason."""
    fields = parse_json(text, deepest=deepest)
    if not isinstance(fields, dict):
        raise ValueError(f"not a JSON object but {type(fields).__name__}")
    return fields


def parse_json(text: str, *, deepest: int = DEEPEST) -> Any:  # Any: whatever JSON can hold
    """Parse a JSON document. Raises ValueError with the reason."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos + 1})") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets thousands deep
        raise ValueError(f"not JSON that can be read ({error})") from None
    if is_deeper(document, deepest):
        raise ValueError(f"not JSON that can be read (lists or objects over {deepest} deep)")
    return document


def is_deeper(document: Any, most: int) -> bool:  # Any: whatever JSON or TOML can hold
    """Return whether lists and objects are nested `most` times or deeper, which exhausts the stack of a reader."""
    level = [document]
    for _ in range(most):
        deeper: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                deeper += value.values()
            elif isinstance(value, list):
                deeper += value
        level = deeper
    return bool(level)
