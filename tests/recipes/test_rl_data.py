"""Preparing exercises: percentiles by hand, stubs, what is left out, planted leaks, a benchmark kept out."""

import gzip
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from overlap import Overlaps
from prepare import SPREADS, are_hard, main, prepare, stub_of, with_test

from diffucoder.errors import ConfigError
from diffucoder.evaluation.benchmarks import Asserts, Calls, Script, Task, load
from diffucoder.training.exercises import Exercise, read_exercises


def write(path: Path, rows: Iterable[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def report_of(out: Path) -> Any:
    return json.loads(out.with_suffix(".report.json").read_text())


# ---- AceCode ----

# Means: eleven problems, 0.0, 0.1, ... 1.0, so that the 20th percentile is 0.2, the 25th 0.25 and the 75th 0.75.
# Population standard deviations in the same order; sorted: 0 0 0 0 .05 .1 .1 .1 .2 .2 .3, so that their 40th percentile
# is 0.05 and their 60th 0.1. A sample's would be 1.41 times as large throughout.
MEANS = [each / 10 for each in range(11)]
STDS = [0.0, 0.1, 0.05, 0.1, 0.2, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0]
PAIRS = [(mean - std, mean + std) for mean, std in zip(MEANS, STDS, strict=True)]


@pytest.mark.parametrize(("spread", "expected"), [("paper", [1]), ("released", [1, 2])])
def test_percentiles_are_those_of_all_problems(spread: str, expected: list[int]) -> None:
    assert [at for at, hard in enumerate(are_hard(PAIRS, SPREADS[spread])) if hard] == expected


def test_the_standard_deviation_is_a_populations() -> None:
    # a population's are .1414, .14, .14, 0, 0, whose 60th percentile is .14; a sample's are .1732, .198, .198, 0, 0,
    # whose 60th percentile is .183, and the first, alone in the lowest fifth by mean, would not reach it
    rates = [(0.0, 0.0, 0.3), (0.4, 0.68), (0.5, 0.78), (1.0, 1.0), (1.0, 1.0)]
    assert are_hard(rates, 60) == [True, False, False, False, False]


def ace(
    at: int, question: str, rates: tuple[float, ...], completion: str = "def f(n):\n    return n"
) -> dict[str, Any]:
    names = ("qwen_coder_2.5", "llama3_instruct")
    answers = [
        {"model_name": name, "completion": completion, "pass_rate": rate}
        for name, rate in zip(names, rates, strict=True)
    ]
    other = {"model_name": "another", "completion": "x = 1", "pass_rate": 0.0}
    return {
        "id": f"ace_{at}",
        "question": question,
        "test_cases": ["assert f(2) == 4"],
        "inferences": [*answers, other],
    }


def test_acecode_keeps_the_hard_ones_and_adds_stubs(tmp_path: Path) -> None:
    questions = [f"Double the number, variant {at}." for at in range(11)]
    questions[2] = "Do as young people do."  # "you" is in it
    rows = [ace(at, question, pair) for at, (question, pair) in enumerate(zip(questions, PAIRS, strict=True))]
    data, out = write(tmp_path / "ace.jsonl", rows), tmp_path / "out.jsonl"
    report = prepare("acecode", out, {}, data)
    made = read_exercises([str(out)])
    assert [each.id for each in made] == ["ace_1", "ace_1/stub", "ace_2"]
    assert made[1].prompt == (
        "Please complete the following problem:\n"
        '```\ndef f(n):\n    """\n    Double the number, variant 1.\n    """\n```\n'
    )
    assert made[0].prompt == "Double the number, variant 1.\nTest cases: assert f(2) == 4"
    assert made[0].tests == made[1].tests == ("assert f(2) == 4",)
    assert (report["exercises"], report["left_out"]) == (3, {"not hard by pass rates": 9})
    assert report_of(out) == report
    prepare("acecode", out, {}, data, "paper")
    assert [each.id for each in read_exercises([str(out)])] == ["ace_1", "ace_1/stub"]


def test_a_stub_is_the_head_of_a_function_around_the_question() -> None:
    assert stub_of("Add.\nAll.", "def add(a: int,\n        b=':') -> int:\n    return a") == (
        "Please complete the following problem:\n"
        "```\ndef add(a: int,\n        b=':') -> int:\n"
        '    """\n    Add.\nAll.\n    """\n```\n'
    )
    assert stub_of("Add.", "\ndef add(a):\n    return a") == stub_of("Add.", "def add(a):\n    return a")
    assert "def add(a): return a:" in (stub_of("Add.", "def add(a): return a") or "")
    assert stub_of("Can YOU add?", "def add(a):\n    return a") is None
    assert stub_of("Add.", "import math\ndef add(a):\n    return a") is None


def test_a_question_that_shows_code_is_asked_without_a_test() -> None:
    shown = Exercise("a", "Mend this:\n```\nx = 1\n```\n", ("assert f(2) == 4",))
    assert with_test(shown) == shown.prompt
    assert with_test(Exercise("a", "Double.", shown.tests)) == "Double.\nTest cases: assert f(2) == 4"


def test_the_best_completion_of_all_models_gives_the_stub(tmp_path: Path) -> None:
    row = ace(0, "Double it.", (0.1, 0.2))
    row["inferences"][1]["completion"] = "def best(n):\n    pass"
    data, out = write(tmp_path / "ace.jsonl", [row]), tmp_path / "out.jsonl"
    prepare("acecode", out, {}, data)
    assert "def best(n):" in read_exercises([str(out)])[1].prompt


def test_acecode_rows_without_the_two_models_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = {**ace(1, "Q.", (0, 0)), "inferences": [{"model_name": "x", "completion": "", "pass_rate": 1}]}
    torn = {**ace(1, "Q.", (0, 0)), "inferences": [{"model_name": "x"}]}
    data = write(tmp_path / "ace.jsonl", [bare, ace(0, "Q.", (0.0, 1.0)), torn])
    prepare("acecode", tmp_path / "out.jsonl", {}, data)
    assert "skipped 2 of 3 records; the first: " in (said := capsys.readouterr().err)
    assert "ace.jsonl:1: has no answer of qwen_coder_2.5 or llama3_instruct" in said


# ---- MBPP ----


def test_mbpp_leaves_out_what_mbpp_plus_has(shared: Path, tmp_path: Path) -> None:
    out = tmp_path / "mbpp.jsonl"
    report = prepare("mbpp", out, {}, str(shared / "data"))
    lines = gzip.decompress((shared / "data/MbppPlus.jsonl.gz").read_bytes()).decode().splitlines()
    plus = {json.loads(line)["task_id"].replace("Mbpp", "mbpp") for line in lines}
    made = read_exercises([str(out)])
    assert plus.isdisjoint(each.id for each in made)
    assert all(511 <= int(each.id.removeprefix("mbpp/")) <= 974 for each in made)
    assert (report["exercises"], len(made)) == (310, 310)
    assert report["left_out"] == {"is in MBPP+": 153, "needs code before its tests": 1}


def test_mbpp_without_mbpp_plus_is_refused(tmp_path: Path) -> None:
    row = {"task_id": 601, "text": "Add.", "code": "", "test_list": ["assert f()"], "test_setup_code": ""}
    write(tmp_path / "Mbpp-TrainVal.jsonl.gz", [row])
    with pytest.raises(ConfigError, match=r"MbppPlus.jsonl.gz' is not a folder or a file; check the path"):
        prepare("mbpp", tmp_path / "out.jsonl", {}, str(tmp_path))
    write(tmp_path / "MbppPlus.jsonl.gz", [{"task_id": "Mbpp/2"}])
    assert prepare("mbpp", tmp_path / "out.jsonl", {}, str(tmp_path))["exercises"] == 1


# ---- benchmarks are kept out ----

PROMPT = (
    'def spread(xs):\n    """ Return the difference between the largest and the smallest of all the given numbers.\n'
    '    >>> spread([1, 5])\n    4\n    """\n'
)
SOLUTION = 'def spread(xs):\n    """Text."""\n    low = min(xs)  # first\n    return max(xs) - low\n'
CHECK = "def check(candidate):\n    assert candidate([1, 9]) == 8\n    assert candidate(make()) == 8\n"
TASKS = [
    Task("Bench/7", "spread", PROMPT, "", SOLUTION, tests)
    for tests in (Script(CHECK), Calls((([3, 3], 2), (float("nan"),))))
]


@pytest.mark.parametrize(
    ("prompt", "test", "solution", "shared_by"),
    [
        (
            "Please return the DIFFERENCE between the largest,\nand the smallest of all numbers",
            "assert f(1)",
            "",
            "words",
        ),
        ("the smallest of all", "assert f(1)", "", "words"),  # shorter than ten words, all of it there
        ("Compute a range.", "assert spread([1,9]) == 8", "", "call"),
        ("Compute a range.", "assert set(spread([3, 3], 2)) == {0}", "", "call"),
        ("Compute a range.", "assert f(1)", "def f(v):\n    m = min(v)\n    return max(v) - m", "solution"),
        ("Compute a range.", "assert spread([1, 8]) == 7", "def f(v):\n    return max(v) - min(v)", None),
        ("Compute a range.", "assert spread(make()) == 8", "no program", None),
        ("Compute a range.", "assert candidate([2]) == 8", "", None),
        ("It is the difference between the largest and the smallest of any two.", "assert sum([1, 9]) == 10", "", None),
        ("Sum these.\nassert return_the_difference_between_the_largest_and_the_smallest_of_all()", "f", "", None),
    ],
)
def test_a_planted_leak_is_found_and_the_clean_are_left(
    prompt: str, test: str, solution: str, shared_by: str | None
) -> None:
    found = Overlaps({"bench": TASKS, "empty": []}).find(Exercise("x", prompt, ("assert f(0)", test)), solution)
    if shared_by is None:
        assert found == {}
    else:
        assert list(found) == ["bench"]
        assert found["bench"].startswith(f"Bench/7: {shared_by}")


def test_leaks_are_dropped_counted_and_named(tmp_path: Path) -> None:
    rows = [
        {"id": "clean", "prompt": "Add one.", "tests": ["assert add(1) == 2"]},
        {"id": "leak", "prompt": "Compute a range.", "tests": ["assert spread([1, 9]) == 8"]},
        {"id": "other", "prompt": "Add two.", "tests": ["assert add(1) == 3"]},
    ]
    source, out = write(tmp_path / "mine.jsonl", rows), tmp_path / "out.jsonl"
    report = prepare(source, out, {"bench": TASKS, "second": TASKS, "third": []})
    assert [each.id for each in read_exercises([str(out)])] == ["clean", "other"]
    assert report["overlaps"] == {"bench": 1, "second": 1, "third": 0}
    shared = "Bench/7: call: spread([1, 9])"
    assert report_of(out)["dropped"] == [{"id": "leak", "overlaps": {"bench": shared, "second": shared}}]


def test_the_command_line_keeps_a_benchmarks_tasks_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = load("tiny")[7]
    assert isinstance(task.tests, Asserts)
    rows = [
        {"id": "clean", "prompt": "Add one.", "tests": ["assert add(1) == 2"]},
        {"id": "leak", "prompt": task.request, "tests": ["assert add(1) == 2"]},
        {"id": "tests", "prompt": "Do.", "tests": list(task.tests.lines)},
    ]
    source, out = write(tmp_path / "mine.jsonl", rows), tmp_path / "out.jsonl"
    monkeypatch.setattr(sys, "argv", ["prepare.py", source, str(out), "--against", "tiny"])
    main()
    assert [each.id for each in read_exercises([str(out)])] == ["clean"]
    said = capsys.readouterr().out
    assert said.startswith("1 exercises; left out {}; overlaps {'tiny': 2}\n")
    assert [each["id"] for each in report_of(out)["dropped"]] == ["leak", "tests"]
    monkeypatch.setattr(sys, "argv", ["prepare.py", source, str(out), "--against", "nonsense"])
    with pytest.raises(SystemExit, match=r"^error: unknown benchmark 'nonsense'"):
        main()


def test_a_source_is_not_written_over(tmp_path: Path) -> None:
    source = write(tmp_path / "mine.jsonl", [{"id": "1", "prompt": "Add.", "tests": ["assert add(1) == 2"]}])
    (tmp_path / "same.jsonl").symlink_to(source)
    before = Path(source).read_bytes()
    for out in (Path(source), tmp_path / "same.jsonl"):
        with pytest.raises(ConfigError, match=r"OUT='.*' is what is read; name another file"):
            prepare(source, out, {})
    data = write(tmp_path / "ace.jsonl", [ace(0, "Q.", (0.0, 1.0))])
    with pytest.raises(ConfigError, match="is what is read"):
        prepare("acecode", Path(data), {}, data)
    assert Path(source).read_bytes() == before


def test_an_exercise_with_a_test_that_is_not_python_is_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        {"id": "good", "prompt": "Add one.", "tests": ["assert add(1) == 2"]},
        {"id": "torn", "prompt": "Add two.", "tests": ["assert add(1) == 3", "nonsense("]},
    ]
    source, out = write(tmp_path / "mine.jsonl", rows), tmp_path / "out.jsonl"
    report = prepare(source, out, {})
    assert [each.id for each in read_exercises([str(out)])] == ["good"]
    assert report["left_out"] == {"has a test that is not Python": 1}


def test_what_leaves_nothing_is_refused(tmp_path: Path) -> None:
    row = {"id": "leak", "prompt": "Compute a range.", "tests": ["assert spread([1, 9]) == 8"]}
    source, out = write(tmp_path / "mine.jsonl", [row]), tmp_path / "out.jsonl"
    with pytest.raises(ConfigError, match=r"no exercise of .* is left; give other data.*'overlaps': {'bench': 1}"):
        prepare(source, out, {"bench": TASKS})
    with pytest.raises(ConfigError, match=r"is not a \.jsonl file"):
        prepare(source, tmp_path / "out.json", {})
    assert not out.exists()
