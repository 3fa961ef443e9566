"""Grade published completions, and compare every verdict with the published one.

    python benchmarks/replay.py FOLDER --data FOLDER                   # all three benchmarks, minutes
    python benchmarks/replay.py FOLDER --data FOLDER --only humaneval+

FOLDER holds NAME-samples.jsonl.gz and NAME-results.json.gz, as EvalPlus and BigCodeBench write them. The published
solutions are graded too, and must all pass. BigCodeBench's tasks are graded whose imports programs can find in
--packages, by default this environment's own. The table goes to benchmarks/results/replay.md.
"""

import gzip
import json
import sysconfig
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from diffucoder.evaluation.benchmarks import Task, load
from diffucoder.evaluation.judge import grade_samples, split_by_imports
from diffucoder.evaluation.samples import read_samples
from diffucoder.files import Json
from diffucoder.grading.sandbox import Sandbox

RESULTS = Path(__file__).parent / "results" / "replay.md"
KNOWN = {  # looked into one by one
    "Mbpp/579": "The completion returns a set of strings as a tuple, compared in order: which order that is depends on "
    "the interpreter's hash seed, random in the published run and fixed here.",
    "BigCodeBench/147": "It connects to addresses; there is no network.",
    "BigCodeBench/360": "It needs openpyxl, which pandas imports by name only when it is used.",
    "BigCodeBench/409": "It needs openpyxl, which pandas imports by name only when it is used.",
    "BigCodeBench/503": "It needs pandas 2; DataFrame.applymap is gone from pandas 3.",
    "BigCodeBench/511": "It needs the matplotlib and pandas of its time.",
    "BigCodeBench/1006": "It downloads; there is no network.",
    "BigCodeBench/1012": "It downloads; there is no network.",
    "BigCodeBench/1040": "It listens on a network socket, which the sandbox refuses.",
}
NAMES = {"humaneval+": "humaneval", "mbpp+": "mbpp", "bigcodebench-hard": "bcb_hard"}


def main(
    folder: Annotated[Path, typer.Argument(help="published samples and results")],
    data: Annotated[Path, typer.Option(help="folder of the benchmarks' published files")],
    only: Annotated[str | None, typer.Option(help=f"one of {', '.join(NAMES)}")] = None,
    packages: Annotated[list[Path] | None, typer.Option(help="folder that BigCodeBench's programs import from")] = None,
    workers: Annotated[int | None, typer.Option(help="programs at a time; one a core if left out")] = None,
    output: Annotated[Path, typer.Option(help="file of the table")] = RESULTS,
) -> None:
    rows, differences = [], []
    for benchmark, name in NAMES.items():
        if only not in (None, benchmark):
            continue
        hard = benchmark.startswith("bigcodebench")
        importable = packages or [Path(sysconfig.get_path("purelib"))]
        with Sandbox(workers, packages=importable if hard else ()) as sandbox:
            began = time.monotonic()
            tasks = load(benchmark, data)
            runnable, _ = split_by_imports(tasks, sandbox)
            known = {task.task_id for task in runnable}
            every = read_samples(folder / f"{name}-samples.jsonl.gz", tasks)
            samples = [sample for sample in every if sample["task_id"] in known]
            verdicts = grade_samples(tasks, samples, sandbox, progress=progress)
            solutions = [{"task_id": task.task_id, "sample": 0, "solution": task.canonical} for task in runnable]
            canonical = grade_samples(tasks, solutions, sandbox, progress=progress)
        published = json.loads(gzip.decompress((folder / f"{name}-results.json.gz").read_bytes()))["eval"]
        compared = list(compare(verdicts, published))
        differ = [each for each in compared if each[1] != each[2]]
        differences += [difference(benchmark, *each) for each in differ]
        failing = [verdict for verdict in canonical if not verdict["passed"]]
        rows.append(row(benchmark, tasks, verdicts, published, len(compared), len(differ), canonical))
        print(rows[-1], f"{time.monotonic() - began:.0f} s; published solutions that fail: {len(failing)}")
        differences += [f"* The published solution of {each['task_id']} fails here. {why(each)}" for each in failing]
    output.write_text(report(rows, differences, folder.name), encoding="utf-8")
    print(*differences, f"written to {output}", sep="\n")


def progress(things: Iterable[Any], count: int, what: str) -> Iterable[Any]:
    return track(things, what, count, console=Console(stderr=True))


def compare(verdicts: Sequence[Json], published: dict[str, Any]) -> Iterable[tuple[str, bool, bool, Json]]:
    """(what, published, ours, our verdict) for every published verdict; `what` is a task, and which of its verdicts."""
    for verdict in verdicts:
        theirs = published[verdict["task_id"]][0]
        for kind, own in (("status", "passed"), ("base_status", "base"), ("plus_status", "plus")):
            if kind in theirs:
                yield f"{verdict['task_id']} {kind}", theirs[kind] == "pass", bool(verdict[own]), verdict


def difference(benchmark: str, what: str, theirs: bool, ours: bool, verdict: Json) -> str:
    words = {True: "pass", False: "fail"}
    return f"* {benchmark}, {what}: published {words[theirs]}, here {words[ours]}. {why(verdict)}"


def why(verdict: Json) -> str:
    """What is known of a task, else nothing, and what the grader said."""
    said = " ".join(verdict["detail"][:200].split()).replace("|", "\\|")
    return f"{KNOWN.get(verdict['task_id'], 'Unexplained.')}{f' Told: {said}' if said else ''}"


def row(
    benchmark: str,
    tasks: Sequence[Task],
    verdicts: Sequence[Json],
    published: dict[str, Any],
    compared: int,
    differ: int,
    canonical: Sequence[Json],
) -> str:
    def share(key: str) -> str:
        return f"{100 * sum(bool(verdict[key]) for verdict in verdicts) / len(verdicts):.2f}"

    graded = [published[verdict["task_id"]][0] for verdict in verdicts]
    passing = [all(value == "pass" for key, value in each.items() if key.endswith("status")) for each in graded]
    base = [each.get("base_status") == "pass" for each in graded]
    theirs = f"{100 * sum(passing) / len(passing):.2f}"
    if any(base):
        totals = f"{100 * sum(base) / len(base):.2f} / {theirs} | {share('base')} / {share('passed')}"
    else:
        totals = f"{theirs} | {share('passed')}"
    solved = sum(verdict["passed"] for verdict in canonical)
    return (
        f"| {benchmark} | {len(verdicts)} of {len(tasks)} | {compared} | {compared - differ} "
        f"({1 - differ / compared:.2%}) | {totals} | {solved} of {len(canonical)} |"
    )


def report(rows: Sequence[str], differences: Sequence[str], name: str) -> str:
    parts = [
        "# Published completions, graded again",
        f"`python benchmarks/replay.py`, {time.strftime('%Y-%m-%d')}: the completions of `{name}` and the published "
        "verdicts on them. Totals are pass@1 in per cent: base / plus where there are both.",
        "| benchmark | tasks graded | verdicts | equal | published totals | totals here | published solutions pass |\n"
        "| --- | --: | --: | --: | --: | --: | --: |\n" + "\n".join(rows),
        "## Every difference",
        "\n".join(differences) or "None.",
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    typer.run(main)
