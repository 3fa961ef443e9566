"""Records from folders, JSONL and the real `datasets` library; what cannot be used is named, never dropped."""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from diffucoder.errors import CheckpointError, ConfigError
from diffucoder.training.sources import SUFFIXES, Kind, Record, Skipped, find_files, records


def read(*sources: str | Path, kind: Kind = "documents") -> list[Record | Skipped]:
    return list(records(sources, kind))


def texts(found: list[Record | Skipped]) -> list[str]:
    return [record.text for record in found if isinstance(record, Record)]


def reasons(found: list[Record | Skipped]) -> dict[str, str]:
    return {skipped.where: skipped.reason for skipped in found if isinstance(skipped, Skipped)}


def write_jsonl(path: Path, *lines: object) -> Path:
    """Bytes are written as they are, anything else as JSON."""
    content = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(line + b"\n" for line in content))
    return path


# ---- documents ----


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name, text in {"b/z.py": "z = 1\n", "b/a.txt": "a\r\n", "a.md": "# é\n", "c.pyc": "no", "d.rs": "rust"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    assert texts(read(tmp_path)) == ["# é\n", "a\r\n", "z = 1\n"]
    assert texts(read(tmp_path / "b", tmp_path / "a.md")) == ["a\r\n", "z = 1\n", "# é\n"]


def test_what_tools_put_into_a_folder_is_not_read(tmp_path: Path) -> None:
    for name in ("a.py", ".git/hook.py", ".venv/lib/b.py", "src/.hidden.py", "env/lib/c.py", "js/node_modules/d.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "env/pyvenv.cfg").touch()
    (tmp_path / "src/venv").mkdir()
    (tmp_path / "src/venv/own.py").write_text("# own\n")  # only a name
    assert texts(read(tmp_path)) == ["# a.py\n", "# own\n"]
    assert texts(read(tmp_path / ".git")) == ["# .git/hook.py\n"]  # asked for
    with pytest.raises(ConfigError, match="holds no file with suffix"):
        read(tmp_path / "js")


def test_a_source_may_be_one_name_or_path(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", {"text": "a"})
    assert list(records(str(path), "documents")) == list(records(path, "documents")) == read(path)
    (tmp_path / "x.text").write_text("b")
    assert texts(list(records(tmp_path, "documents", suffixes=(".jsonl", ".text")))) == ["a", "b"]


def test_lines_of_jsonl_end_at_line_feeds_alone(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\u0085d\fe\v\x1cf\r"
    rows = [json.dumps({"text": text}, ensure_ascii=False).encode(), b'{"text": "g"}\r']
    for name, mark in (("plain", b""), ("marked", b"\xef\xbb\xbf")):
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes(mark + b"\n".join(rows))  # and no line feed at the end
        assert texts(read(path)) == [text, "g"]


def test_a_field_that_is_null_is_as_good_as_absent(tmp_path: Path) -> None:
    """`datasets` gives every row all columns of a table, and null where a row has nothing."""
    empty = {"messages": None, "prompt": None, "answer": None, "instruction": None, "input": None, "output": None}
    chats = [
        {"messages": [USER, ASSISTANT]},
        {"prompt": "p", "answer": "q"},
        {"instruction": "i", "output": "o"},
        {"instruction": "i", "input": "n", "output": "o"},
    ]
    bare = read(write_jsonl(tmp_path / "bare.jsonl", *chats), kind="chat")
    full = read(write_jsonl(tmp_path / "full.jsonl", *(empty | chat for chat in chats)), kind="chat")
    assert [(r.text, r.prompt) for r in full] == [(r.text, r.prompt) for r in bare]  # type: ignore[union-attr]
    assert len(full) == 4
    path = write_jsonl(
        tmp_path / "text.jsonl",
        {"text": None, "content": "a"},
        {"text": "", "content": "b"},
        {"messages": [], "text": "c"},
        {"text": None, "content": None},
    )
    assert texts(read(path)) == ["a", "b", "c"]
    assert reasons(read(path)) == {f"{path}:4": "has no field 'text' or 'content'"}


def test_unusable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.py").touch()
    (tmp_path / "good.py").write_bytes(b"\xef\xbb\xbfx = 1\n")  # some editors put a mark before UTF-8
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "link.py").symlink_to(tmp_path / "good.py")
    found = read(tmp_path)
    assert texts(found) == ["x = 1\n", "x = 1\n"]
    assert reasons(found) == {
        str(tmp_path / "empty.py"): "file is empty",
        str(tmp_path / "latin.py"): "not UTF-8 (invalid continuation byte at byte 5)",
    }


def test_unusable_lines_are_named_by_number(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "x.jsonl",
        {"text": "one"},
        b'{"text": ',
        b'{"text": "\xff"}',
        [1],
        {"txt": "x"},
        {"text": 3},
        {"text": " \n"},
        b"",
        b"[" * 100_000,
        {"content": "two", "other": None},
    )
    found = read(path)
    assert texts(found) == ["one", "two"]
    assert {int(where.removeprefix(f"{path}:")): why for where, why in reasons(found).items()} == {
        2: "not JSON (Expecting value at character 10)",
        3: "not UTF-8 (invalid start byte at byte 10)",
        4: "not a JSON object but list",
        5: "has no field 'text' or 'content'",
        6: "field 'text' is int, not text",
        7: "field 'text' is empty",
        8: "line is empty",
        9: reasons(found)[f"{path}:9"],
    }
    assert reasons(found)[f"{path}:9"].startswith("not JSON that can be read (")


def test_gzip_is_read_and_a_cut_one_says_where_it_breaks_off(tmp_path: Path) -> None:
    lines = b"".join(b'{"text": "line %d"}\n' % n for n in range(5000))
    whole, cut, plain = tmp_path / "whole.jsonl.gz", tmp_path / "cut.jsonl.gz", tmp_path / "plain.jsonl.gz"
    whole.write_bytes(gzip.compress(lines))
    cut.write_bytes(gzip.compress(lines)[:-2000])
    plain.write_bytes(lines)
    assert texts(read(whole)) == [f"line {n}" for n in range(5000)]
    *kept, last = read(cut)
    assert texts(kept) == [f"line {n}" for n in range(len(kept))]
    assert isinstance(last, Skipped)
    assert last.where == f"{cut}:{len(kept) + 1}"
    assert last.reason.startswith("cannot be read from here on (")
    assert texts(read(plain)) == texts(read(whole))  # what a file is packed with is seen in its first bytes


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere", "'nowhere' is not a folder or a file"),
        ("empty", r"'empty' holds no file with suffix \.py \.txt \.md"),
        ("table.parquet", "'table.parquet' has none of the suffixes"),
        ("hub:name", "'hub:name' is not of the form hub:owner/name"),
        ("hub:owner/name@", "is not of the form hub:owner/name"),
    ],
)
def test_sources_that_are_not_there(source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.parquet").touch()
    with pytest.raises(ConfigError, match=said):
        find_files(source, SUFFIXES["documents"])
    with pytest.raises(ConfigError, match=said):
        read(source)


# ---- chats ----


def test_chats_are_messages_or_a_request_and_its_answer(tmp_path: Path) -> None:
    spoken = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "a", "name": "x"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    path = write_jsonl(
        tmp_path / "x.jsonl",
        {"messages": spoken},
        {"prompt": "p", "answer": "q"},
        {"instruction": "i", "input": "", "output": "o"},
        {"instruction": "i", "input": "n", "output": "o"},
    )
    plain = [{"role": m["role"], "content": m["content"]} for m in spoken]
    assert [(list(r.prompt), r.text) for r in read(tmp_path, kind="chat") if isinstance(r, Record)] == [
        (plain[:-1], "d"),
        ([{"role": "user", "content": "p"}], "q"),
        ([{"role": "user", "content": "i"}], "o"),
        ([{"role": "user", "content": "i\n\nn"}], "o"),
    ]
    assert read(path, kind="chat") == read(tmp_path, kind="chat")


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"text": "x"}, "has neither 'messages'"),
        ({"prompt": "x", "output": "y"}, "has neither 'messages'"),
        ({"prompt": "x", "answer": ""}, "field 'answer' is empty"),
        ({"prompt": ["x"], "answer": "y"}, "field 'prompt' is list, not text"),
        ({"messages": "x"}, "not a list of messages"),
        ({"messages": ["x"]}, "not a list of messages"),
        ({"messages": []}, "has neither 'messages'"),
        ({"messages": [USER]}, "roles user are not"),
        ({"messages": [ASSISTANT]}, "roles assistant are not"),
        ({"messages": [USER, ASSISTANT, USER]}, "roles user, assistant, user are not"),
        ({"messages": [USER, ASSISTANT, ASSISTANT]}, "roles user, assistant, assistant are not"),
        ({"messages": [USER, {"role": "system", "content": "s"}, USER, ASSISTANT]}, "roles user, system"),
        ({"messages": [{"role": "tool", "content": "t"}, USER, ASSISTANT]}, "roles tool"),
        ({"messages": [{"role": ["user"], "content": "t"}, ASSISTANT]}, "are not"),
        ({"messages": [{"role": "user"}, ASSISTANT]}, "user message is NoneType, not text"),
        ({"messages": [{"role": "user", "content": ""}, ASSISTANT]}, "user message is empty"),
    ],
)
def test_chats_that_cannot_be_used(fields: object, why: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", {"prompt": "p", "answer": "q"}, fields)
    found = read(path, kind="chat")
    assert texts(found) == ["q"]
    assert why in reasons(found)[f"{path}:2"]


# ---- hub ----


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from which the real `datasets` reads owner/name, as it reads a dataset of the hub: without a script."""
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_hub_is_streamed_row_by_row(hub: Path) -> None:
    write_jsonl(hub / "owner/name/train.jsonl", {"text": "a"}, {"text": ""}, {"text": "b"})
    write_jsonl(hub / "owner/name/test.jsonl", {"text": "c"})
    found = read("hub:owner/name", "hub:owner/name@test")
    assert texts(found) == ["a", "b", "c"]
    assert reasons(found) == {"hub:owner/name:2": "field 'text' is empty"}


def test_the_hub_has_configs_and_chats(hub: Path) -> None:
    for config in ("easy", "hard"):
        spoken = [{"role": "user", "content": config}, {"role": "assistant", "content": config.upper()}]
        write_jsonl(hub / f"owner/chats/{config}.jsonl", {"messages": spoken})
    configs = [{"config_name": c, "data_files": f"{c}.jsonl"} for c in ("easy", "hard")]
    (hub / "owner/chats/README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    assert read("hub:owner/chats/hard@train", kind="chat") == [
        Record("hub:owner/chats/hard@train:1", "HARD", ({"role": "user", "content": "hard"},))
    ]


@pytest.mark.parametrize("source", ["hub:owner/nothing", "hub:owner/name@validation", "hub:owner/name/config"])
def test_what_the_hub_does_not_have_is_said_on_one_line(hub: Path, source: str) -> None:
    write_jsonl(hub / "owner/name/train.jsonl", {"text": "a"})
    with pytest.raises(CheckpointError, match=r"cannot be read at row 1 .*; check its name.*") as raised:
        read(source)
    assert "\n" not in str(raised.value)


def test_a_hub_that_breaks_off_is_an_error_and_not_the_end(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def breaking(*_: object, **__: object) -> Any:
        yield {"text": "a"}
        raise ConnectionError("gone\nfor good")

    monkeypatch.setattr(datasets, "load_dataset", breaking)
    with pytest.raises(CheckpointError, match=r"'hub:owner/name' cannot be read at row 2 \(gone\); check"):
        read("hub:owner/name")


def test_without_datasets_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"needs datasets; run pip install -e '\.\[train\]'"):
        read("hub:owner/name")
