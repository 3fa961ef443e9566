"""Run the commands of a laboratory as processes, in one folder, so that it can be stopped and go on.

For: the laboratories in recipes/. Not for: what a laboratory compares (its own script), or its tables (report.py).
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffucoder.files import append_jsonl, read_whole_lines

ROOT = Path(__file__).parents[1]
TRAIN = ("-m", "diffucoder.cli", "train")


class RunFolder:
    """Commands that fill one folder. A command whose result exists is left out, so a stopped laboratory can go on."""

    def __init__(self, folder: Path, *, processes: int = 1, threads: int | None = None) -> None:
        self.folder = folder
        self.processes = processes  # of training
        self.threads = threads  # of each process; None: torch decides
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, command: Sequence[object], *, processes: int = 1) -> None:
        """Print and run a Python command, and record its minutes. Raises SystemExit with the status of a failure."""
        launcher = [sys.executable]
        if processes > 1:
            config = str(ROOT / "recipes/accelerate/ddp.yaml")
            launcher += ["-m", "accelerate.commands.launch", "--config_file", config]
            launcher += ["--num_processes", str(processes)]
        words = [*launcher, *map(str, command)]
        environment = dict(os.environ)
        if self.threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        print("$", *words, flush=True)
        began = time.monotonic()
        ended = subprocess.run(words, env=environment)
        if ended.returncode:  # the command has printed why
            raise SystemExit(ended.returncode)
        minutes = round((time.monotonic() - began) / 60, 2)
        append_jsonl(self.folder / "minutes.jsonl", [{"what": name, "minutes": minutes}])

    def train(self, name: str, program: Sequence[object], recipe: Path, settings: Mapping[str, Any]) -> Path:
        """Run a training program (`TRAIN` and a stage) into the folder `name`, or resume it; return its model."""
        model = self.folder / name / "model"
        if not (model / "tokenizer_config.json").exists():
            command = [*program, recipe, "--resume", "--set", f"run={self.folder / name}"]
            for key, value in settings.items():
                command += ["--set", f"{key}={setting_text(value)}"]
            self.run(name, command, processes=self.processes)
        return model

    def convert(self, source: Path, name: str) -> Path:
        """Run `diffucoder convert`: an autoregressive parent becomes a Dream checkpoint."""
        folder = self.folder / name
        if not (folder / "tokenizer_config.json").exists():
            self.run(name, ["-m", "diffucoder.cli", "convert", source, folder])
        return folder

    def solve(self, name: str, model: str | Path | None, options: Sequence[str]) -> dict[str, Any]:
        """What a model (None: the shipped one) solves of the held-out problems, for each number of steps."""
        path = self.folder / f"{name}.solved.json"
        if not path.exists():
            command = [ROOT / "benchmarks/tiny_accuracy.py", "--figures", path, "--run", self.folder / "answers"]
            self.run(f"{name} solves", [*command, *options, *(["--model", model] if model else [])])
        figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return figures

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """The lines that the training run `name` has logged."""
        return read_whole_lines(self.folder / name / "metrics.jsonl")

    def minutes(self) -> dict[str, float]:
        """What each command took; the sum where it was run more than once."""
        totals: dict[str, float] = {}
        for line in read_whole_lines(self.folder / "minutes.jsonl"):
            totals[line["what"]] = totals.get(line["what"], 0.0) + line["minutes"]
        return totals


def setting_text(value: object) -> str:
    """A value as `--set key=value` reads it."""
    return json.dumps(value) if isinstance(value, bool | list) else str(value)
