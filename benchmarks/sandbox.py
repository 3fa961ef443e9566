"""How many programs a second the sandbox runs, warm and cold. `benchmarks/replay.py` times graded benchmarks.

    python benchmarks/sandbox.py    # seconds

Warm: a pool of running workers, as in grading. Cold: a new bubblewrap and interpreter for every program. The ceiling is
the start of a bare interpreter. The table goes to benchmarks/results/sandbox.md.
"""

import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Annotated

import typer
from common import RESULTS, write_page

from diffucoder.grading.grade import grade
from diffucoder.grading.sandbox import Sandbox, run

PROGRAM = "def add(a, b):\n    return a + b\n"
BARE = ["/usr/bin/python3", "-I", "-S", "-c", "pass"]
TESTS = ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(2, 2) == 4"]


def main(
    programs: Annotated[int, typer.Option(help="programs of each kind", min=10)] = 1000,
) -> None:
    """Measure, and write the table."""
    with Sandbox() as box:
        list(box.run_many(["pass"] * 4 * box.workers))  # the workers start
        few = max(10, programs // 10)
        rows = [
            measure("trivial program, warm", programs, box.workers, lambda: box.run("pass")),
            measure("three asserts graded, warm", programs, box.workers, lambda: grade(PROGRAM, TESTS, sandbox=box)),
            measure("trivial program, cold", few, box.workers, lambda: run("pass")),
            measure("bare interpreter, no sandbox", few, box.workers, lambda: subprocess.run(BARE, check=True)),
        ]
        details = (f"{box.workers} programs at a time",)
    head = ["what", "runs", "seconds", "a second", "median latency"]
    write_page(RESULTS / "sandbox.md", "python benchmarks/sandbox.py", details, head, rows)


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


if __name__ == "__main__":
    typer.run(main)
