"""Benchmarks in their published form: read whole, asked in the paper's words, and what the messages say otherwise."""

import ast
import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffucoder.errors import ConfigError
from diffucoder.evaluation.benchmarks import PREFILL, Asserts, Calls, Script, Task, load
from diffucoder.evaluation.samples import read_samples
from diffucoder.grading.syntax import parsed

ROW = {
    "task_id": "HumanEval/0",
    "entry_point": "f",
    "prompt": "def f(x):\n",
    "canonical_solution": "    return x\n",
    "test": "def check(candidate):\n    assert candidate(1) == 1\n",
}
HARD = {
    "task_id": "BigCodeBench/13",
    "entry_point": "task_func",
    "complete_prompt": 'import os\nimport pandas as pd\ndef task_func():\n    """Nothing."""\n',
    "instruct_prompt": "Nothing.\nStart with:\n```\nimport os\n```",
    "canonical_solution": "    return pd\n",
    "code_prompt": "import os\nimport pandas as pd\ndef task_func():\n",
    "test": "import unittest\nfrom bs4.element import Tag\nclass TestCases(unittest.TestCase): ...",
    "libs": "['os', 'pandas']",
}


def packed(content: bytes) -> bytes:
    """gzip without the time of day: parameters of a test must be equal in each process that collects it."""
    return gzip.compress(content, mtime=0)


def write(path: Path, *rows: dict[str, Any]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def inputs(task: Task, name: str) -> Any:
    """`base` or `plus` inputs, or the `code` that tests a program; none where the task has no such thing."""
    return getattr(task.tests, name, ())


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Stand in for the hub: `hub(rows)` answers with them and notes what was asked for."""

    def answer(rows: Any) -> list[Any]:
        asked: list[Any] = []

        def load_dataset(name: str, config: str | None, *, split: str) -> Any:
            asked.append((name, config, split))
            if isinstance(rows, Exception):
                raise rows
            return rows

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))  # type: ignore[arg-type]
        return asked

    return answer


@pytest.mark.parametrize(
    ("name", "count", "judged"),
    [
        ("humaneval", 164, "base"),
        ("humaneval+", 164, "plus"),
        ("mbpp", 399, "base"),
        ("mbpp+", 399, "plus"),
        ("humaneval-infilling", 1033, "code"),
        ("humaneval-infilling-random-span-light", 164, "code"),
        ("bigcodebench-hard", 148, "code"),
        ("bigcodebench-hard-instruct", 148, "code"),
    ],
)
def test_published_benchmarks_are_read_whole(shared: Path, name: str, count: int, judged: str) -> None:
    tasks = load(name, shared / "data")
    assert len({task.task_id for task in tasks}) == len(tasks) == count
    assert [task.task_id for task in tasks if not inputs(task, judged)] in ([], ["Mbpp/793"])  # which has no plus
    for task in tasks:
        assert isinstance(task.tests, Script if judged == "code" else Calls)
        assert bool(inputs(task, "plus")) <= (judged == "plus")
        assert task.prefill == PREFILL
        functions = [node.name for node in parsed(task.canonical).body if isinstance(node, ast.FunctionDef)]
        assert task.entry_point in functions


def test_the_canonical_program_is_the_published_completion_of_the_prompt(shared: Path) -> None:
    for name in ("HumanEval-SingleLineInfilling", "HumanEval-RandomSpanInfillingLight"):
        benchmark = "humaneval-infilling" + ("-random-span-light" if "Random" in name else "")
        with gzip.open(shared / f"data/{name}.jsonl.gz", "rt") as file:
            rows = [json.loads(line) for line in file]
        for task, row in zip(load(benchmark, shared / "data"), rows, strict=True):
            assert task.program({"completion": row["canonical_solution"]}) == task.canonical


@pytest.mark.parametrize(
    ("name", "stem"), [("humaneval+", "humaneval"), ("mbpp+", "mbpp"), ("bigcodebench-hard", "bcb_hard")]
)
def test_samples_make_the_programs_whose_verdicts_were_published(shared: Path, name: str, stem: str) -> None:
    tasks = {task.task_id: task for task in load(name, shared / "data")}
    with gzip.open(shared / f"replay/1.5b/{stem}-results.json.gz", "rt") as file:
        judged = json.load(file)["eval"]
    with gzip.open(shared / f"replay/1.5b/{stem}-samples.jsonl.gz", "rt") as file:
        for sample in map(json.loads, file):
            (verdict,) = judged[sample["task_id"]]
            assert tasks[sample["task_id"]].program(sample) == verdict["solution"]


def test_instruct_models_are_asked_in_the_words_of_the_papers_tables(tmp_path: Path) -> None:
    write(tmp_path / "HumanEvalPlus.jsonl", ROW | {"base_input": [[1]], "plus_input": []})
    write(tmp_path / "MbppPlus.jsonl", ROW | {"base_input": [[1]], "plus_input": []})
    write(tmp_path / "BigCodeBench-Hard.jsonl", HARD)
    requests = {
        name: load(name, tmp_path)[0].request
        for name in ("humaneval+", "mbpp+", "bigcodebench-hard", "bigcodebench-hard-instruct")
    }
    assert requests == {
        "humaneval+": "Please complete the following problem:\n```\ndef f(x):\n\n```\n",
        "mbpp+": "```\ndef f(x):\n\n```\n",
        "bigcodebench-hard": f"Please complete the following problem:\n```\n{HARD['complete_prompt']}\n```\n",
        "bigcodebench-hard-instruct": f"```\n{HARD['instruct_prompt']}\n```\n",
    }
    assert PREFILL == "Here is the code to solve this problem:\n```python\n"


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_humaneval_is_judged_by_evalplus_inputs_where_they_are_and_by_its_own_tests_otherwise(
    tmp_path: Path, ending: str
) -> None:
    write(tmp_path / f"HumanEval.jsonl{ending}", ROW)
    (task,) = load("humaneval", tmp_path)
    assert task.tests == Script(ROW["test"] + "\ncheck(f)\n")
    exec(task.canonical + task.tests.code, {})  # passes, so is silent
    with pytest.raises(AssertionError):
        exec(task.canonical.replace("return x", "return 0") + task.tests.code, {})

    write(tmp_path / f"HumanEvalPlus.jsonl{ending}", ROW | {"base_input": [[1]], "plus_input": [[2]], "atol": 1e-6})
    (task,) = load("humaneval", tmp_path)
    assert task.tests == Calls(base=((1,),), plus=None, atol=1e-6)
    assert inputs(load("humaneval+", tmp_path)[0], "plus") == ((2,),)


@pytest.mark.parametrize("form", [{"BigCodeBench/13": HARD}, [HARD], HARD])
@pytest.mark.parametrize("indent", [None, 2])
def test_bigcodebench_is_read_in_every_form_it_is_handed_round(tmp_path: Path, form: Any, indent: int | None) -> None:
    (tmp_path / "BigCodeBench.json").write_text(json.dumps(form, indent=indent))
    (task,) = load("bigcodebench", tmp_path)
    assert task.libraries == ("bs4", "pandas")
    calibrated = "import os\nimport pandas as pd\ndef task_func():\n\n    pass\nx = 1"
    assert task.program({"solution": "x = 1"}) == calibrated


def test_the_projects_own_problems_are_a_benchmark_too() -> None:
    tasks = load("tiny")
    first = tasks[0]
    assert [task.task_id for task in tasks] == [f"tiny/{at}" for at in range(500)]
    assert first.prompt == f"# {first.request}\n"
    assert first.prefill == ""
    assert isinstance(first.tests, Asserts)
    exec("\n".join([first.program({"completion": first.canonical}), *first.tests.lines]), {})
    with pytest.raises(AssertionError):
        exec("\n".join([f"def {first.entry_point}(*_): return object()", *first.tests.lines]), {})


def test_only_the_older_mbpp_compares_in_order(tmp_path: Path, shared: Path) -> None:
    with gzip.open(shared / "data/MbppPlus.jsonl.gz", "rt") as lines:
        ids = [json.loads(line)["task_id"] for line in lines]
    rows = [ROW | {"task_id": name, "base_input": [], "plus_input": []} for name in ids]
    write(tmp_path / "MbppPlus.jsonl", *rows)
    write(tmp_path / "HumanEvalPlus.jsonl", *rows)
    in_order = [inputs(load(name, tmp_path)[0], "in_order") for name in ("mbpp", "mbpp+", "humaneval+")]
    assert in_order == [True, True, False]
    write(tmp_path / "MbppPlus.jsonl", *rows[:398], rows[398] | {"task_id": "Mbpp/9999"})  # as many, but others
    assert not inputs(load("mbpp+", tmp_path)[0], "in_order")
    write(tmp_path / "MbppPlus.jsonl", *rows[:378])
    assert not inputs(load("mbpp+", tmp_path)[0], "in_order")
    write(tmp_path / "own.jsonl", *({"prompt": "x", "tests": ["assert f(1) == 1"]} for _ in range(399)))
    assert load(str(tmp_path / "own.jsonl"))[398].tests == Asserts(("assert f(1) == 1",))


def test_a_users_file_may_say_how_an_answer_begins(tmp_path: Path) -> None:
    write(tmp_path / "own.jsonl", {"prompt": "Add.", "id": 7}, {"prompt": "Add.", "prefill": PREFILL})
    plain, prefilled = load(str(tmp_path / "own.jsonl"))
    assert (plain.task_id, plain.prefill, plain.tests) == ("7", "", None)
    assert (prefilled.task_id, prefilled.prefill) == ("own/1", PREFILL)


def test_null_columns_are_as_good_as_absent(tmp_path: Path) -> None:
    row = {"prompt": "p", "tests": ["assert f(1) == 1"]}
    empty = {"id": None, "entry_point": None, "solution": None, "prefill": None}
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n")
    plain = load(str(tmp_path / "own.jsonl"))
    (tmp_path / "own.jsonl").write_text(json.dumps(empty | row) + "\n")
    assert load(str(tmp_path / "own.jsonl")) == plain
    (tmp_path / "s.jsonl").write_text('{"task_id": "own/0", "solution": null, "completion": "c"}\n')
    assert read_samples(tmp_path / "s.jsonl", plain)[0]["completion"] == "c"


def test_a_sample_is_a_solution_or_a_completion() -> None:
    task = Task("t", "f", "def f():\n", "", "", suffix="# end\n")
    assert task.program({"completion": "    pass\n"}) == "def f():\n    pass\n# end\n"
    assert task.program({"solution": "x\n", "completion": "y"}) == "x\n"
    with pytest.raises(ConfigError, match="needs 'completion' or 'solution'"):
        task.program({"text": ""})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("humanevl+", "did you mean 'humaneval\\+'"),
        ("zzz", "known: humaneval, "),
        ("mbpp+", "none of MbppPlus.jsonl.gz, MbppPlus.jsonl; put one there"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(name, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x1f\x8b broken", "cannot be read"),
        (packed(b'{"task_id": "HumanEval/0"}'), "KeyError"),
        (packed(b"[1, 2]"), "not in their published form"),
        (packed(b"7"), "not in their published form"),
        (packed(b"{"), "cannot be read"),
        (packed(b"\xff"), "cannot be read"),
        (packed(json.dumps(ROW).encode())[:-9], "cannot be read"),
    ],
)
def test_a_broken_file_is_named_on_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "HumanEvalPlus.jsonl.gz").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load("humaneval+", tmp_path)
    assert "fetch" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_of_the_hub_become_tasks(hub: Callable[..., list[Any]]) -> None:
    asked = hub([ROW])
    (task,) = load("humaneval")
    assert inputs(task, "code").endswith("check(f)\n")
    hub([HARD])
    (task,) = load("bigcodebench-hard-instruct")
    assert task.libraries == ("bs4", "pandas")
    asked = hub([ROW | {"suffix": "# end\n"}])
    (task,) = load("humaneval-infilling-multi-line")
    assert task.suffix == "# end\n"
    assert asked == [("loubnabnl/humaneval_infilling", "HumanEval-MultiLineInfilling", "test")]


@pytest.mark.parametrize("name", ["humaneval+", "mbpp", "mbpp+", "humaneval-infilling-random-span-light"])
def test_what_the_hub_does_not_have_is_asked_for_as_a_file(name: str) -> None:
    with pytest.raises(ConfigError, match=r"put .*\.jsonl\.gz, .* --data"):
        load(name)


def test_a_hub_out_of_reach_is_said_so(hub: Callable[..., list[Any]]) -> None:
    hub(ConnectionError("no network\nand more"))
    with pytest.raises(ConfigError, match=r"openai_humaneval cannot be loaded from the hub \(no network\); use --data"):
        load("humaneval")


def test_without_datasets_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[train\]' in a clone of the repository, or give --data"):
        load("humaneval")


@pytest.mark.parametrize(
    ("prompt", "continued"),
    [
        ("Write f(x) that doubles x.", "# Write f(x) that doubles x.\n"),
        ("Double x.\n\nName it f.\n", "# Double x.\n# \n# Name it f.\n"),
        ("from a list, class by class, import what is odd", "# from a list, class by class, import what is odd\n"),
        ('def f(x):\n    """Double x."""\n', None),
        ("import math\n\ndef f(x):\n    if x:\n", None),
        ('"""Write f that doubles."""\n', None),
        ("# Double x.\n", None),
    ],
)
def test_a_base_model_continues_a_request_in_words_as_a_comment(
    tmp_path: Path, prompt: str, continued: str | None
) -> None:
    write(tmp_path / "own.jsonl", {"prompt": prompt})
    [task] = load(str(tmp_path / "own.jsonl"))
    assert task.request == prompt
    assert task.prompt == (continued or prompt)
    if continued:
        ast.parse(task.program({"completion": "def f(x):\n    return 2 * x\n"}))


def test_a_base_model_continues_the_shipped_problems_as_comments() -> None:
    for task in load("tiny"):
        assert task.prompt == f"# {task.request}\n"
