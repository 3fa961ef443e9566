"""How many programs a second the sandbox runs, warm and cold, and how long a graded benchmark takes.

    python benchmarks/sandbox.py                            # seconds
    python benchmarks/sandbox.py --data FOLDER --samples F  # and HumanEval+ graded, a sample a task (a minute)

Warm: a pool of running workers, as in grading. Cold: a new bubblewrap and interpreter for every program. The ceiling
beside them is the start of a bare interpreter of the same kind, without any isolation. The table goes to
benchmarks/results/sandbox.md.
"""

import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from common import RESULTS, commit, machine

from diffucoder.evaluation.benchmarks import load
from diffucoder.evaluation.judge import grade_samples
from diffucoder.evaluation.samples import read_samples
from diffucoder.grading.grade import grade
from diffucoder.grading.sandbox import Sandbox, isolation, run
from recipes.report import provenance, table, update_page

PROGRAM = "def add(a, b):\n    return a + b\n"
TESTS = ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(2, 2) == 4"]


def main(
    programs: Annotated[int, typer.Option(help="programs of each kind", min=10)] = 1000,
    workers: Annotated[int, typer.Option(help="programs at a time; 0: one a core", min=0)] = 0,
    data: Annotated[Path | None, typer.Option(help="folder with HumanEvalPlus.jsonl.gz")] = None,
    samples: Annotated[Path | None, typer.Option(help="samples of it, JSONL")] = None,
    output: Annotated[Path, typer.Option(help="file of the table")] = RESULTS / "sandbox.md",
) -> None:
    """Measure, and write the table."""
    isolation()
    with Sandbox(workers or None) as box:
        list(box.run_many(["pass"] * 4 * box.workers))  # the workers start
        few = max(10, programs // 10)
        rows = [
            measure("trivial program, warm", programs, box.workers, lambda: box.run("pass")),
            measure("three asserts graded, warm", programs, box.workers, lambda: grade(PROGRAM, TESTS, sandbox=box)),
            measure("trivial program, cold", few, box.workers, lambda: run("pass")),
            measure("bare interpreter, no sandbox", few, box.workers, run_bare),
        ]
        if data and samples:
            rows.append(measure_benchmark(box, data, samples))
        details = f"{box.workers} programs at a time"
    sections = {
        "run": provenance("python benchmarks/sandbox.py", commit(), machine(), details),
        "table": table(["what", "runs", "seconds", "a second", "median latency"], rows),
    }
    update_page(output, sections)


def measure(name: str, count: int, workers: int, work: Callable[[], object]) -> list[str]:
    def timed(_: int) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    began = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        latencies = list(pool.map(timed, range(count)))
    seconds = time.perf_counter() - began
    return [name, str(count), f"{seconds:.1f}", f"**{count / seconds:.0f}**", f"{median(latencies) * 1e3:.1f} ms"]


def run_bare() -> object:
    return subprocess.run(["/usr/bin/python3", "-I", "-S", "-c", "pass"], check=True)


def measure_benchmark(box: Sandbox, data: Path, path: Path) -> list[str]:
    tasks = load("humaneval+", data)
    samples = read_samples(path, tasks)
    with tempfile.TemporaryDirectory() as folder:
        grade_samples(tasks, samples, box, cache=Path(folder))  # fills the cache of published solutions
        began = time.perf_counter()
        grade_samples(tasks, samples, box, cache=Path(folder))
        seconds = time.perf_counter() - began
    rate = f"**{len(samples) / seconds:.1f}**"
    return ["HumanEval+ sample graded", str(len(samples)), f"{seconds:.1f}", rate, ""]


if __name__ == "__main__":
    typer.run(main)
