"""Run the commands of a laboratory as processes, in one folder, so that it can be stopped and go on."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffucoder.files import read_whole_lines

ROOT = Path(__file__).parents[1]
TRAIN = ("-m", "diffucoder.cli", "train")


class RunFolder:
    """Commands that fill one folder. A command whose result exists is left out, so a stopped laboratory can go on."""

    def __init__(self, folder: Path, *, processes: int = 1) -> None:
        self.folder = folder
        self.processes = processes  # of training
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, command: Sequence[object], *, processes: int = 1) -> None:
        """Print and run a Python command. Raises SystemExit with the status of a failure."""
        launcher = [sys.executable]
        if processes > 1:
            config = str(ROOT / "recipes/accelerate/ddp.yaml")
            launcher += ["-m", "accelerate.commands.launch", "--config_file", config]
            launcher += ["--num_processes", str(processes)]
        words = [*launcher, *map(str, command)]
        print("$", *words, flush=True)
        ended = subprocess.run(words)
        if ended.returncode:  # the command has printed why
            raise SystemExit(ended.returncode)

    def train(self, name: str, program: Sequence[object], recipe: Path, settings: Mapping[str, Any]) -> Path:
        """Run a training program (`TRAIN` and a stage) into the folder `name`, or resume it; return its model."""
        model = self.folder / name / "model"
        if not (model / "tokenizer_config.json").exists():
            command = [*program, recipe, "--resume", "--set", f"run={self.folder / name}"]
            for key, value in settings.items():
                command += ["--set", f"{key}={setting_text(value)}"]
            self.run(command, processes=self.processes)
        return model

    def convert(self, source: Path, name: str) -> Path:
        """Run `diffucoder convert`: an autoregressive parent becomes a Dream checkpoint."""
        folder = self.folder / name
        if not (folder / "tokenizer_config.json").exists():
            self.run(["-m", "diffucoder.cli", "convert", source, folder])
        return folder

    def solve(self, name: str, model: str | Path | None, options: Sequence[str]) -> dict[str, Any]:
        """What a model (None: the shipped one) solves of the held-out problems, for each number of steps."""
        path = self.folder / f"{name}.solved.json"
        if not path.exists():
            command = [ROOT / "benchmarks/tiny_accuracy.py", "--figures", path, *options]
            self.run([*command, *(["--model", model] if model else [])])
        figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return figures

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """The lines that the training run `name` has logged."""
        return read_whole_lines(self.folder / name / "metrics.jsonl")


def setting_text(value: object) -> str:
    """A value as `--set key=value` reads it."""
    return json.dumps(value) if isinstance(value, bool | list) else str(value)
