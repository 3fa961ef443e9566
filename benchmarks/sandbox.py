"""How many programs a second the sandbox runs, warm and cold, and how long a graded benchmark takes.

    python benchmarks/sandbox.py                            # seconds
    python benchmarks/sandbox.py --data FOLDER --samples F  # and HumanEval+ graded, a sample a task (a minute)

Warm: a pool of workers that are there already, as in grading. Cold: a new bubblewrap and interpreter for every program.
The ceiling beside them is what starting a bare interpreter of the same kind takes here, without any isolation.
The table goes to benchmarks/results/sandbox.md.
"""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from diffucoder.evaluation.benchmarks import load
from diffucoder.evaluation.judge import grade_samples
from diffucoder.evaluation.samples import read_samples
from diffucoder.grading.grade import grade
from diffucoder.grading.sandbox import Sandbox, isolation, run

RESULTS = Path(__file__).parent / "results" / "sandbox.md"
GOOD, TESTS = (
    "def add(a, b):\n    return a + b\n",
    ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(2, 2) == 4"],
)


def main(
    programs: Annotated[int, typer.Option(help="of each kind", min=10)] = 1000,
    workers: Annotated[int, typer.Option(help="programs at a time; 0: one a core", min=0)] = 0,
    data: Annotated[Path | None, typer.Option(help="folder with HumanEvalPlus.jsonl.gz")] = None,
    samples: Annotated[Path | None, typer.Option(help="samples of it, JSONL")] = None,
    output: Annotated[Path, typer.Option(help="file of the table")] = RESULTS,
) -> None:
    isolation()
    with Sandbox(workers or None) as box:
        list(box.run_many(["pass"] * 4 * box.workers))  # the workers start
        few = max(10, programs // 10)
        rows = [
            row("trivial program, warm", programs, box.workers, lambda _: box.run("pass")),
            row("three asserts graded, warm", programs, box.workers, lambda _: grade(GOOD, TESTS, sandbox=box)),
            row("trivial program, cold", few, box.workers, lambda _: run("pass")),
            row("bare interpreter, no sandbox", few, box.workers, bare),
        ]
        if data and samples:
            rows.append(graded(box, data, samples))
        count = box.workers
    head = [
        "# Programs a second",
        f"`python benchmarks/sandbox.py`, {time.strftime('%Y-%m-%d')}, commit {commit()}; {os.cpu_count()} CPUs "
        f"{platform.machine()}, Linux {platform.release()}, Python {platform.python_version()}; {count} at a time.",
        "Programs run at the lowest priority: beside a busy process they are slower, and do not slow it.",
        "| what | runs | seconds | a second | median latency |\n| --- | --: | --: | --: | --: |\n" + "\n".join(rows),
    ]
    output.write_text("\n\n".join(head) + "\n", encoding="utf-8")
    print("\n".join(rows), f"\nwritten to {output}")


def row(what: str, count: int, workers: int, work: Callable[[int], object]) -> str:
    def timed(index: int) -> float:
        begin = time.perf_counter()
        work(index)
        return time.perf_counter() - begin

    began = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        latencies = list(pool.map(timed, range(count)))
    seconds = time.perf_counter() - began
    return f"| {what} | {count} | {seconds:.1f} | **{count / seconds:.0f}** | {median(latencies) * 1e3:.1f} ms |"


def bare(_: int) -> object:
    return subprocess.run(["/usr/bin/python3", "-I", "-S", "-c", "pass"], check=True)


def graded(box: Sandbox, data: Path, path: Path) -> str:
    tasks = load("humaneval+", data)
    samples = read_samples(path, tasks)
    grade_samples(tasks, samples, box)  # the results of the published solutions are in the cache afterwards
    began = time.perf_counter()
    grade_samples(tasks, samples, box)
    seconds = time.perf_counter() - began
    return f"| HumanEval+ sample graded | {len(samples)} | {seconds:.1f} | **{len(samples) / seconds:.1f}** | |"


def commit() -> str:
    asked = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    return subprocess.run(asked, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()


if __name__ == "__main__":
    typer.run(main)
