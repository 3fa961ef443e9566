"""Exercises are read from JSONL of several makes and written back; what cannot be used is named, never dropped."""

import gzip
import json
from pathlib import Path

import pytest

from diffucoder.errors import ConfigError
from diffucoder.training.exercises import Exercise, parse_exercise, read_exercises, write_exercises

DOUBLE = Exercise("1", "Double the number n.", ("assert f(2) == 4", "assert f(0) == 0"), "ours")


def write(path: Path, *rows: object) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    odd = Exercise("ü/2", 'Say "\u2028" and \ud800.', ("assert f('é') == 'É'",))
    path = tmp_path / "made" / "x.jsonl"
    write_exercises(path, [DOUBLE, odd])
    assert read_exercises([str(path)]) == [DOUBLE, odd]
    assert [each.name for each in path.parent.iterdir()] == ["x.jsonl"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    write_exercises(path, [DOUBLE])
    with pytest.raises(RuntimeError):
        write_exercises(path, (_ for _ in [DOUBLE] if _fails()))
    assert read_exercises([str(path)]) == [DOUBLE]
    with pytest.raises(ConfigError, match=r"cannot be written .*name another place"):
        write_exercises(path / "below.jsonl", [DOUBLE])


def _fails() -> bool:
    raise RuntimeError


def test_rows_go_by_the_names_of_several_data_sets(tmp_path: Path) -> None:
    acecode = {"id": "ace", "question": "Q", "test_cases": ["assert f()"], "source": "oss", "inferences": []}
    mbpp = {"task_id": 601, "prompt": "P", "test_list": ["assert g()"]}
    packed = tmp_path / "more.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps({"prompt": "R", "tests": ["assert h()"]}).encode()))
    write(tmp_path / "a.jsonl", acecode, mbpp)
    assert read_exercises([str(tmp_path)]) == [
        Exercise("ace", "Q", ("assert f()",), "oss"),
        Exercise("601", "P", ("assert g()",)),
        Exercise("more.jsonl.gz:1", "R", ("assert h()",)),
    ]


def test_published_rows_are_read_as_they_are(shared: Path, tmp_path: Path) -> None:
    published = read_exercises(shared / "data/Mbpp-TrainVal.jsonl.gz")
    assert len(published) > 450
    assert published[0].id == "511"
    assert published[0].prompt.startswith("Write a python function to find minimum sum of factors")
    assert published[0].tests[0] == "assert find_Min_Sum(12) == 7"
    first, *others = read_exercises(str(shared / "data/HumanEval.jsonl.gz"))
    assert (first.id, len(others)) == ("HumanEval/0", 159)  # three have loops, one needs a variable
    assert first.prompt.startswith("from typing import List")
    assert first.tests[0] == "assert has_close_elements([1.0, 2.0, 3.9, 4.0, 5.0, 2.2], 0.3) == True"


def test_null_columns_and_setup_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = dict.fromkeys(("id", "prompt", "question", "text", "tests", "test_cases", "test_list", "source"))
    rows = [{"text": "T", "test_list": ["assert f()"]}, {"question": "Q", "test_cases": ["assert g()"]}]
    full = write(tmp_path / "x.jsonl", *(empty | row for row in rows))
    assert read_exercises(full) == [
        Exercise("x.jsonl:1", "T", ("assert f()",)),
        Exercise("x.jsonl:2", "Q", ("assert g()",)),
    ]
    mbpp = {"text": "T", "test_list": ["assert f(root) == 1"], "test_setup_code": "root = Node(1)"}
    read_exercises(write(tmp_path / "y.jsonl", mbpp, {**mbpp, "test_setup_code": " "}))
    assert "y.jsonl:1: field 'test_setup_code' has code that its tests need" in capsys.readouterr().err


def test_what_cannot_be_used_is_counted_and_the_first_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"prompt": "P", "tests": ["assert f()"]}
    source = write(
        tmp_path / "x.jsonl",
        good,
        {"prompt": "P", "tests": []},
        {"prompt": " ", "tests": ["assert f()"]},
        {"prompt": "P", "tests": ["assert f()", ""]},
        {"prompt": "P", "tests": "assert f()"},
        "not JSON",
        good,
    )
    assert len(read_exercises([source])) == 2
    assert capsys.readouterr().err == (
        f"skipped 5 of 7 records; the first: {source}:2: field 'tests' is not a list of asserts\n"
    )


def test_an_assert_that_needs_other_lines_of_a_check_is_not_used() -> None:
    check = "def check(candidate):\n    lst = [1]\n    assert candidate(lst) == 1\n"
    with pytest.raises(ValueError, match="needs 'lst'"):
        parse_exercise("x", {"prompt": "def f(x):\n", "entry_point": "f", "test": check})


def test_nothing_usable_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none of 1 records of .*:1: has no field 'prompt' or 'question' or 'text'"):
        read_exercises([write(tmp_path / "x.jsonl", {"content": "P"})])
    with pytest.raises(ConfigError, match="holds no record; name another source"):
        read_exercises([write(tmp_path / "y.jsonl")])
    with pytest.raises(ConfigError, match="is not a folder or a file"):
        read_exercises([str(tmp_path / "z.jsonl")])
