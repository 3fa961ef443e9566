"""Token shards: examples of tokens in a folder of flat files, written once, then read through memory maps.

For: the files and what is promised of them. Not for: where tokens come from, or in which order they are read (`data`).

A store is a folder. Each shard has `tokens-00000.bin`, the flat tokens of its examples in little-endian uint16 or
uint32; `starts-00000.npy`, where each example begins and at last where the shard ends; and of chats
`answers-00000.npy`, where in each example its answer begins. `manifest.json` has the totals, the size and checksum of
every file, and whatever else the writer was told.
"""

import hashlib
import json
import os
from array import array
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from diffucoder.errors import CheckpointError, ConfigError

VERSION = 1
MANIFEST = "manifest.json"
_CHECKED = 64 * 2**20  # bytes of a store that is small enough to be checksummed whenever it is opened
_MAPPED = 256  # files mapped at once: each costs a file descriptor
Json = dict[str, Any]  # Any: whatever a JSON file holds


class ShardWriter:
    """Writes examples into the empty `folder`; only `finish` makes a store of it. Of tokens it holds none."""

    def __init__(self, folder: Path, *, vocab_size: int, shard_tokens: int, chat: bool) -> None:
        """A shard ends before the example that would take it beyond `shard_tokens`, unless that is its only one."""
        self.folder, self.shard_tokens, self.chat = folder, shard_tokens, chat
        self.dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self.tokens = self.examples = 0
        self._shards: list[Json] = []
        self._file: BinaryIO | None = None
        self._starts, self._answers = array("q", [0]), array("q")

    def add(self, ids: list[int], answer: int = 0) -> None:
        """Append one example, whose answer begins at token `answer`."""
        if self._file is not None and self._starts[-1] + len(ids) > self.shard_tokens:
            self._close_shard()
        if self._file is None:
            self._file = (self.folder / self._name("tokens", ".bin")).open("wb")
        self._file.write(np.array(ids, self.dtype).tobytes())
        self._starts.append(self._starts[-1] + len(ids))
        self._answers.append(answer)
        self.tokens, self.examples = self.tokens + len(ids), self.examples + 1

    def finish(self, described: Json) -> None:
        """Close the last shard and write the manifest, with `described` in it, which must give the `version`."""
        self._close_shard()
        manifest = {
            **described,
            "dtype": self.dtype.name,
            "tokens": self.tokens,
            "examples": self.examples,
            "bytes": sum(file["bytes"] for shard in self._shards for file in shard["files"].values()),
            "shards": self._shards,
        }
        with (self.folder / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
            _to_disk(file.fileno())

    def close(self) -> None:
        """Let go of the file at hand; what was not finished is no store."""
        if self._file is not None:
            self._file.close()

    def _close_shard(self) -> None:
        if self._file is None:
            return
        self._file.flush()
        _to_disk(self._file.fileno())
        self._file.close()
        self._file = None
        names = [self._name("tokens", ".bin"), self._write_index("starts", self._starts)]
        if self.chat:
            names.append(self._write_index("answers", self._answers))
        described = {n: {"bytes": (self.folder / n).stat().st_size, "sha256": _sha256(self.folder / n)} for n in names}
        self._shards.append({"tokens": self._starts[-1], "examples": len(self._answers), "files": described})
        self._starts, self._answers = array("q", [0]), array("q")

    def _write_index(self, what: str, positions: "array[int]") -> str:
        name = self._name(what, ".npy")
        with (self.folder / name).open("wb") as file:
            np.save(file, np.frombuffer(positions, np.int64).astype("<i8"))
            _to_disk(file.fileno())
        return name

    def _name(self, what: str, suffix: str) -> str:
        return _name(what, len(self._shards), suffix)


class TokenStore:
    """A folder of token shards, read through memory maps: opening it costs next to nothing, whatever its size."""

    def __init__(self, folder: Path) -> None:
        """Check that every file has its size, and of a store below 64 MiB its checksum. CheckpointError otherwise."""
        self.folder = folder
        try:
            self.manifest: Json = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if self.manifest["version"] != VERSION:
                raise self._damaged(MANIFEST, f"is of version {self.manifest['version']}, not {VERSION}")
            self.tokens: int = self.manifest["tokens"]
            self._examples: int = self.manifest["examples"]
            self._dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
            shards: list[Json] = self.manifest["shards"]
            self._token_ends = np.cumsum([shard["tokens"] for shard in shards])  # (S,) int64
            self._example_ends = np.cumsum([shard["examples"] for shard in shards])  # (S,) int64
            self._files = {name: file for shard in shards for name, file in shard["files"].items()}
            self._check_sizes()
            size = int(self.manifest["bytes"])
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(MANIFEST, f"cannot be read ({error!r})") from None
        self._mapped = lru_cache(maxsize=_MAPPED)(self._map)
        if size < _CHECKED:
            self.verify()

    def __len__(self) -> int:
        """Number of examples."""
        return self._examples

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, (E,) int64."""
        starts = [np.load(self.folder / _name("starts", s, ".npy")) for s in range(len(self._example_ends))]
        return np.concatenate([np.diff(found) for found in starts])

    def example(self, index: int) -> tuple[NDArray[np.int64], int]:
        """Example `index`: its tokens, (T,) int64, and where in them the answer begins (0 for a document)."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        shard = int(np.searchsorted(self._example_ends, index, side="right"))
        row = index - (int(self._example_ends[shard - 1]) if shard else 0)
        starts = self._mapped(_name("starts", shard, ".npy"))
        answers = _name("answers", shard, ".npy")
        answer = int(self._mapped(answers)[row]) if answers in self._files else 0
        tokens = self._mapped(_name("tokens", shard, ".bin"))
        return tokens[starts[row] : starts[row + 1]].astype(np.int64), answer

    def windows(self, length: int) -> int:
        """How many whole windows of `length` tokens the stream of all examples has. ConfigError where it has none."""
        if not 1 <= length <= self.tokens:
            raise ConfigError(
                f"{self.folder} has {self.tokens:,} tokens, no row of {length}; lower context or add data"
            )
        return self.tokens // length

    def window(self, index: int, length: int) -> NDArray[np.int64]:
        """Window `index` of the stream of all examples, across their borders and those of shards: (length,) int64."""
        if not 0 <= index < self.windows(length):
            raise IndexError(f"window {index} of {self.windows(length)}")
        at, pieces, wanted = index * length, [], length
        while wanted:
            shard = int(np.searchsorted(self._token_ends, at, side="right"))
            first = at - (int(self._token_ends[shard - 1]) if shard else 0)
            piece = self._mapped(_name("tokens", shard, ".bin"))[first : first + wanted]
            pieces.append(piece)
            at, wanted = at + len(piece), wanted - len(piece)
        return np.concatenate(pieces).astype(np.int64)

    def verify(self) -> None:
        """Read every file and compare its checksum with the manifest's. CheckpointError names one that differs."""
        for name, file in self._files.items():
            if _sha256(self.folder / name) != file["sha256"]:
                raise self._damaged(name, "does not have the checksum of its manifest")

    def _check_sizes(self) -> None:
        for name, file in self._files.items():
            path = self.folder / name
            size = path.stat().st_size if path.exists() else None
            if size is None:
                raise self._damaged(name, "is missing")
            if size != file["bytes"]:
                raise self._damaged(name, f"has {size:,} bytes, its manifest says {file['bytes']:,}")

    def _map(self, name: str) -> NDArray[Any]:  # Any: tokens are unsigned, positions int64
        if name.endswith(".npy"):
            mapped: NDArray[Any] = np.load(self.folder / name, mmap_mode="r")
            return mapped
        return np.memmap(self.folder / name, self._dtype, mode="r")

    def _damaged(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.folder / name} {what}; delete {self.folder}: it is made anew from the sources")


def _name(what: str, shard: int, suffix: str) -> str:
    return f"{what}-{shard:05d}{suffix}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(descriptor: int) -> None:
    """Not only to the system's memory: a store renamed before its data is written would not survive a power cut."""
    os.fsync(descriptor)
