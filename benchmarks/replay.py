"""Grade published completions, and compare every verdict with the published one.

    python benchmarks/replay.py FOLDER --data FOLDER                   # all three benchmarks, minutes
    python benchmarks/replay.py FOLDER --data FOLDER --only humaneval+

FOLDER holds NAME-samples.jsonl.gz and NAME-results.json.gz, as EvalPlus and BigCodeBench write them. The published
solutions are graded too, and must all pass. Of BigCodeBench those tasks are graded whose imports programs can find in
--packages, by default this environment's own. The table goes to benchmarks/results/replay.md.
"""

import gzip
import json
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from common import RESULTS
from rich.console import Console
from rich.progress import track

from diffucoder.evaluation.benchmarks import load
from diffucoder.evaluation.judge import grade_samples, split_by_imports
from diffucoder.evaluation.samples import read_samples
from diffucoder.files import Json
from diffucoder.grading.sandbox import Sandbox
from recipes.report import provenance, table, update_page

KNOWN = {  # investigated one by one
    "Mbpp/579": "The completion returns a set of strings as a tuple, compared in order. The order depends on the "
    "interpreter's hash seed, which was random in the published run and is fixed here.",
    "BigCodeBench/147": "It connects to addresses; there is no network.",
    "BigCodeBench/360": "It needs openpyxl, which pandas imports by name only when it is used.",
    "BigCodeBench/409": "It needs openpyxl, which pandas imports by name only when it is used.",
    "BigCodeBench/503": "It needs pandas 2; DataFrame.applymap is gone from pandas 3.",
    "BigCodeBench/511": "It needs the matplotlib and pandas of its time.",
    "BigCodeBench/1006": "It downloads; there is no network.",
    "BigCodeBench/1012": "It downloads; there is no network.",
    "BigCodeBench/1040": "It listens on a network socket, which the sandbox forbids.",
}
NAMES = {"humaneval+": "humaneval", "mbpp+": "mbpp", "bigcodebench-hard": "bcb_hard"}
VERDICTS = {"status": "passed", "base_status": "base", "plus_status": "plus"}  # their names, ours
COLUMNS = ("tasks graded", "verdicts", "equal", "published totals", "totals here", "published solutions pass")


def main(
    folder: Annotated[Path, typer.Argument(help="published samples and results")],
    data: Annotated[Path, typer.Option(help="folder of the benchmarks' published files")],
    only: Annotated[str | None, typer.Option(help=f"one of {', '.join(NAMES)}")] = None,
    packages: Annotated[list[Path] | None, typer.Option(help="folder that BigCodeBench's programs import from")] = None,
    workers: Annotated[int | None, typer.Option(help="programs at a time; default: one a core")] = None,
    output: Annotated[Path, typer.Option(help="file of the table")] = RESULTS / "replay.md",
) -> None:
    """Grade, compare, and write the table and every difference."""
    rows = []
    differences: list[str] = []
    for benchmark in [only] if only else NAMES:
        importable = packages or [Path(sysconfig.get_path("purelib"))]
        with Sandbox(workers, packages=importable if benchmark.startswith("bigcodebench") else ()) as sandbox:
            row, found = replay(benchmark, folder, data, sandbox)
        rows.append(row)
        differences += found
    sections = {
        "run": provenance("python benchmarks/replay.py", f"completions and verdicts of `{folder.name}`"),
        "table": table(["benchmark", *COLUMNS], rows),
        "differences": "\n".join(differences) or "None.",
    }
    update_page(output, sections)


def replay(benchmark: str, folder: Path, data: Path, sandbox: Sandbox) -> tuple[list[str], list[str]]:
    """The row of a benchmark, and its differences."""
    tasks = load(benchmark, data)
    runnable, _ = split_by_imports(tasks, sandbox)
    ids = {task.task_id for task in runnable}
    name = NAMES[benchmark]
    samples = [each for each in read_samples(folder / f"{name}-samples.jsonl.gz", tasks) if each["task_id"] in ids]
    verdicts = grade_samples(tasks, samples, sandbox, progress=progress)
    solutions = [{"task_id": task.task_id, "sample": 0, "solution": task.canonical} for task in runnable]
    canonical = grade_samples(tasks, solutions, sandbox, progress=progress)
    published = json.loads(gzip.decompress((folder / f"{name}-results.json.gz").read_bytes()))["eval"]
    compared = 0
    differences = []
    base: list[tuple[bool, bool]] = []  # theirs, ours
    overall: list[tuple[bool, bool]] = []
    for verdict in verdicts:
        theirs = published[verdict["task_id"]][0]
        statuses = {kind: theirs[kind] == "pass" for kind in VERDICTS if kind in theirs}
        compared += len(statuses)
        for kind, passed in statuses.items():
            if passed != bool(verdict[VERDICTS[kind]]):
                words = "published pass, here fail" if passed else "published fail, here pass"
                differences.append(f"* {benchmark}, {verdict['task_id']} {kind}: {words}. {reason(verdict)}")
        overall.append((all(statuses.values()), verdict["passed"]))
        if "base_status" in statuses:
            base.append((statuses["base_status"], verdict["base"]))
    equal = compared - len(differences)
    for verdict in canonical:
        if not verdict["passed"]:
            differences.append(f"* The published solution of {verdict['task_id']} fails here. {reason(verdict)}")
    row = [benchmark, f"{len(verdicts)} of {len(tasks)}", str(compared), f"{equal} ({equal / compared:.2%})"]
    shares = np.array([values for values in (base, overall) if values]).mean(axis=1)  # (base and overall, sides)
    for side in shares.T:
        row.append(" / ".join([f"{100 * share:.2f}" for share in side]))
    solved = sum([verdict["passed"] for verdict in canonical])
    return [*row, f"{solved} of {len(canonical)}"], differences


def reason(verdict: Json) -> str:
    """What is known of a task, and the grader's message."""
    message = " ".join(verdict["detail"][:200].split()).replace("|", "\\|")
    known = KNOWN.get(verdict["task_id"], "Unexplained.")
    return f"{known} Message: {message}" if message else known


def progress(items: Iterable[Any], count: int, what: str) -> Iterable[Any]:
    return track(items, what, count, console=Console(stderr=True))


if __name__ == "__main__":
    typer.run(main)
