"""Sources tokenised once: what the tokens are, when they are made again, what kills and damage leave behind."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tokenizers
from datasets import Dataset, Features, List, Value, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from diffucoder.errors import CheckpointError, ConfigError
from diffucoder.tokenizer import Tokenizer
from diffucoder.training import data
from diffucoder.training.data import TokenStore, epoch_index, prepare

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Bytes, one token each, and the special tokens of Qwen2."""
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|mask|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return Tokenizer(backend, config={"chat_template": TEMPLATE})


def write(path: Path, *fields: object) -> str:
    path.write_text("".join((f if isinstance(f, str) else json.dumps(f)) + "\n" for f in fields))
    return str(path)


def stream(store: TokenStore) -> list[int]:
    return [id_ for index in range(len(store)) for id_ in store.example(index)[0].tolist()]


def stores(cache: Path) -> list[str]:
    """The folders with whole data; `datasets` writes to a folder *.incomplete and renames it."""
    whole = [path for path in cache.rglob("*.arrow") if not path.parent.name.endswith(".incomplete")]
    return sorted(path.relative_to(cache).parts[0] for path in whole)


def halves(cache: Path) -> list[Path]:
    return list(cache.rglob("*.incomplete"))


def manifest(store: TokenStore) -> Any:
    return json.loads((store.folder / "manifest.json").read_text())


# ---- tokens ----


@settings(max_examples=15, deadline=None)
@given(documents=st.lists(st.text().filter(str.strip), min_size=1, max_size=8))
def test_documents_come_back_as_they_were(
    documents: list[str], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tmp_path = tmp_path_factory.mktemp("documents")
    source = write(tmp_path / "x.jsonl", *({"text": text} for text in documents))
    store = prepare([source], tokenizer, tmp_path / "cache", kind="documents")
    end = tokenizer.backend.token_to_id("<|endoftext|>")
    assert len(store) == len(documents)
    for index, text in enumerate(documents):
        ids, answer = store.example(index)
        assert (tokenizer.decode(ids[:-1]), ids[-1], answer, ids.dtype) == (text, end, 0, np.int64)


def test_special_tokens_written_in_data_are_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "a<|endoftext|><|mask|><|im_end|>"
    documents = prepare([write(tmp_path / "d.jsonl", {"text": text})], tokenizer, tmp_path, kind="documents")
    chats = prepare(write(tmp_path / "c.jsonl", {"prompt": text, "answer": text}), tokenizer, tmp_path, kind="chat")
    assert chats.manifest["skipped"] == {"count": 0, "first": []}
    ids, answer = chats.example(0)
    template = [id_ for id_ in tokenizer.encode_chat("p") if id_ in tokenizer.special_ids]
    assert [id_ for id_ in ids[:answer].tolist() if id_ in tokenizer.special_ids] == template
    for found in (documents.example(0)[0][:-1], ids[answer:-1]):
        assert not tokenizer.special_ids & set(found.tolist())
        assert tokenizer.decode(found) == text


def test_a_chat_is_the_prompt_of_inference_then_the_answer_and_its_end(tokenizer: Tokenizer, tmp_path: Path) -> None:
    spoken = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "<|im_end|>é"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d e"},
    ]
    source = write(tmp_path / "x.jsonl", {"messages": spoken}, {"prompt": "p", "answer": "qr"})
    store = prepare([source], tokenizer, tmp_path, kind="chat")
    for index, (messages, text) in enumerate([(spoken[:-1], "d e"), ("p", "qr")]):
        ids, answer = store.example(index)
        assert ids[:answer].tolist() == tokenizer.encode_chat(messages)
        assert ids[answer:].tolist() == [*tokenizer.encode(text), tokenizer.turn_end_id]
    assert store.lengths.tolist() == [len(store.example(index)[0]) for index in range(2)]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    written=st.integers(1, 8),
    wide=st.booleans(),
)
def test_windows_across_batches_equal_the_flat_stream(lengths: list[int], written: int, wide: bool) -> None:
    rng = np.random.default_rng(len(lengths))
    examples = [rng.integers(0, 200_000 if wide else 65_536, length).tolist() for length in lengths]
    features = Features({"ids": List(Value("uint32" if wide else "uint16")), "answer": Value("int32")})
    batches = []  # as `datasets` reads what was written in batches
    for start in range(0, len(examples), written):
        ids = examples[start : start + written]
        columns = {"ids": ids, "answer": [len(each) // 2 for each in ids]}
        batches.append(Dataset.from_dict(columns, features=features))
    store, flat = TokenStore(concatenate_datasets(batches), Path("store")), np.concatenate(examples)

    assert (store.tokens, len(store)) == (len(flat), len(examples))
    assert store.lengths.tolist() == lengths
    for index, ids in enumerate(examples):
        found, answer = store.example(index)
        assert (found.tolist(), answer, found.dtype) == (ids, len(ids) // 2, np.int64)
    for length in {1, 2, 7, 31, len(flat)} & set(range(1, len(flat) + 1)):
        windows = [store.window(index, length) for index in range(store.windows(length))]
        assert np.array_equal(np.concatenate(windows), flat[: len(flat) // length * length])


@pytest.mark.parametrize(("tokens", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_tokens_are_stored_in_as_few_bytes_as_the_vocabulary_needs(
    tokenizer: Tokenizer, tmp_path: Path, tokens: int, dtype: str
) -> None:
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_tokens([f"word{n:06}" for n in range(tokens - tokenizer.vocab_size)])
    large = Tokenizer(backend, config=tokenizer.config)
    last = f"word{tokens - tokenizer.vocab_size - 1:06}"
    rows = [{"text": last}] * 1000  # more than are written together
    store = prepare([write(tmp_path / "x.jsonl", *rows)], large, tmp_path / "cache", kind="documents")
    (file,) = store.folder.rglob("*.arrow")
    assert Dataset.from_file(str(file)).features["ids"].feature.dtype == dtype
    assert {int(store.window(index, 2)[0]) for index in range(1000)} == {tokens - 1}


def test_a_store_of_several_files_is_one_stream(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "MAX_SHARD_SIZE", 5000)  # bytes
    texts = [f"number {n} " * (1 + n % 3) for n in range(2000)]
    source = write(tmp_path / "x.jsonl", *({"text": text} for text in texts))
    store = prepare([source], tokenizer, tmp_path / "cache", kind="documents")
    assert len(list(store.folder.rglob("*.arrow"))) > 2
    windows = [store.window(index, 100) for index in range(store.windows(100))]
    assert np.concatenate(windows).tolist() == stream(store)[: 100 * len(windows)]
    assert [tokenizer.decode(store.example(index)[0]) for index in range(2000)] == texts


def test_windows_and_examples_that_are_not_there(tokenizer: Tokenizer, tmp_path: Path) -> None:
    store = prepare([write(tmp_path / "x.jsonl", {"text": "abc"})], tokenizer, tmp_path, kind="documents")
    for length in (0, 5):
        with pytest.raises(ConfigError, match=f"has 4 tokens, no row of {length}"):
            store.windows(length)
    for index in (-1, 2):
        with pytest.raises(IndexError):
            store.window(index, 2)
    for index in (-1, 1):
        with pytest.raises(IndexError):
            store.example(index)


# ---- what is left out, and what is told ----


def test_what_is_skipped_is_counted_named_and_shown(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "x.jsonl", {"text": "a"}, {"text": "\ud800"}, "{", {"text": "b"})
    store = prepare([source], tokenizer, tmp_path / "cache", kind="documents")
    assert tokenizer.decode(stream(store)) == "ab"
    first = {"where": f"{source}:2", "reason": r"text '\ud800' is not Unicode; give it as UTF-8"}
    second = {
        "where": f"{source}:3",
        "reason": "not JSON (Expecting property name enclosed in double quotes at character 2)",
    }
    assert manifest(store)["skipped"] == {"count": 2, "first": [first, second]}
    assert len(store) == 2
    out, err = capsys.readouterr()
    skipped, made, listed = err.splitlines()
    assert out == ""
    assert made.startswith("tokenised 2 records, 0.0 M tokens in ")
    assert made.endswith(f" s -> {store.folder}")
    assert skipped == f"skipped 2 of 4 records; the first: {source}:2: {first['reason']}"
    assert listed == f"{store.folder / 'manifest.json'} lists all of the skipped records"


def test_a_source_may_be_one_name(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", "{", {"text": "a"})
    store = prepare(source, tokenizer, str(tmp_path), kind="documents")
    assert store.manifest == manifest(prepare([source], tokenizer, tmp_path, kind="documents"))
    assert store.manifest["sources"] == [source]
    assert store.manifest["skipped"]["first"][0]["where"] == f"{source}:1"


def test_the_manifest_names_a_thousand_and_counts_all(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "x.jsonl", *["{"] * 1500, {"text": "a"})
    skipped = manifest(prepare([source], tokenizer, tmp_path, kind="documents"))["skipped"]
    assert (skipped["count"], len(skipped["first"])) == (1500, 1000)
    assert "skipped 1,500 of 1,501 records" in (err := capsys.readouterr().err)
    assert "lists the first 1,000 of the skipped records" in err


def test_data_without_one_good_record_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source, cache = write(tmp_path / "x.jsonl", "{", {"text": ""}), tmp_path / "cache"
    with pytest.raises(ConfigError, match=r"none of 2 records of .*x\.jsonl can be used; the first: .*x\.jsonl:1: not"):
        prepare([source], tokenizer, cache, kind="documents")
    with pytest.raises(ConfigError, match="holds no record"):
        prepare([write(tmp_path / "y.jsonl")], tokenizer, cache, kind="documents")
    with pytest.raises(ConfigError, match="names no source"):
        prepare([], tokenizer, cache, kind="documents")
    assert stores(cache) == []
    assert halves(cache) == []


def test_a_tokenizer_without_an_end_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    endless = tokenizers.Tokenizer(models.BPE({"a": 0, "<|mask|>": 1}, []))
    with pytest.raises(CheckpointError, match="has no end of text; name its eos_token"):
        prepare([write(tmp_path / "x.jsonl", {"text": "a"})], Tokenizer(endless), tmp_path, kind="documents")


def test_chats_that_the_template_refuses_are_skipped(tokenizer: Tokenizer, tmp_path: Path) -> None:
    picky = "{% if messages[0].content == 'no' %}{{ raise_exception('not this') }}{% endif %}" + TEMPLATE
    source = write(tmp_path / "x.jsonl", *({"prompt": p, "answer": "x"} for p in ("yes", "no", "yes")))
    store = prepare([source], Tokenizer(tokenizer.backend, config={"chat_template": picky}), tmp_path, kind="chat")
    assert len(store) == 2
    assert manifest(store)["skipped"]["first"][0]["where"] == f"{source}:2"
    assert "not this" in manifest(store)["skipped"]["first"][0]["reason"]


def test_records_are_read_a_chunk_ahead_and_no_further(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = written = ahead = 0
    real_records, real_usable = data.read_records, data.usable

    def counting(*args: Any) -> Iterator[Any]:
        nonlocal read
        for record in real_records(*args):
            read += 1
            yield record

    def writing(*args: Any) -> Iterator[Any]:
        nonlocal written, ahead
        for example in real_usable(*args):
            ahead, written = max(ahead, read - written), written + 1
            yield example

    monkeypatch.setattr(data, "read_records", counting)
    monkeypatch.setattr(data, "usable", writing)
    prepare([write(tmp_path / "x.jsonl", *[{"text": "a"}] * 5000)], tokenizer, tmp_path, kind="documents")
    assert (read, written, ahead) == (5000, 5000, 1024)
    read = written = ahead = 0
    prepare([write(tmp_path / "y.jsonl", *[{"text": "a" * 10**6}] * 9)], tokenizer, tmp_path, kind="documents")
    assert (read, written, ahead) == (9, 9, 3)  # long ones weigh more


# ---- made once, and again when something changes ----


def test_a_store_is_made_once(tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "x.jsonl", {"text": "a"})
    made = prepare([source], tokenizer, tmp_path / "cache", kind="documents")
    capsys.readouterr()
    opened = prepare([source], tokenizer, tmp_path / "cache", kind="documents")
    assert (opened.folder, stream(opened)) == (made.folder, stream(made))
    assert capsys.readouterr() == ("", "")
    assert stores(tmp_path / "cache") == [f"documents-{manifest(made)['fingerprint'][:12]}"]


def test_whatever_the_tokens_depend_on_makes_another_store(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.py").write_text("a")
    (folder / "b.md").write_text("b")
    more = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    more.add_tokens(["zz"])
    template = Tokenizer(tokenizer.backend, config={"chat_template": "other"})

    def made(with_: Tokenizer = tokenizer) -> TokenStore:
        return prepare([str(folder)], with_, tmp_path / "cache", kind="documents")

    seen = [made(), made(Tokenizer(more, config=tokenizer.config)), made(template)]
    before = (folder / "a.py").stat()
    (folder / "a.py").write_text("c")  # as long as before
    os.utime(folder / "a.py", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    seen.append(made())
    assert tokenizer.decode(stream(seen[-1])) == "cb"
    (folder / "b.md").rename(folder / "0.md")
    seen.append(made())
    assert tokenizer.decode(stream(seen[-1])) == "bc"
    assert len({store.folder for store in seen}) == len(seen)


def test_sources_that_change_under_the_reader_are_refused(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, real = write(tmp_path / "x.jsonl", {"text": "a"}), data.read_records

    def appending(*args: Any) -> Iterator[Any]:
        yield from real(*args)
        write(tmp_path / "x.jsonl", {"text": "a"}, {"text": "b"})

    monkeypatch.setattr(data, "read_records", appending)
    with pytest.raises(ConfigError, match="sources changed while they were read"):
        prepare([source], tokenizer, tmp_path / "cache", kind="documents")
    assert stores(tmp_path / "cache") == []
    assert halves(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_written_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", {"text": "a"})
    with pytest.raises(ConfigError, match=r"cache='.*x\.jsonl' cannot be written \(.*\); name another folder"):
        prepare([source], tokenizer, source, kind="documents")


# ---- kills, crowds, damage ----

CHILD = """
import sys, time
from diffucoder.tokenizer import Tokenizer
from diffucoder.training import data

real = data.read_records
def stalling(*args):
    for number, record in enumerate(real(*args)):
        if number == {stall}:
            print("stalled", flush=True)
            time.sleep(60)
        yield record

data.read_records = stalling
tokenizer = Tokenizer.load({tokenizer!r})
print("ready", flush=True)
sys.stdin.readline()
store = data.prepare([{source!r}], tokenizer, {cache!r}, kind="documents")
print(store.folder.name, len(store), store.tokens)
"""


def start(tokenizer: Tokenizer, source: str, cache: Path, *, stall: int = -1) -> "subprocess.Popen[str]":
    tokenizer.save(cache.parent / "tokenizer")
    values = {"tokenizer": str(cache.parent / "tokenizer"), "source": source, "cache": str(cache), "stall": stall}
    code = CHILD.format(**values)
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_a_kill_leaves_nothing_that_passes_for_a_store(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source, cache = write(tmp_path / "x.jsonl", *({"text": f"number {n}"} for n in range(5000))), tmp_path / "cache"
    with start(tokenizer, source, cache, stall=4000) as child:
        assert child.stdin
        assert child.stdout
        child.stdin.write("\n")
        child.stdin.flush()
        assert [child.stdout.readline() for _ in range(2)] == ["ready\n", "stalled\n"]
        child.send_signal(signal.SIGKILL)
    (half,) = halves(cache)
    assert sum(path.stat().st_size for path in half.glob("*.arrow")) > 10_000  # it had got somewhere
    assert stores(cache) == []

    store = prepare([source], Tokenizer.load(tmp_path / "tokenizer"), cache, kind="documents")
    assert store.folder in half.parents
    assert stores(cache) == [store.folder.name]
    assert halves(cache) == []
    assert [tokenizer.decode(store.example(n)[0]) for n in (0, 4999)] == ["number 0", "number 4999"]
    assert len(store) == 5000


def test_of_several_processes_one_tokenises_and_all_open(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source, cache = write(tmp_path / "x.jsonl", *[{"text": "some text " * 20}] * 5000), tmp_path / "cache"
    children = [start(tokenizer, source, cache) for _ in range(3)]
    for child in children:
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
    for child in children:  # all at once
        assert child.stdin
        child.stdin.write("\n")
        child.stdin.flush()
    told = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    (name,) = stores(cache)
    assert [out for out, _ in told] == [f"{name} 5000 1005000\n"] * 3
    assert Counter(err.count("tokenised") for _, err in told) == {1: 1, 0: 2}


@pytest.fixture
def whole(tokenizer: Tokenizer, tmp_path: Path) -> TokenStore:
    source = write(tmp_path / "x.jsonl", *({"prompt": "p", "answer": str(n)} for n in range(50)))
    return prepare([source], tokenizer, tmp_path, kind="chat")


@pytest.mark.parametrize("name", ["generator-train.arrow", "dataset_info.json"])
@pytest.mark.parametrize("kept", [None, 0.0, 0.3, 0.9, 0.99])
def test_damage_is_found_and_deleting_the_folder_helps(
    whole: TokenStore, tokenizer: Tokenizer, tmp_path: Path, name: str, kept: float | None
) -> None:
    (path,) = whole.folder.rglob(name)
    content = path.read_bytes()
    if kept is None and name == "dataset_info.json":
        path.write_text("{}")
    elif kept is None:
        path.unlink()
    else:
        path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match=f"{whole.folder} cannot be read .*; delete it: it is made again"):
        prepare([str(tmp_path / "x.jsonl")], tokenizer, tmp_path, kind="chat")
    shutil.rmtree(whole.folder)
    assert len(prepare([str(tmp_path / "x.jsonl")], tokenizer, tmp_path, kind="chat")) == 50


# ---- order ----


def order(n: int, seed: tuple[int, ...]) -> list[int]:
    return [epoch_index(position, n, seed) for position in range(n)]


@pytest.mark.parametrize("n", [*range(1, 40), 63, 64, 65, 100, 255, 256, 257, 999, 1024, 1681, 2000])
def test_an_epoch_is_a_permutation(n: int) -> None:
    for seed in ((0,), (1, 2), (-3, 2**40)):
        assert sorted(order(n, seed)) == list(range(n))
        assert order(n, seed) == order(n, seed)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 7, 16])
def test_every_order_is_equally_likely(n: int) -> None:
    placed = min(n, 4)
    orders = math.perm(n, placed)
    each = max(1, 6000 // orders)
    seen = Counter(tuple(epoch_index(i, n, (seed,)) for i in range(placed)) for seed in range(orders * each))
    chi_square = sum((count - each) ** 2 / each for count in seen.values()) + each * (orders - len(seen))
    assert abs(chi_square - (orders - 1)) < 4 * math.sqrt(2 * (orders - 1))


def test_a_long_epoch_is_spread_evenly_and_without_pattern() -> None:
    n = 1_000_000
    rows = np.array([epoch_index(position, n, (7, 8)) for position in range(100_000)])
    assert len(set(rows.tolist())) == 100_000
    assert 0 <= rows.min() <= rows.max() < n
    counts = np.bincount(rows // 10**4, minlength=100)
    assert ((counts - 1000) ** 2 / 1000).sum() < 99 + 5 * 14.1
    share = rows / n
    for lag in (1, 2, 10):
        assert abs(np.corrcoef(share[:-lag], share[lag:])[0, 1]) < 5 / np.sqrt(100_000)


def test_seeds_differ() -> None:
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (-1,), (2**62,)]
    assert len({tuple(order(50, key)) for key in keys}) == len(keys)


def test_the_order_never_changes_between_versions() -> None:
    assert order(10, (1, 2)) == [6, 2, 8, 9, 7, 4, 0, 1, 3, 5]


def test_nothing_cannot_be_shuffled() -> None:
    for position in (-1, 0, 5):
        with pytest.raises(ConfigError, match="n=0 leaves nothing to shuffle"):
            epoch_index(position, 0, (0,))


def test_every_epoch_reads_everything_once_in_its_own_order() -> None:
    rows = np.array([epoch_index(position, 100, (4, 2)) for position in range(300)])
    epochs = rows.reshape(3, 100)
    assert (np.sort(epochs) == np.arange(100)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    # positions may be read in any order, as the processes of a run do
    assert [epoch_index(position, 100, (4, 2)) for position in range(299, -1, -7)] == rows[::-7].tolist()
