"""The header of a GGUF file: its metadata and where its tensors are, checked against the size of the file.

For: files that anybody may have made. The `gguf` package trusts counts and lengths, so it may only read what was read
here before. Not for: what the metadata mean (`gguf`, `gguf_tokenizer`), numbers of quantised tensors.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from diffucoder.errors import CheckpointError
from diffucoder.model_files import is_regular, one_line, shown

_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # by type
_STRING = 8
_ARRAY = 9
_MAX_ITEMS = 2**20  # of all arrays together, which transformers reads slowly: Llama 3's 128,256 tokens have 540,000
_MAX_OTHER_ITEMS = 2**12  # of an array that is not of the vocabulary
_VOCABULARY = tuple(f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "scores", "merges"))
_MAX_TEXT = 2**24  # bytes of one string
_MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file: its sizes, the last one varying slowest, and its type and place in bytes."""

    shape: tuple[int, ...]
    type: int
    offset: int


def read_header(path: Path, block_sizes: dict[int, tuple[int, int]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata by key, and the tensors by name. `block_sizes`: numbers and bytes of a block of each tensor type.

    CheckpointError if the file is missing or damaged, or its parts are larger than it is.
    """
    try:
        if not is_regular(path):
            raise CheckpointError(f"GGUF file {str(path)!r} does not exist; check the path")
        with path.open("rb") as file:
            reader = _Reader(file, path.stat().st_size)
            fields, tensors = reader.header()
            reader.check_places(fields, tensors, block_sizes)
    except CheckpointError:
        raise
    except (OSError, ValueError, struct.error) as error:
        reason = one_line(error)
        raise CheckpointError(f"{path} is damaged, cut short or not a GGUF file ({reason}); fetch it again") from error
    return fields, tensors


class _Reader:
    """Reads a file from its beginning. Raises ValueError."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file = file
        self.size = size
        self.items = 0  # of arrays, until now

    def header(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        magic, version, tensor_count, field_count = self.numbers("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it begins with {magic!r}, version {version}")
        fields: dict[str, Any] = {}
        for key in self.keys(field_count):
            (kind,) = self.numbers("I")
            fields[key] = self.value(kind)
            if isinstance(fields[key], list) and len(fields[key]) > _MAX_OTHER_ITEMS and key not in _VOCABULARY:
                raise ValueError(f"{shown(key)} has {len(fields[key]):,} items, over {_MAX_OTHER_ITEMS:,}")
        tensors: dict[str, Tensor] = {}
        for name in self.keys(tensor_count):
            (dimensions,) = self.numbers("I")
            if not 0 < dimensions <= _MAX_DIMENSIONS:
                raise ValueError(f"tensor {shown(name)} has {dimensions} dimensions")
            *shape, kind, offset = self.numbers(f"{dimensions}QIQ")
            tensors[name] = Tensor(tuple(shape), kind, offset)
        return fields, tensors

    def keys(self, count: int) -> Iterator[str]:
        """The keys of `count` entries, whose other parts the caller reads."""
        if count > self.size // 8:
            raise ValueError(f"it counts {count:,} entries, more than it has bytes for")
        known: set[str] = set()
        for _ in range(count):
            key = self.text()
            if key in known:
                raise ValueError(f"{shown(key)} is there twice")
            known.add(key)
            yield key

    def value(self, kind: int) -> Any:  # Any: whatever a field holds
        if kind == _STRING:
            return self.text()
        if kind in _FORMATS:
            return self.numbers(_FORMATS[kind])[0]
        if kind != _ARRAY:
            raise ValueError(f"a field has type {kind}")
        item, count = self.numbers("IQ")
        self.items += count
        if self.items > _MAX_ITEMS:
            raise ValueError(f"its arrays have over {_MAX_ITEMS:,} items")
        if item == _STRING:
            return [self.text() for _ in range(count)]
        if item not in _FORMATS:
            raise ValueError(f"an array has items of type {item}")
        return list(self.numbers(f"{count}{_FORMATS[item]}"))

    def text(self) -> str:
        (length,) = self.numbers("Q")
        if length > _MAX_TEXT:
            raise ValueError(f"a text has {length:,} bytes")
        return self.numbers(f"{length}s")[0].decode()  # type: ignore[no-any-return]  # bytes

    def numbers(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{layout}", self.file.read(struct.calcsize(f"<{layout}")))

    def check_places(
        self, fields: dict[str, Any], tensors: dict[str, Tensor], block_sizes: dict[int, tuple[int, int]]
    ) -> None:
        """Raise ValueError unless each tensor is inside the file."""
        alignment = fields.get("general.alignment", 32)
        if type(alignment) is not int or alignment not in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
            raise ValueError(f"general.alignment={shown(alignment)}")
        start = -(-self.file.tell() // alignment) * alignment
        for name, tensor in tensors.items():
            if tensor.type not in block_sizes:
                raise ValueError(f"tensor {shown(name)} has type {tensor.type}")
            numbers, size = block_sizes[tensor.type]
            if tensor.shape[0] % numbers or 0 in tensor.shape:
                raise ValueError(f"tensor {shown(name)} has shape {tensor.shape}")
            if start + tensor.offset + prod(tensor.shape) // numbers * size > self.size:
                raise ValueError(f"tensor {shown(name)} ends after the end of the file")
