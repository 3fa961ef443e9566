"""How long the command line takes to start: its help, its first output, the imports, and a whole `generate`.

    python benchmarks/startup.py [FOLDER ...]

Each FOLDER is a checkout, such as an earlier commit in a worktree; this one if none is given. All are measured in one
run, in turn, so that other work on the machine falls on all of them. Prints a table of medians in seconds.
"""

import argparse
import os
import pty
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import machine

REPEATS = 5
PROMPT = "Write a function that reverses the string."


def command(folder: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """The command line of a checkout, and its environment."""
    return [sys.executable, *arguments], {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def seconds_of(folder: Path, *arguments: str) -> float:
    """How long a process runs."""
    words, environment = command(folder, *arguments)
    start = time.perf_counter()
    subprocess.run(words, env=environment, check=True, capture_output=True)
    return time.perf_counter() - start


def first_output(folder: Path) -> float:
    """How long `generate` takes to write anything to a terminal."""
    words, environment = command(folder, "-m", "diffucoder", "generate", PROMPT)
    ours, theirs = pty.openpty()
    start = time.perf_counter()
    with subprocess.Popen(words, env=environment, stdout=theirs, stderr=theirs) as process:
        os.read(ours, 1)
        seconds = time.perf_counter() - start
        process.kill()
    os.close(ours)
    os.close(theirs)
    return seconds


MEASURED = {
    "`diffucoder --help`": lambda folder: seconds_of(folder, "-m", "diffucoder", "--help"),
    "`diffucoder generate --help`": lambda folder: seconds_of(folder, "-m", "diffucoder", "generate", "--help"),
    "`generate`: first output on a terminal": first_output,
    "`from diffucoder import DiffuCoder`": lambda folder: seconds_of(folder, "-c", "from diffucoder import DiffuCoder"),
    "`import torch` alone": lambda folder: seconds_of(folder, "-c", "import torch"),
    "`generate` in total": lambda folder: seconds_of(folder, "-m", "diffucoder", "generate", PROMPT),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path(__file__).parents[1]], metavar="FOLDER")
    folders = [folder.resolve() for folder in parser.parse_args().folders]
    load = os.getloadavg()[0]
    print(f"{machine()}; one thread, load {load:.1f} at the start; seconds, medians of {REPEATS}\n")
    print(f"| |{'|'.join(f' {folder.name} ' for folder in folders)}|")
    print("| --- |" + " --: |" * len(folders))
    for name, measure in MEASURED.items():
        times: dict[Path, list[float]] = {folder: [] for folder in folders}
        for folder in folders * (REPEATS + 1):
            times[folder].append(measure(folder))
        medians = [statistics.median(times[folder][1:]) for folder in folders]  # the first fills the file cache
        print(f"| {name} |{'|'.join(f' {median:.2f} ' for median in medians)}|", flush=True)


if __name__ == "__main__":
    main()
