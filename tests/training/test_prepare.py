"""Preparing exercises: percentiles by hand, stubs, what is left out, planted leaks, programs in the real sandbox."""

import gzip
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from diffucoder.cli import main
from diffucoder.errors import ConfigError, SandboxError
from diffucoder.evaluation.benchmarks import load
from diffucoder.grading.asserts import parse
from diffucoder.grading.grade import grade
from diffucoder.grading.sandbox import Sandbox, isolation
from diffucoder.training import codeio
from diffucoder.training.exercises import Exercise, read_exercises
from diffucoder.training.overlap import HeldOut, Overlaps
from diffucoder.training.prepare import PrepareSettings, prepare, select, stub_of, summary, with_test
from diffucoder.training.sources import Skipped


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


@pytest.mark.parametrize(
    ("difficulty", "spread", "expected"),
    [
        ("hard", "paper", [1]),
        ("hard", "released", [1, 2]),
        ("medium", "released", [3, 4, 5, 6, 7]),
        ("easy", "paper", [8, 9, 10]),
        ("all", "paper", list(range(11))),
    ],
)
def test_percentiles_are_those_of_all_problems(difficulty: Any, spread: Any, expected: list[int]) -> None:
    assert [at for at, chosen in enumerate(select(PAIRS, difficulty, spread)) if chosen] == expected


def test_the_standard_deviation_is_a_populations() -> None:
    # a population's are .1414, .14, .14, 0, 0, whose 60th percentile is .14; a sample's are .1732, .198, .198, 0, 0,
    # whose 60th percentile is .183, and the first, alone in the lowest fifth by mean, would not reach it
    rates = [(0.0, 0.0, 0.3), (0.4, 0.68), (0.5, 0.78), (1.0, 1.0), (1.0, 1.0)]
    assert select(rates, "hard", "paper") == [True, False, False, False, False]


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
    report = prepare("acecode", out, PrepareSettings(data=data), {})
    made = read_exercises([str(out)])
    assert [each.id for each in made] == ["ace_1", "ace_1/stub", "ace_2"]
    assert made[1].prompt == (
        "Please complete the following problem:\n"
        '```\ndef f(n):\n    """\n    Double the number, variant 1.\n    """\n```\n'
    )
    assert made[0].prompt == "Double the number, variant 1.\nTest cases: assert f(2) == 4"
    assert made[0].tests == made[1].tests == ("assert f(2) == 4",)
    assert (report["rows"], report["exercises"], report["left_out"]) == (11, 3, {"not hard by pass rates": 9})
    assert report_of(out) == report
    prepare("acecode", out, PrepareSettings(data=data, spread="paper", stubs=False), {})
    assert [each.id for each in read_exercises([str(out)])] == ["ace_1"]


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
    prepare("acecode", out, PrepareSettings(data=data, difficulty="all"), {})
    assert "def best(n):" in read_exercises([str(out)])[1].prompt


def test_acecode_rows_without_the_two_models_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = {**ace(1, "Q.", (0, 0)), "inferences": [{"model_name": "x", "completion": "", "pass_rate": 1}]}
    torn = {**ace(1, "Q.", (0, 0)), "inferences": [{"model_name": "x"}]}
    data = write(tmp_path / "ace.jsonl", [bare, ace(0, "Q.", (0.0, 1.0)), torn])
    prepare("acecode", tmp_path / "out.jsonl", PrepareSettings(data=data), {})
    assert "skipped 2 of 3 records; the first: " in (said := capsys.readouterr().err)
    assert "ace.jsonl:1: has no answer of qwen_coder_2.5 or llama3_instruct" in said


# ---- MBPP ----


def test_mbpp_leaves_out_what_mbpp_plus_has(shared: Path, tmp_path: Path) -> None:
    out = tmp_path / "mbpp.jsonl"
    report = prepare("mbpp", out, PrepareSettings(data=str(shared / "data")), {})
    lines = gzip.decompress((shared / "data/MbppPlus.jsonl.gz").read_bytes()).decode().splitlines()
    plus = {json.loads(line)["task_id"].replace("Mbpp", "mbpp") for line in lines}
    made = read_exercises([str(out)])
    assert plus.isdisjoint(each.id for each in made)
    assert all(511 <= int(each.id.removeprefix("mbpp/")) <= 974 for each in made)
    assert (report["rows"], len(made)) == (464, 310)
    assert report["left_out"] == {"stands in MBPP+": 153, "needs code before its tests": 1}


def test_mbpp_without_mbpp_plus_is_refused(tmp_path: Path) -> None:
    row = {"task_id": 601, "text": "Add.", "code": "", "test_list": ["assert f()"], "test_setup_code": ""}
    data = write(tmp_path / "Mbpp-TrainVal.jsonl", [row])
    with pytest.raises(ConfigError, match=r"MbppPlus.* is in neither --data nor --benchmarks; put it there"):
        prepare("mbpp", tmp_path / "out.jsonl", PrepareSettings(data=data), {})
    write(tmp_path / "MbppPlus.jsonl", [{"task_id": "Mbpp/2"}])
    assert prepare("mbpp", tmp_path / "out.jsonl", PrepareSettings(data=data), {})["exercises"] == 1


# ---- benchmarks are kept out ----

TASK = HeldOut(
    "Bench/7",
    "spread",
    'def spread(xs):\n    """ Return the difference between the largest and the smallest of all the given numbers.\n'
    '    >>> spread([1, 5])\n    4\n    """\n',
    'def spread(xs):\n    """Text."""\n    low = min(xs)  # first\n    return max(xs) - low\n',
    "def check(candidate):\n    assert candidate([1, 9]) == 8\n    assert candidate(make()) == 8\n",
    (([3, 3], 2), (float("nan"),)),
)


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
    found = Overlaps({"bench": [TASK], "empty": []}).find(Exercise("x", prompt, ("assert f(0)", test)), solution)
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
    report = prepare(source, out, PrepareSettings(), {"bench": [TASK], "second": [TASK], "third": []})
    assert [each.id for each in read_exercises([str(out)])] == ["clean", "other"]
    assert report["overlaps"] == {"bench": 1, "second": 1, "third": 0}
    shared = "Bench/7: call: spread([1, 9])"
    assert report_of(out)["dropped"] == [{"id": "leak", "overlaps": {"bench": shared, "second": shared}}]
    prepare(source, out, PrepareSettings(limit=1), {"bench": [TASK]})
    assert [each.id for each in read_exercises([str(out)])] == ["clean"]


def test_the_command_line_keeps_a_benchmarks_tasks_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = load("tiny")[7]
    rows = [
        {"id": "clean", "prompt": "Add one.", "tests": ["assert add(1) == 2"]},
        {"id": "leak", "prompt": task.request, "tests": ["assert add(1) == 2"]},
        {"id": "tests", "prompt": "Do.", "tests": list(task.asserts)},
    ]
    source, out = write(tmp_path / "mine.jsonl", rows), tmp_path / "out.jsonl"
    monkeypatch.setattr(sys, "argv", ["diffucoder", "prepare", source, str(out), "--against", "tiny", "--no-stubs"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert [each.id for each in read_exercises([str(out)])] == ["clean"]
    said = capsys.readouterr().out
    assert "1 exercise of 3 rows\n  overlaps      2   tiny\n  dropped: leak, tests\n" in said
    assert report_of(out)["settings"]["stubs"] is False


def test_a_source_is_not_written_over(tmp_path: Path) -> None:
    source = write(tmp_path / "mine.jsonl", [{"id": "1", "prompt": "Add.", "tests": ["assert add(1) == 2"]}])
    (tmp_path / "same.jsonl").symlink_to(source)
    before = Path(source).read_bytes()
    for out in (Path(source), tmp_path / "same.jsonl"):
        with pytest.raises(ConfigError, match=r"OUT='.*' is what is read; name another file"):
            prepare(source, out, PrepareSettings(), {})
    data = write(tmp_path / "ace.jsonl", [ace(0, "Q.", (0.0, 1.0))])
    with pytest.raises(ConfigError, match="is what is read"):
        prepare("acecode", Path(data), PrepareSettings(data=data), {})
    assert Path(source).read_bytes() == before


def test_an_exercise_with_a_test_that_is_no_python_is_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        {"id": "good", "prompt": "Add one.", "tests": ["assert add(1) == 2"]},
        {"id": "torn", "prompt": "Add two.", "tests": ["assert add(1) == 3", "nonsense("]},
    ]
    source, out = write(tmp_path / "mine.jsonl", rows), tmp_path / "out.jsonl"
    report = prepare(source, out, PrepareSettings(), {})
    assert [each.id for each in read_exercises([str(out)])] == ["good"]
    assert report["left_out"] == {"has a test that is no Python": 1}
    assert summary(report).startswith(f"{source}: 1 exercise of 2 rows\n")


def test_a_seed_shuffles_always_the_same_way(tmp_path: Path) -> None:
    rows = [{"id": str(at), "prompt": f"Add {at}.", "tests": ["assert f(1)"]} for at in range(50)]
    source, out = write(tmp_path / "mine.jsonl", rows), tmp_path / "out.jsonl"

    def ids(**settings: Any) -> list[str]:
        prepare(source, out, PrepareSettings(**settings), {})
        return [each.id for each in read_exercises([str(out)])]

    assert ids() == [str(at) for at in range(50)]
    assert ids(seed=1) == ids(seed=1) != ids(seed=2)
    assert ids(seed=1, limit=5) == ids(seed=1)[:5]


def test_what_means_nothing_is_refused(tmp_path: Path) -> None:
    row = {"id": "leak", "prompt": "Compute a range.", "tests": ["assert spread([1, 9]) == 8"]}
    source, out = write(tmp_path / "mine.jsonl", [row]), tmp_path / "out.jsonl"
    for settings, reason in [
        (PrepareSettings(spread="paper"), "spread='paper' is for acecode alone"),
        (PrepareSettings(difficulty="all"), "difficulty='all' is for acecode alone"),
        (PrepareSettings(data="x"), "data='x' is for a named source"),
        (PrepareSettings(), "no exercise of .* is left: 1 overlap a benchmark; give other data"),
    ]:
        with pytest.raises(ConfigError, match=reason):
            prepare(source, out, settings, {"bench": [TASK]})
    with pytest.raises(ConfigError, match=r"is no \.jsonl file"):
        prepare(source, tmp_path / "out.json", PrepareSettings(), {})
    with pytest.raises(ConfigError, match=r"has no codeio\.jsonl\.gz; put it there"):
        prepare("reasoning-gym", out, PrepareSettings(data=str(tmp_path)), {})
    assert not out.exists()


# ---- programs with generators ----

INTEGERS = "def generate_inputs(rng: Random) -> dict:\n    return {'n': rng.randint(0, 10**6), 'k': (1,)}\n"
PROGRAMS = {
    "import math\ndef main_solution(n, k=(1,)):\n    return {'n': [n], 'k': k, 's': {n % 3, None}}": "",
    "def main_solution(n, k):\n    return n / 7": "",
    "def main_solution(n, k):\n    k = n % 16\n    return [0.1 + 0.2 * n]": "gives unrounded numbers in a container",
    "def main_solution(n, k):\n    return [round(n / 7, 2)]": "",
    "import random\ndef main_solution(n, k):\n    return random.random()": "two runs differ",
    "calls = []\ndef main_solution(n, k):\n    calls.append(n)\n    return n + len(calls)": "two runs differ",
    "def main_solution(n, k):\n    return Random(n).random()": "fails its own tests",  # Random is the generator's
    "def main_solution(n, k):\n    return n // 0": "fails",
    "import os\ndef main_solution(n, k):\n    os.kill(os.getpid(), 9)": "breaks a limit",
    "def main_solution(n, k):\n    return 1 +": "fails",
    "import no_such_package\ndef main_solution(n, k):\n    return n": "needs a package",
    "def main_solution(n, k):\n    while True: pass": "runs too long",
    "def main_solution(n, k):\n    return object": "gives no plain data",
    "def main_solution(n, k):\n    return [float('inf')]": "gives no plain data",
    "def main_solution(n, k):\n    return True": "gives one answer to all inputs",
    "def main_solution(n, k):\n    return 'x' * (3000 + n % 100)": "has too few inputs of readable size",
}


@pytest.fixture(scope="module")
def sandbox() -> Iterable[Sandbox]:
    try:
        isolation()
    except SandboxError as error:
        pytest.skip(str(error))
    with Sandbox(1) as box:
        yield box


def made_of(programs: Iterable[str], sandbox: Sandbox, generator: str = INTEGERS) -> list[Any]:
    rows = [codeio.Program(f"codeio/{at}", "Do.", "Input: n", code, generator) for at, code in enumerate(programs)]
    return list(codeio.exercises(rows, sandbox))


def test_programs_become_tests_or_are_left_out_for_a_reason(sandbox: Sandbox) -> None:
    made = made_of(PROGRAMS, sandbox)
    assert [each.why if isinstance(each, Skipped) else "" for each in made] == list(PROGRAMS.values())
    for exercise, solution in (each for each in made if not isinstance(each, Skipped)):
        assert len(exercise.tests) == 8
        assert all(parse(test) for test in exercise.tests)
        assert grade(solution, exercise.tests, sandbox=sandbox).passed
        assert not grade("def main_solution(n, k):\n    return n", exercise.tests, sandbox=sandbox).passed
    first, _ = made[0]
    assert first.prompt == "Do.\n\nInput: n\n\nWrite a Python function `main_solution(n, k=(1,))`."
    assert first.tests[0].startswith("assert main_solution(n=885440, k=(1,)) == {'n': [885440], 'k': (1,), 's': {")


def test_rare_answers_are_among_the_tests(sandbox: Sandbox) -> None:
    right = [Random(seed).randint(0, 10**6) % 3 == 0 for seed in range(16)]
    assert sum(right) == 3  # of 16; 8 tests taken as they come would have fewer
    assert sum(right[:8]) < 3
    ((exercise, _),) = made_of(["def main_solution(n, k):\n    return n % 3 == 0"], sandbox)
    assert sum(test.endswith("True") for test in exercise.tests) == 3


def test_inputs_that_differ_between_runs_or_have_no_names_are_no_use(sandbox: Sandbox) -> None:
    program = ["def main_solution(n):\n    return n"]
    wild = "import random\ndef generate_inputs(rng):\n    return {'n': random.random()}"
    assert [each.why for each in made_of(program, sandbox, wild)] == ["two runs differ"]
    nameless = "def generate_inputs(rng):\n    return {rng.random(): 1}"
    assert [each.why for each in made_of(["def main_solution(**n):\n    return n"], sandbox, nameless)] == ["fails"]
    few = "def generate_inputs(rng):\n    return {'n': rng.randint(0, 1)}"
    assert [each.why for each in made_of(program, sandbox, few)] == ["has too few inputs of readable size"]


def test_a_programs_argument_that_it_changes_is_told_as_it_was(sandbox: Sandbox) -> None:
    lists = "def generate_inputs(rng):\n    return {'n': [rng.randint(0, 9), 7]}"
    ((exercise, _),) = made_of(["def main_solution(n):\n    return n.pop(0)"], sandbox, lists)
    assert all(", 7]) ==" in test for test in exercise.tests)


def test_reasoning_gym_is_read_as_it_is_published(sandbox: Sandbox, tmp_path: Path) -> None:
    names = ("task_description", "input_output_spec", "code_sample", "input_generator")
    rows = [dict(zip(names, ("Do.", "Input: n", code, INTEGERS), strict=True)) for code in list(PROGRAMS)[:8]]
    packed = tmp_path / codeio.FILE
    packed.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    out = tmp_path / "out.jsonl"
    report = prepare("reasoning-gym", out, PrepareSettings(data=str(tmp_path)), {})
    assert [each.id for each in read_exercises([str(out)])] == ["codeio/1", "codeio/2", "codeio/4"]
    assert report["left_out"] == {
        "two runs differ": 2,
        "gives unrounded numbers in a container": 1,
        "fails its own tests": 1,
        "fails": 1,
    }


def test_literals_are_the_same_everywhere_and_nothing_else_passes_for_one() -> None:
    value = {"a": [1, (2,), ()], (True, None): {b"x", 3.5}, "s": set(), "c": -0.0}
    assert codeio.literal(value) == "{'a': [1, (2,), ()], (True, None): {3.5, b'x'}, 's': set(), 'c': -0.0}"
    for bad in (math.inf, math.nan, object(), [object], 1j, frozenset((1,)), 10**5000):
        with pytest.raises(ValueError):
            codeio.literal(bad)
