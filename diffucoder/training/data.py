"""Training data: sources tokenised once into a store that every later run opens, and the order in which it is read.

For: `prepare`, and `epoch_index`, which makes the row of a position a function of the position alone, so that a run
resumed, or spread over processes, reads what it would have read. Not for: records (`sources`), files (`shards`).

A store is kept in the cache under a name that is a fingerprint of its sources, the tokenizer and the settings. So
changed data or another tokenizer makes another store, and nobody trains on stale tokens.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from diffucoder.errors import CheckpointError, ConfigError, DiffuCoderError, PromptError
from diffucoder.tokenizer import Tokenizer
from diffucoder.training.shards import MANIFEST, VERSION, ShardWriter, TokenStore
from diffucoder.training.sources import SUFFIXES, Json, Kind, Record, Skipped, describe, records

__all__ = ["Skipped", "TokenStore", "epoch_index", "prepare", "shuffled"]

_LISTED = 1000  # skipped records that the manifest names; the rest are only counted
_CHUNK_RECORDS, _CHUNK_CHARACTERS = 1024, 2**21  # tokenised together: what bounds memory
_ROUNDS = 12  # of the Feistel network; with 8 the orders of 16 rows are not yet equally likely
_WORD = 2**64 - 1
_Seed = int | tuple[int, ...]


def prepare(
    sources: str | Sequence[str],
    tokenizer: Tokenizer,
    cache: str | Path,
    *,
    kind: Kind,
    text_field: str = "text",
    suffixes: Sequence[str] | None = None,
    shard_tokens: int = 2**27,
) -> TokenStore:
    """The store of `sources`, one after the other, at `cache/<kind>-<fingerprint>`: opened, or made first.

    A source is a folder (its files with `suffixes`: .py .txt .md as documents, .jsonl .jsonl.gz as chats), a JSONL file
    or `hub:owner/name[/config][@split]`. A document is its text and an end of text; special tokens written in it are
    plain characters. A chat is the prompt as inference renders it, then the answer and the end of its turn. Records
    that cannot be used are named in the manifest, counted, and the first is shown on stderr.

    Any number of processes may call this at once: one tokenises, the others wait. ConfigError where a source is not
    there or no record is usable, CheckpointError for a damaged store or a hub that cannot be reached.
    """
    sources = [sources] if isinstance(sources, str) else list(sources)
    if not sources:
        raise ConfigError("data=() names no source; give a folder, a .jsonl file or hub:owner/name")
    suffixes = tuple(suffixes or SUFFIXES[kind])
    described = _describe(sources, tokenizer, kind, suffixes, text_field)
    folder = Path(cache) / f"{kind}-{described['fingerprint'][:12]}"
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if not folder.exists():  # another process may have made it while this one waited
                    found = records(sources, kind=kind, suffixes=suffixes, text_field=text_field)
                    _make(folder, found, tokenizer, described, shard_tokens)
        except DiffuCoderError:
            raise
        except OSError as error:
            raise ConfigError(f"cache={str(cache)!r} cannot be written ({error}); name another folder") from error
    store = TokenStore(folder)
    if store.manifest.get("fingerprint") != described["fingerprint"]:
        raise CheckpointError(f"{folder / MANIFEST} is of other data than its folder's name says; delete {folder}")
    return store


@overload
def epoch_index(position: int, n: int, seed: _Seed) -> int: ...
@overload
def epoch_index(position: NDArray[np.integer[Any]], n: int, seed: _Seed) -> NDArray[np.int64]: ...
def epoch_index(position: int | NDArray[np.integer[Any]], n: int, seed: _Seed) -> int | NDArray[np.int64]:
    """The row, of `n`, that is read at `position` of an endless run; every epoch of n positions has its own order."""
    seed = seed if isinstance(seed, tuple) else (seed,)
    if not isinstance(position, np.ndarray):
        epoch, index = divmod(int(position), _positive(n))
        return shuffled(index, n, (*seed, epoch))
    epochs, indices = np.divmod(position.astype(np.int64), _positive(n))
    rows = np.empty_like(indices)
    for epoch in np.unique(epochs).tolist():
        rows[epochs == epoch] = shuffled(indices[epochs == epoch], n, (*seed, epoch))
    return rows


@overload
def shuffled(index: int, n: int, seed: _Seed) -> int: ...
@overload
def shuffled(index: NDArray[np.integer[Any]], n: int, seed: _Seed) -> NDArray[np.int64]: ...
def shuffled(index: int | NDArray[np.integer[Any]], n: int, seed: _Seed) -> int | NDArray[np.int64]:
    """Where a shuffle of range(n) keyed by `seed` puts `index`: an int, or an array of any shape, int64.

    A permutation that is computed, not stored: a Feistel network (Black and Rogaway, 2002) over the smallest square
    that holds n, walked on until it lands below n. ConfigError for n < 1, IndexError for an index outside range(n).
    """
    side = 2 * (math.isqrt(_positive(n) - 1) // 2 + 1)  # even: over odd ones every shift is an even permutation
    seed = seed if isinstance(seed, tuple) else (seed,)
    digest = hashlib.shake_256(repr([int(s) for s in seed]).encode()).digest(8 * _ROUNDS)
    keys = np.frombuffer(digest, "<u8").tolist()
    if not isinstance(index, np.ndarray):
        if not 0 <= index < n:
            raise IndexError(f"index {index} is outside range({n})")
        place = int(_feistel(int(index), side, keys))
        while place >= n:
            place = int(_feistel(place, side, keys))
        return place
    if index.size and not 0 <= index.min() <= index.max() < n:
        raise IndexError(f"indices {index.min()} to {index.max()} are not all in range({n})")
    places: NDArray[np.uint64] = _feistel(index.astype(np.uint64).ravel(), side, keys)  # (N,)
    while (outside := places >= n).any():
        places[outside] = _feistel(places[outside], side, keys)
    return places.astype(np.int64).reshape(index.shape)


# --- tokens ----------------------------------------------------------------------------------------------------------


class _Example(NamedTuple):
    ids: list[int]
    answer: int  # where it begins


class _Counts:
    """What is shown while tokenising and kept of it: records read, those skipped, characters."""

    def __init__(self) -> None:
        self.records = self.skipped = self.characters = 0
        self.first: list[Skipped] = []
        self.began = time.perf_counter()

    def skip(self, record: Skipped) -> None:
        self.skipped += 1
        if len(self.first) < _LISTED:
            self.first.append(record)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began


def _describe(
    sources: Sequence[str], tokenizer: Tokenizer, kind: Kind, suffixes: Sequence[str], text_field: str
) -> Json:
    """All that the tokens depend on, and its fingerprint."""
    roles = [tokenizer.config.get(role) for role in ("bos_token", "eos_token")]  # templates may write them
    spelling = [tokenizer.backend.to_str(), tokenizer.chat_template, roles]
    described: Json = {
        "version": VERSION,
        "kind": kind,
        "tokenizer": hashlib.sha256(json.dumps(spelling).encode()).hexdigest(),
        "text_field": text_field,
        "suffixes": list(suffixes),
        "sources": [describe(source, suffixes) for source in sources],
    }
    return {"fingerprint": hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest(), **described}


def _make(
    folder: Path, found: Iterable[Record | Skipped], tokenizer: Tokenizer, described: Json, shard_tokens: int
) -> None:
    """Tokenise into a sibling and rename it, so that `folder` is whole from its first moment."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir()
    chat = described["kind"] == "chat"
    console, counts = Console(stderr=True), _Counts()
    writer = ShardWriter(partial, vocab_size=tokenizer.vocab_size, shard_tokens=shard_tokens, chat=chat)
    try:
        with closing(writer):
            _tokenise(found, tokenizer, writer, counts, console)
            if not writer.examples:
                raise ConfigError(_nothing(described["sources"], counts))
            now = [describe(source["source"], described["suffixes"]) for source in described["sources"]]
            if now != described["sources"]:
                raise ConfigError("sources changed while they were read; run again when nothing writes to them")
            skipped = {"count": counts.skipped, "first": [vars(record) for record in counts.first]}
            writer.finish({**described, "records": counts.records, "skipped": skipped})
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _report(console, folder, writer, counts)


def _tokenise(
    found: Iterable[Record | Skipped], tokenizer: Tokenizer, writer: ShardWriter, counts: _Counts, console: Console
) -> None:
    """Write the example of every record, and count those that have none; progress is shown on a terminal."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("tokenising", total=None)
        for chunk in _chunks(found):
            encoded = _encoded([item for item in chunk if isinstance(item, Record)], tokenizer, chat=writer.chat)
            for item in chunk:
                outcome = item if isinstance(item, Skipped) else next(encoded)
                if isinstance(outcome, Skipped):
                    counts.skip(outcome)
                else:
                    writer.add(outcome.ids, outcome.answer)
            counts.records += len(chunk)
            counts.characters += sum(len(item.text) for item in chunk if isinstance(item, Record))
            speed = counts.characters / counts.seconds / 1e6
            told = f"{counts.records:,} records, {writer.tokens / 1e6:,.1f} M tokens, {speed:.1f} M characters/s"
            progress.update(task, description=f"tokenising: {told}")


def _chunks(found: Iterable[Record | Skipped]) -> Iterator[list[Record | Skipped]]:
    """Records to be tokenised at once: enough to keep all cores busy, few enough for memory."""
    chunk: list[Record | Skipped] = []
    characters = 0
    for item in found:
        chunk.append(item)
        if isinstance(item, Record):
            characters += len(item.text) + sum(len(message["content"]) for message in item.prompt)
        if len(chunk) == _CHUNK_RECORDS or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _encoded(chunk: Sequence[Record], tokenizer: Tokenizer, *, chat: bool) -> Iterator[_Example | Skipped]:
    """The example of each record, or why there is none."""
    try:
        yield from (_encode_chats if chat else _encode_documents)(chunk, tokenizer)
    except PromptError as error:
        if len(chunk) == 1:
            yield Skipped(chunk[0].where, str(error))
            return
        for record in chunk:  # one by one, to find who it was
            yield from _encoded([record], tokenizer, chat=chat)


def _encode_documents(chunk: Sequence[Record], tokenizer: Tokenizer) -> list[_Example]:
    """The text, in which special tokens are plain characters, and an end of text."""
    end = _end(tokenizer.backend.token_to_id("<|endoftext|>"), tokenizer)
    texts = tokenizer.encode_batch([record.text for record in chunk], special=False)
    return [_Example([*ids, end], 0) for ids in texts]


def _encode_chats(chunk: Sequence[Record], tokenizer: Tokenizer) -> list[_Example]:
    """The prompt as inference renders and reads it, then the answer, in which special tokens are plain characters."""
    end = _end(tokenizer.turn_end_id, tokenizer)
    prompts = tokenizer.encode_batch([tokenizer.chat(record.prompt) for record in chunk])
    answers = tokenizer.encode_batch([record.text for record in chunk], special=False)
    return [_Example([*prompt, *ids, end], len(prompt)) for prompt, ids in zip(prompts, answers, strict=True)]


def _end(id_: int | None, tokenizer: Tokenizer) -> int:
    end = tokenizer.eos_id if id_ is None else id_
    if end is None:
        raise CheckpointError("tokenizer has no end of text; name its eos_token in tokenizer_config.json")
    return end


def _nothing(sources: Sequence[Json], counts: _Counts) -> str:
    names = ", ".join(source["source"] for source in sources)
    if not counts.first:
        return f"data={names} holds no record; name another source"
    first = counts.first[0]
    return f"none of {counts.records:,} records of {names} can be used; the first: {first.where}: {first.why}"


def _report(console: Console, folder: Path, writer: ShardWriter, counts: _Counts) -> None:
    """One line on what was made, and one on what was left out."""
    made = f"tokenised {writer.examples:,} records, {writer.tokens / 1e6:,.1f} M tokens in {counts.seconds:.1f} s"
    lines = [f"{made} -> {folder}"]
    if counts.first:
        first, listed = counts.first[0], "all" if counts.skipped <= _LISTED else f"the first {_LISTED:,}"
        skipped = f"skipped {counts.skipped:,} of {counts.records:,} records; the first: {first.where}: {first.why}"
        lines.append(f"{skipped}; {listed} are in {folder / MANIFEST}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


# --- order -----------------------------------------------------------------------------------------------------------


def _feistel(index: Any, side: int, keys: Sequence[int]) -> Any:  # Any: an int, or an array of uint64
    """A permutation of range(side ** 2): two digits to the base `side`, each in turn shifted by a hash of the other."""
    left, right = index // side, index % side
    for key in keys:
        left, right = right, (left + _hash(right ^ key) % side) % side
    return left * side + right


def _hash(word: Any) -> Any:  # Any: as above
    """The last steps of splitmix64 (Steele, Lea and Flood, 2014); arrays wrap by themselves, ints by the mask."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def _positive(n: int) -> int:
    if n < 1:
        raise ConfigError(f"n={n} leaves nothing to shuffle; give at least one row")
    return int(n)
