"""Make exercises for reinforcement learning from published data, without those that overlap a benchmark.

    python recipes/rl_data/prepare.py acecode acecode.jsonl --against humaneval,mbpp
    python recipes/rl_data/prepare.py mbpp mbpp.jsonl --data DATA --benchmarks DATA --against humaneval,mbpp

docs/rl_data.md explains the sources. OUT.report.json lists what was left out and why.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from overlap import Overlaps

from diffucoder.errors import ConfigError, DiffuCoderError, printable
from diffucoder.evaluation.benchmarks import Task, load
from diffucoder.files import Json, write_json
from diffucoder.grading.reading import read_limited
from diffucoder.grading.syntax import all_parse
from diffucoder.training.exercises import Exercise, parse_exercise, read_exercises, tests_of, write_exercises
from diffucoder.training.sources import Skipped, read_usable, text_of

ACECODE = "hub:TIGER-Lab/AceCode-87K"
ACECODE_MODELS = ("qwen_coder_2.5", "llama3_instruct")  # their pass rates say how hard a problem is
SPREADS = {"paper": 60, "released": 40}  # percentile of the standard deviations that a hard problem reaches
STUB = 'Please complete the following problem:\n```\n{}:\n    """\n    {}\n    """\n```\n'
MBPP = ["hub:google-research-datasets/mbpp/full@validation", "hub:google-research-datasets/mbpp/full@train"]
MBPP_PLUS = "hub:evalplus/mbppplus@test"

Benchmarks = Mapping[str, Iterable[Task]]  # by name
Solved = tuple[Exercise, str]  # with a program that solves it, or "" if none is known


def main() -> None:
    parser = argparse.ArgumentParser(description="make exercises that overlap no benchmark")
    parser.add_argument("source", help="acecode, mbpp, or JSONL of prompts with tests")
    parser.add_argument("out", type=Path, help="the .jsonl file to write")
    parser.add_argument("--against", default="", help="benchmarks to keep out, as in humaneval,mbpp,bigcodebench-hard")
    parser.add_argument("--benchmarks", type=Path, help="folder of the benchmarks' files (default: the hub)")
    parser.add_argument("--data", help="acecode: file, mbpp: folder of the published files (default: the hub)")
    parser.add_argument("--spread", choices=SPREADS, default="released", help="acecode (default: released)")
    options = parser.parse_args()
    try:
        benchmarks = {name: load(name, options.benchmarks) for name in options.against.split(",") if name}
        report = prepare(options.source, options.out, benchmarks, data=options.data, spread=options.spread)
    except DiffuCoderError as error:
        sys.exit(f"error: {printable(str(error))}")
    print(f"{report['exercises']:,} exercises; left out {report['left_out']}; overlaps {report['overlaps']}")
    print(f"{options.out}: try: diffucoder train grpo --set 'data=[\"{options.out}\"]'")


def prepare(source: str, out: Path, benchmarks: Benchmarks, data: str | None = None, spread: str = "released") -> Json:
    """Write the exercises of the source that overlap no task, and the report, which is returned."""
    if out.suffix != ".jsonl":
        raise ConfigError(f"OUT='{out}' is not a .jsonl file; name one, as in exercises.jsonl")
    if out.resolve() in (Path(source).resolve(), Path(data or source).resolve()):
        raise ConfigError(f"OUT='{out}' is what is read; name another file")
    overlaps = Overlaps(benchmarks)
    kept = []
    left_out: Counter[str] = Counter()
    dropped = []
    for row in rows_of(source, data, spread):
        if isinstance(row, Skipped):
            left_out[row.reason] += 1
            continue
        exercise, solution = row
        shared = overlaps.find(exercise, solution)
        if not read_limited(all_parse, list(exercise.tests), otherwise=False):
            left_out["has a test that is not Python"] += 1
        elif shared:
            dropped.append({"id": exercise.id, "overlaps": shared})
        else:
            kept.append(exercise)
    hits = Counter(name for drop in dropped for name in drop["overlaps"])
    report = {
        "source": source,
        "exercises": len(kept),
        "left_out": dict(left_out.most_common()),
        "overlaps": {name: hits[name] for name in benchmarks},
        "dropped": dropped,
    }
    if not kept:
        raise ConfigError(f"no exercise of {source!r} is left; give other data. The report: {report}")
    write_exercises(out, kept)
    write_json(out.with_suffix(".report.json"), report)
    return report


def rows_of(source: str, data: str | None, spread: str) -> Iterable[Solved | Skipped]:
    """The exercises of the source, and as `Skipped` those that its own rules leave out."""
    if source == "acecode":
        return acecode(data or ACECODE, spread)
    if source == "mbpp" and data:
        return mbpp([f"{data}/Mbpp-TrainVal.jsonl.gz"], f"{data}/MbppPlus.jsonl.gz")
    if source == "mbpp":
        return mbpp(MBPP, MBPP_PLUS)
    return [(exercise, "") for exercise in read_exercises([source])]


def acecode(file: str, spread: str) -> Iterator[Solved | Skipped]:
    """The hard problems; each, if possible, also as a stub to be completed."""
    rows = read_usable([file], parse_acecode)
    hard = are_hard([rates for _, _, rates in rows], SPREADS[spread])
    for (exercise, best, _), is_hard in zip(rows, hard, strict=True):
        if not is_hard:
            yield Skipped(exercise.id, "not hard by pass rates")
            continue
        yield replace(exercise, prompt=with_test(exercise)), best
        stub = stub_of(exercise.prompt, best)
        if stub:
            yield replace(exercise, id=f"{exercise.id}/stub", prompt=stub), best


def parse_acecode(where: str, fields: Json) -> tuple[Exercise, str, list[float]]:
    """The exercise, the best answer of any model, and the pass rates of ACECODE_MODELS."""
    try:
        best = max(fields["inferences"], key=lambda answer: answer["pass_rate"])["completion"]
        rates = [float(each["pass_rate"]) for each in fields["inferences"] if each["model_name"] in ACECODE_MODELS]
    except (KeyError, TypeError) as error:
        raise ValueError(f"field 'inferences' has no usable {error}") from None
    if not isinstance(best, str):
        raise ValueError("field 'inferences' has a completion that is not text")
    if not rates:
        raise ValueError(f"has no answer of {' or '.join(ACECODE_MODELS)}")
    return replace(parse_exercise(where, fields), source="acecode"), best, rates


def are_hard(pass_rates: Sequence[Sequence[float]], spread: float) -> list[bool]:
    """Which problems have a low mean and a high (population) standard deviation, by percentiles over all problems."""
    means = np.array([np.mean(rates) for rates in pass_rates])
    deviations = np.array([np.std(rates) for rates in pass_rates])
    hard = (means <= np.percentile(means, 20)) & (deviations >= np.percentile(deviations, spread))
    return hard.tolist()


def stub_of(question: str, completion: str) -> str | None:
    """The question as the docstring of a function with the head that `completion` begins with.

    As released: there is none if "you" is in the question (also in "young"), and only its first line is indented.
    """
    head = completion.partition(":\n")[0].strip()
    if "you" in question.lower() or not head.startswith("def "):
        return None
    return STUB.format(head, question)


def with_test(exercise: Exercise) -> str:
    """The question, followed by its first test, which names the function, unless the question shows code."""
    if "\n```\n" in exercise.prompt:
        return exercise.prompt
    return f"{exercise.prompt}\nTest cases: {exercise.tests[0]}"


def mbpp(files: Sequence[str], plus_file: str) -> Iterator[Solved | Skipped]:
    """The problems that are not tasks of MBPP+."""
    plus_ids = set(read_usable([plus_file], lambda where, fields: str(fields.get("task_id")).removeprefix("Mbpp/")))
    for exercise, solution, setup in read_usable(files, parse_mbpp):
        if exercise.id.removeprefix("mbpp/") in plus_ids:
            yield Skipped(exercise.id, "is in MBPP+")
        elif setup:
            yield Skipped(exercise.id, "needs code before its tests")
        else:
            yield exercise, solution


def parse_mbpp(where: str, fields: Json) -> tuple[Exercise, str, str]:
    """The exercise, its solution, and code that its tests need before them."""
    tests = tests_of(fields)
    statement = text_of(fields.get("text"), "field 'text'").strip()
    # as in MBPP's own prompts: one test names the function and shows its arguments
    prompt = f"{statement}\nYour code should pass this test:\n{tests[0]}"
    exercise = Exercise(f"mbpp/{fields.get('task_id')}", prompt, tests, "mbpp")
    return exercise, str(fields.get("code", "")), str(fields.get("test_setup_code", ""))


if __name__ == "__main__":
    main()
