"""Grade published completions, and compare every verdict with the published one.

    python benchmarks/replay.py FOLDER --data FOLDER    # all three benchmarks, minutes

FOLDER holds NAME-samples.jsonl.gz and NAME-results.json.gz, as EvalPlus and BigCodeBench write them. The published
solutions are graded too, and must all pass. Of BigCodeBench those tasks are graded whose imports programs can find in
--packages, by default this environment's own. The table goes to benchmarks/results/replay.md.
"""

import gzip
import json
import sysconfig
import time
from pathlib import Path
from typing import Annotated

import typer
from common import RESULTS

from diffucoder.evaluation.benchmarks import load
from diffucoder.evaluation.judge import grade_samples, split_by_imports
from diffucoder.evaluation.samples import read_samples
from diffucoder.files import Json
from diffucoder.grading.sandbox import Sandbox
from recipes.report import provenance, table, update_page

NAMES = {"humaneval+": "humaneval", "mbpp+": "mbpp", "bigcodebench-hard": "bcb_hard"}
VERDICTS = {"status": "passed", "base_status": "base", "plus_status": "plus"}  # their names, ours
COLUMNS = ("tasks graded", "a second", "verdicts", "equal", "published solutions pass")


def main(
    folder: Annotated[Path, typer.Argument(help="published samples and results")],
    data: Annotated[Path, typer.Option(help="folder of the benchmarks' published files")],
    only: Annotated[str | None, typer.Option(help=f"one of {', '.join(NAMES)}")] = None,
    packages: Annotated[list[Path] | None, typer.Option(help="folder that BigCodeBench's programs import from")] = None,
) -> None:
    """Grade, compare, and write the table and every difference."""
    rows = []
    differences: list[str] = []
    for benchmark in [only] if only else NAMES:
        importable = packages or [Path(sysconfig.get_path("purelib"))]
        with Sandbox(packages=importable if benchmark.startswith("bigcodebench") else ()) as sandbox:
            row, found = replay(benchmark, folder, data, sandbox)
        rows.append(row)
        differences += found
    sections = {
        "run": provenance("python benchmarks/replay.py", f"completions and verdicts of `{folder.name}`"),
        "table": table(["benchmark", *COLUMNS], rows),
        "differences": "\n".join(differences) or "None.",
    }
    update_page(RESULTS / "replay.md", sections)


def replay(benchmark: str, folder: Path, data: Path, sandbox: Sandbox) -> tuple[list[str], list[str]]:
    """The row of a benchmark, and its differences."""
    tasks = load(benchmark, data)
    runnable, _ = split_by_imports(tasks, sandbox)
    ids = {task.task_id for task in runnable}
    path = folder / f"{NAMES[benchmark]}-samples.jsonl.gz"
    samples = [sample for sample in read_samples(path, tasks) if sample["task_id"] in ids]
    solutions = [{"task_id": task.task_id, "sample": 0, "solution": task.canonical} for task in runnable]
    canonical = grade_samples(tasks, solutions, sandbox)  # first: it fills the cache of reference outputs
    published = json.loads(gzip.decompress((folder / f"{NAMES[benchmark]}-results.json.gz").read_bytes()))["eval"]
    began = time.perf_counter()
    verdicts = grade_samples(tasks, samples, sandbox)
    seconds = time.perf_counter() - began
    compared = 0
    differences = []
    for verdict in verdicts:
        theirs = published[verdict["task_id"]][0]
        for kind, ours in VERDICTS.items():
            if kind not in theirs:
                continue
            compared += 1
            passed = theirs[kind] == "pass"
            if passed != bool(verdict[ours]):
                words = "published pass, here fail" if passed else "published fail, here pass"
                differences.append(f"* {benchmark}, {verdict['task_id']} {kind}: {words}. {message_of(verdict)}")
    equal = compared - len(differences)
    for verdict in canonical:
        if not verdict["passed"]:
            differences.append(f"* The published solution of {verdict['task_id']} fails here. {message_of(verdict)}")
    solved = sum([verdict["passed"] for verdict in canonical])
    row = [benchmark, f"{len(verdicts)} of {len(tasks)}", f"{len(verdicts) / seconds:.1f}", str(compared)]
    return [*row, f"{equal} ({equal / compared:.2%})", f"{solved} of {len(canonical)}"], differences


def message_of(verdict: Json) -> str:
    """The beginning of what the grader reports."""
    return " ".join(verdict["detail"][:200].split()).replace("|", "\\|")


if __name__ == "__main__":
    typer.run(main)
