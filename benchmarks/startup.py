"""How long the command line takes to start: median seconds of five runs in turn.

python benchmarks/startup.py [FOLDER ...]      checkouts to compare, such as worktrees; this one if none is given
"""

import os
import pty
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

CLI = ("-c", "from diffucoder.cli import main; main()")
REQUEST = "Write a function that reverses the string."
PROGRAMS = {
    "diffucoder --help": (*CLI, "--help"),
    "from diffucoder import DiffuCoder": ("-c", "from diffucoder import DiffuCoder"),
    "import torch, for comparison": ("-c", "import torch"),
    "generate: first output on a terminal": (*CLI, "generate", REQUEST),
    "generate: in total": (*CLI, "generate", REQUEST),
}


def seconds(folder: Path, program: tuple[str, ...], *, first: bool) -> tuple[float, float]:
    """How long a program takes to end, or to its `first` output: by the clock, and of a processor until its end."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    ours, theirs = pty.openpty()
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *program], env=environment, stdout=theirs, stderr=theirs)
    if first:
        os.read(ours, 1)
        taken = time.perf_counter() - start
        process.kill()
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0
    if not first:
        taken = time.perf_counter() - start
    os.close(ours)
    os.close(theirs)
    return taken, usage.ru_utime + usage.ru_stime


def main() -> None:
    folders = [Path(name).resolve() for name in sys.argv[1:]] or [Path(__file__).resolve().parents[1]]
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    print(f"{processor and processor[1]}, {os.cpu_count()} cores; load {os.getloadavg()[0]:.1f}\n")
    print("| seconds by the clock (of a processor) |", *(f"{folder.name} |" for folder in folders))
    print("| --- |", *("--: |" for _ in folders))
    for name, program in PROGRAMS.items():
        times: dict[Path, list[tuple[float, float]]] = {folder: [] for folder in folders}
        for folder in folders * 6:
            times[folder].append(seconds(folder, program, first="first" in name))
        cells = []
        for folder in folders:
            clock, processor_time = map(
                statistics.median, zip(*times[folder][1:], strict=True)
            )  # the first fills caches
            cells.append(f"{clock:.2f} ({processor_time:.2f}) |")
        print(f"| `{name}` |", *cells, flush=True)


if __name__ == "__main__":
    main()
