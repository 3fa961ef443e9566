"""The laboratory: the paper's first three stages at the size of a laptop, from a parent to a tuned model.

    python recipes/tiny/lab.py lab                  # parent -> adaptation -> mid-training -> instruction tuning
    python recipes/tiny/lab.py lab --ablations      # adaptation against its alternatives, from the same parent
    python recipes/tiny/lab.py tiny --processes 2   # the shipped model

Every stage is a `diffucoder` command, which is printed. You can stop the laboratory at any moment and call it again to
go on. Budgets are in budgets.toml, the stages' settings in the files beside it. The reports go to docs/lab.md,
docs/lab_ablations.md and docs/lab_tiny.md, those of `quick` to the run folder.
"""

import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.append(str(Path(__file__).parents[2]))

from recipes.report import drawing, provenance, table, update_page
from recipes.runner import ROOT, TRAIN, RunFolder

HERE = Path(__file__).parent
BUDGETS = tomllib.loads((HERE / "budgets.toml").read_text(encoding="utf-8"))
ARMS = {
    "adapt": "from the parent, attention annealed, rows shifted",
    "abrupt": "from the parent, full attention at once",
    "unshifted": "from the parent, rows not shifted",
    "nothing": "from nothing, equal tokens",
    "nothing-twice": "from nothing, twice the tokens",
}
HELD_OUT = {"corpus": "held_out_clean", "clean": "held_out_clean", "chat": "held_out_chat"}  # beside each file of data
COLUMNS = ("steps", "M tokens", "held-out loss")


class Lab:
    """The run folder and the settings of one budget."""

    def __init__(self, name: str, folder: Path, processes: int) -> None:
        self.name = name
        self.budget: dict[str, Any] = BUDGETS[name]
        self.runs = RunFolder(folder, processes=processes)
        self.data = folder / "data"
        self.runs.run([HERE / "data.py", "training", self.data, "--problems", self.budget["problems"]])

    def train(self, name: str, stage: str, recipe: str, data: str, **settings: Any) -> Path:
        """Train on `data` (corpus, clean or chat) by a recipe, the budget and `settings`; return the model."""
        values = {
            "data": [str(self.data / f"{data}.jsonl")],
            "held_out": [str(self.data / f"{HELD_OUT[data]}.jsonl")],
            "cache": self.runs.folder / "cache",
            **self.budget.get(recipe, {}),
            **settings,
        }
        return self.runs.train(name, (*TRAIN, stage), HERE / f"{recipe}.toml", values)

    def parent(self, name: str = "parent", **settings: Any) -> Path:
        return self.train(name, "pretrain", "parent", "corpus", tokenizer=self.data / "tokenizer", **settings)

    def adapt(self, name: str, start: Path, **settings: Any) -> Path:
        return self.train(name, "adapt", "adapt", "corpus", model=start, **settings)

    def solve(self, name: str, model: Path, *options: str) -> dict[str, Any]:
        count = str(self.budget["solve"])
        return self.runs.solve(name, model, ["--split", "dev", "--count", count, "--steps", "64,32", *options])

    def curve(self, name: str) -> list[tuple[int, float, float]]:
        """Step, million tokens and held-out loss of a run, wherever it was measured."""
        points = []
        tokens = 0.0
        for line in self.runs.metrics(name):
            tokens += line["tokens"] / 1e6
            if "held_out_loss" in line:
                points.append((line["step"], tokens, line["held_out_loss"]))
        return points

    def cells(self, name: str) -> list[str]:
        """Steps, tokens and held-out loss at the end of a run."""
        step, tokens, loss = self.curve(name)[-1]
        return [str(step), f"{tokens:.2f}", f"{loss:.4f}"]


def main(
    budget: Annotated[str, typer.Argument(help="a table of budgets.toml: tiny, lab or quick")],
    folder: Annotated[Path | None, typer.Option(help="run folder; default runs/tiny-BUDGET")] = None,
    processes: Annotated[int, typer.Option(help="training processes; several need as many cores")] = 1,
    ablations: Annotated[bool, typer.Option("--ablations", help="compare adaptation with its alternatives")] = False,
) -> None:
    """Run the laboratory, or go on with it, and write its report."""
    if budget not in BUDGETS:
        raise typer.BadParameter(f"budget {budget!r} is not in budgets.toml; use one of {', '.join(BUDGETS)}")
    name = "tiny" if budget == "tiny" else f"tiny-{budget}"
    lab = Lab(budget, folder or ROOT / "runs" / name, processes)
    parent = lab.parent()
    if ablations:
        compare_arms(lab, parent)
    else:
        run_chain(lab, parent)


def run_chain(lab: Lab, parent: Path) -> None:
    """Train every stage, and report what each took and solves."""
    adapted = lab.adapt("adapt", lab.runs.convert(parent, "start"))
    middle = lab.train("mid", "adapt", "mid", "clean", model=adapted)
    tuned = lab.train("sft", "sft", "sft", "chat", model=middle)
    solved = {
        "parent": lab.solve("parent", parent, "--base", "--causal"),  # a token a step, whatever the number
        "adapt": lab.solve("adapt", adapted, "--base"),
        "mid": lab.solve("mid", middle, "--base"),
        "sft": lab.solve("sft", tuned),
    }
    rows = {}
    for name, figures in solved.items():
        shares = [f"{figures[steps]['share']:.1%}" for steps in ("64", "32")]
        rows[name] = [name, *lab.cells(name), *shares]
    write_report(lab, "lab", "stages", ["stage", *COLUMNS, "pass@1, 64 steps", "32 steps"], rows)


def compare_arms(lab: Lab, parent: Path) -> None:
    """Adaptation against its alternatives: the same data and settings, except what an arm's name says."""
    start = lab.runs.convert(parent, "start")
    nothing = lab.runs.convert(lab.parent("fresh", steps=0, seed=9), "fresh-start")
    steps = lab.budget["adapt"]["steps"]
    lab.adapt("adapt", start)
    lab.adapt("abrupt", start, anneal_steps=0)
    lab.adapt("unshifted", start, shifted=False)
    lab.adapt("nothing", nothing, anneal_steps=0)
    lab.adapt("nothing-twice", nothing, anneal_steps=0, steps=2 * steps)
    rows = {}
    for name, description in ARMS.items():
        rows[name] = [f"{name}: {description}", *lab.cells(name)]
    write_report(lab, "lab_ablations", "ablations", ["arm", *COLUMNS], rows, " --ablations")


def write_report(
    lab: Lab, page: str, figure: str, head: list[str], rows: Mapping[str, list[str]], options: str = ""
) -> None:
    """Update a page in docs/ (of `quick`: in the run folder), and draw the held-out loss of each run."""
    folder = lab.runs.folder if lab.name == "quick" else ROOT / "docs"
    suffix = "_tiny" if lab.name == "tiny" else ""
    with drawing(folder / "lab" / f"{figure}{suffix}.svg") as axes:
        for name in rows:
            _, tokens, losses = zip(*lab.curve(name), strict=True)
            axes.plot(tokens, losses, marker=".", label=name)
        axes.set(xlabel="tokens seen (millions)", ylabel="held-out loss (nats per token)", yscale="log")
        axes.legend()
    workers = f"training processes: {lab.runs.processes}, threads: {torch.get_num_threads()}"
    run = provenance(f"python recipes/tiny/lab.py {lab.name}{options}", workers)
    update_page(folder / f"{page}{suffix}.md", {"run": run, "table": table(head, list(rows.values()))})


if __name__ == "__main__":
    typer.run(main)
