"""Training data: sources are tokenised once into a table that later runs map into memory, and read in shuffled epochs.

The table, its lock and its atomic rename are those of `datasets`. Its folder is named after a fingerprint, so changed
data or another tokenizer make another table.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import torch
from datasets import Dataset, Features, List, Value, disable_progress_bars
from datasets.exceptions import DatasetGenerationError
from numpy.typing import NDArray

from diffucoder.diffusion import keyed_generator
from diffucoder.errors import CheckpointError, ConfigError, DiffuCoderError, PromptError
from diffucoder.files import Json, disk_is_full, read_json, write_json
from diffucoder.tokenizer import Tokenizer
from diffucoder.training.sources import (
    SUFFIXES,
    Kind,
    Record,
    Skipped,
    Sources,
    find_files,
    other_files,
    source_names,
    usable,
)
from diffucoder.training.sources import records as read_records

MANIFEST = "manifest.json"
_VERSION = 3  # of the table's columns
_LISTED = 1000  # skipped rows that the manifest names; the others are only counted
_CHUNK_RECORDS = 1024  # tokenised together, as characters: both limit the memory of `prepare`
_CHUNK_CHARACTERS = 2**21
_WRITTEN_ROWS = 256  # written together, for the same reason


class TokenStore:
    """Tokenised examples in memory-mapped files: opening them costs next to nothing, whatever their size."""

    def __init__(self, dataset: Dataset, folder: Path, vocab_size: int = 2**32) -> None:
        """`dataset` has the tokens of an example, `ids`, and where its `answer` begins in them."""
        self.folder = folder
        self.vocab_size = vocab_size
        self._answers = dataset.data.column("answer")
        self._ids = dataset.data.column("ids")
        self._stream = pyarrow.chunked_array([ids.flatten() for ids in self._ids.chunks])  # views of the files
        self.tokens = len(self._stream)

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def manifest(self) -> Json:
        """What the table was made of: `fingerprint`, `sources`, and of `skipped` rows the `count` and the `first`."""
        return read_json(self.folder / MANIFEST)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, (E,) int64."""
        return _int64(pyarrow.compute.list_value_length(self._ids))

    def example(self, index: int) -> tuple[NDArray[np.int64], int]:
        """Example `index`: its tokens, (T,) int64, and where in them the answer begins (0 for a document)."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        tokens = self._checked(self._ids[index].values)
        return tokens, min(self._answers[index].as_py(), len(tokens))

    def windows(self, length: int) -> int:
        """How many whole windows of `length` tokens the stream of all examples has. Raises ConfigError for none."""
        if not 1 <= length <= self.tokens:
            held = f"{self.folder} has {self.tokens:,} tokens"
            raise ConfigError(f"{held}, no row of {length}; lower context or add data")
        return self.tokens // length

    def window(self, index: int, length: int) -> NDArray[np.int64]:
        """Window `index` of the stream of all examples, across their borders: (length,) int64."""
        if not 0 <= index < self.windows(length):
            raise IndexError(f"window {index} of {self.windows(length)}")
        return self._checked(self._stream.slice(index * length, length))

    def _checked(self, values: Any) -> NDArray[np.int64]:  # Any: pyarrow has no types
        tokens = _int64(values)
        if tokens.max(initial=0) >= self.vocab_size or tokens.min(initial=0) < 0:
            raise CheckpointError(f"{self.folder} has tokens that the model lacks; delete it: it is made again")
        return tokens


def _int64(values: Any) -> NDArray[np.int64]:  # Any: pyarrow has no types
    return values.to_numpy().astype(np.int64)  # type: ignore[no-any-return]


def prepare(sources: Sources, tokenizer: Tokenizer, cache: str | Path, *, kind: Kind) -> TokenStore:
    """The tokens of all `sources`, in `cache/<kind>-<fingerprint>`: opened, or tokenised first.

    Rows that cannot be used are reported on stderr and listed in the manifest. If several processes call this at once,
    one tokenises and the others wait. Raises ConfigError for a source that does not exist, has no usable row or changes
    meanwhile, CheckpointError for a damaged folder or a hub dataset that cannot be reached.
    """
    sources = source_names(sources)
    if not sources:
        raise ConfigError("data=() names no source; give a folder, a .jsonl file or hub:owner/name")
    fingerprint = _fingerprint(sources, tokenizer, kind)
    folder = Path(cache) / f"{kind}-{fingerprint[:12]}"

    def examples() -> Iterator[Json]:
        skipped: list[Skipped] = []
        began = time.perf_counter()
        count = tokens = 0
        rows = _tokenise(read_records(sources, kind), tokenizer, kind)
        for example in usable(rows, ", ".join(sources), skipped):
            count += 1
            tokens += len(example["ids"])
            yield example
        if _fingerprint(sources, tokenizer, kind) != fingerprint:
            raise ConfigError("sources changed while they were read; run again when nothing writes to them")
        listing = {"count": len(skipped), "first": list(map(vars, skipped[:_LISTED]))}
        write_json(folder / MANIFEST, {"fingerprint": fingerprint, "sources": sources, "skipped": listing})
        for source in sources:
            others = other_files(source, SUFFIXES[kind])
            if others:
                read = " ".join(SUFFIXES[kind])
                print(f"{source}: only {read} are read; left out {len(others)}, as {others[0]}", file=sys.stderr)
        size = f"{count:,} records, {tokens / 1e6:,.1f} M tokens"
        print(f"tokenised {size} in {time.perf_counter() - began:.1f} s -> {folder}", file=sys.stderr)
        if skipped:
            listed = "all" if len(skipped) <= _LISTED else f"the first {_LISTED:,}"
            print(f"{folder / MANIFEST} lists {listed} of the skipped records", file=sys.stderr)

    return TokenStore(_open_or_generate(folder, examples, tokenizer.vocab_size), folder, tokenizer.vocab_size)


def epoch_index(position: int, n: int, seed: tuple[int, ...]) -> int:
    """The row, of `n`, that is read at `position` of an endless run; every epoch of n positions has its own order."""
    if n < 1:
        raise ConfigError(f"n={n} leaves nothing to shuffle; give at least one row")
    epoch, index = divmod(position, n)
    return int(_epoch_order(n, (*seed, epoch))[index])


@lru_cache(maxsize=4)  # around the end of an epoch rows of two are read, and a run has few kinds of rows
def _epoch_order(n: int, key: tuple[int, ...]) -> torch.Tensor:
    """A permutation of range(n) that is a function of `key`, (n,)."""
    return torch.randperm(n, generator=keyed_generator(*key))


def _fingerprint(sources: Sequence[str], tokenizer: Tokenizer, kind: Kind) -> str:
    """A hash of everything that the tokens depend on, except the rows of hub datasets, which need the network."""
    files = []
    for source in sources:
        for path in find_files(source, SUFFIXES[kind]):
            stat = path.stat()
            files.append([path.as_posix(), stat.st_size, stat.st_mtime_ns])
    # chat templates may write these two tokens
    chat_format = [tokenizer.chat_template, tokenizer.config.get("bos_token"), tokenizer.config.get("eos_token")]
    parts = [_VERSION, kind, tokenizer.backend.to_str(), chat_format, sources, files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _open_or_generate(folder: Path, examples: Callable[[], Iterator[Json]], vocab_size: int) -> Dataset:
    """The dataset in `folder`. If no whole one is there, `datasets` writes what `examples` yields."""
    if not sys.stderr.isatty():
        disable_progress_bars()
    ids = Value("uint16" if vocab_size <= 2**16 else "uint32")
    features = Features({"ids": List(ids), "answer": Value("int32")})
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cache={str(folder.parent)!r} cannot be written ({error}); name another folder") from error
    try:
        dataset = Dataset.from_generator(
            examples, features=features, cache_dir=str(folder), fingerprint=folder.name, writer_batch_size=_WRITTEN_ROWS
        )
        dataset.data.validate(full=True)  # lists of a damaged file may begin and end outside of it
        if dataset.features != features:
            raise ValueError(f"its columns are {dataset.features}")
        return dataset
    except Exception as error:  # of `examples`, of writing, or of whatever reads a damaged file
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        if isinstance(cause, DiffuCoderError | MemoryError):
            raise cause from None
        if disk_is_full(error):
            raise CheckpointError(
                f"{folder} cannot be written: the disk is full; free some space, or name another folder with cache=..."
            ) from error
        raise CheckpointError(f"{folder} cannot be read or written ({cause}); delete it: it is made again") from error


def _tokenise(rows: Iterable[Record | Skipped], tokenizer: Tokenizer, kind: Kind) -> Iterator[Json | Skipped]:
    """The example of each record, or why there is none, in the order of `rows`."""
    chunk: list[Record | Skipped] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        if isinstance(row, Record):
            characters += len(row.text) + sum(len(message["content"]) for message in row.prompt)
        if len(chunk) == _CHUNK_RECORDS or characters >= _CHUNK_CHARACTERS:
            yield from _tokenise_chunk(chunk, tokenizer, kind)
            chunk = []
            characters = 0
    yield from _tokenise_chunk(chunk, tokenizer, kind)


def _tokenise_chunk(chunk: Sequence[Record | Skipped], tokenizer: Tokenizer, kind: Kind) -> Iterator[Json | Skipped]:
    records = [row for row in chunk if isinstance(row, Record)]
    try:
        examples = iter(_encode(records, tokenizer, kind))
    except PromptError as error:
        if len(chunk) == 1:
            yield Skipped(records[0].where, str(error))
            return
        for row in chunk:  # one by one, to find the record that is at fault
            yield from _tokenise_chunk([row], tokenizer, kind)
        return
    for row in chunk:
        yield row if isinstance(row, Skipped) else next(examples)


def _encode(records: Sequence[Record], tokenizer: Tokenizer, kind: Kind) -> list[Json]:
    """Prompt (of chats), text and end of each record; special tokens that the text spells are plain characters."""
    prompts: list[list[int]] = [[]] * len(records)
    end = tokenizer.backend.token_to_id("<|endoftext|>")
    if kind == "chat":
        prompts = [tokenizer.encode_chat(record.prompt) for record in records]
        end = tokenizer.turn_end_id
    if end is None:
        end = tokenizer.eos_id
    if end is None:
        raise CheckpointError("tokenizer has no end of text; name its eos_token in tokenizer_config.json")
    texts = tokenizer.encode_batch([record.text for record in records])
    examples = []
    for prompt, text in zip(prompts, texts, strict=True):
        examples.append({"ids": [*prompt, *text, end], "answer": len(prompt)})
    return examples
