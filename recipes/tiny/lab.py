"""The laboratory: the paper's first three stages at the size of a laptop, from a parent to a tuned model.

    python recipes/tiny/lab.py lab                  # parent -> adaptation -> mid-training -> instruction tuning
    python recipes/tiny/lab.py lab --ablations      # adaptation against its alternatives, from the same parent
    python recipes/tiny/lab.py tiny --processes 2   # the shipped model
    python recipes/tiny/lab.py tiny --parent-only   # only its parent, 15 minutes: for the arm causal of grpo.py

Every stage is a `diffucoder` command, which is printed; you can run each of them by hand. You can stop the laboratory
at any moment and call it again to go on. Budgets are in budgets.toml, the stages' settings in the files beside it. The
reports go to docs/lab.md, docs/lab_ablations.md and docs/lab_tiny.md, those of `quick` to the run folder.
"""

import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.append(str(Path(__file__).parents[2]))

from recipes.report import drawing, provenance, table, update_page
from recipes.runner import ROOT, TRAIN, RunFolder

HERE = Path(__file__).parent
STAGES = ("parent", "adapt", "mid", "sft")
ARMS = {
    "adapt": "from the parent, attention annealed, rows shifted",
    "adapt-half": "as `adapt`, on half the tokens",
    "abrupt": "from the parent, full attention at once",
    "unshifted": "from the parent, rows not shifted",
    "nothing": "from nothing, equal tokens",
    "nothing-twice": "from nothing, twice the tokens",
}
HELD_OUT = {"corpus": "held_out_clean", "clean": "held_out_clean", "chat": "held_out_chat"}  # beside each file of data
COMMON_COMMANDS = ("data", "parent", "start", "fresh", "fresh-start")
COLUMNS = ("steps", "M tokens", "held-out loss")
Curve = list[tuple[float, float]]  # (million tokens, held-out loss)


class Lab:
    """The run folder and the settings of one budget."""

    def __init__(self, name: str, folder: Path, processes: int) -> None:
        budgets = tomllib.loads((HERE / "budgets.toml").read_text(encoding="utf-8"))
        if name not in budgets:
            raise typer.BadParameter(f"budget {name!r} is not in budgets.toml; use one of {', '.join(budgets)}")
        self.name = name
        self.budget: dict[str, Any] = budgets[name]
        self.runs = RunFolder(folder, processes=processes)
        self.data = folder / "data"

    def make_data(self) -> None:
        self.runs.run("data", [HERE / "data.py", "training", self.data, "--problems", self.budget["problems"]])

    def train(self, name: str, stage: str, recipe: str, data: str, **settings: Any) -> Path:
        """Train on `data` (corpus, clean or chat) by a recipe, the budget and `settings`; return the model."""
        held_out = HELD_OUT[data]
        values = {
            "data": [str(self.data / f"{data}.jsonl")],
            "held_out": [str(self.data / f"{held_out}.jsonl")],
            "cache": self.runs.folder / "cache",
            **self.budget.get(recipe, {}),
            **settings,
        }
        return self.runs.train(name, (*TRAIN, stage), HERE / f"{recipe}.toml", values)

    def train_parent(self) -> Path:
        """The autoregressive model that every stage begins with."""
        return self.train("parent", "pretrain", "parent", "corpus", tokenizer=self.data / "tokenizer")

    def solve(self, name: str, model: Path, *options: str, steps: str) -> dict[str, Any]:
        count = str(self.budget["solve"])
        return self.runs.solve(name, model, ["--split", "dev", "--count", count, "--steps", steps, *options])

    def curve(self, name: str) -> Curve:
        """The held-out loss of a run, wherever it was measured."""
        points: Curve = []
        tokens = 0.0
        for line in self.runs.metrics(name):
            tokens += line["tokens"] / 1e6
            if "held_out_loss" in line:
                points.append((tokens, line["held_out_loss"]))
        return points


def main(
    budget: Annotated[str, typer.Argument(help="a table of budgets.toml: tiny, lab or quick")],
    folder: Annotated[Path | None, typer.Option(help="run folder; default runs/tiny-BUDGET")] = None,
    processes: Annotated[int, typer.Option(help="training processes; several need as many cores")] = 1,
    ablations: Annotated[bool, typer.Option("--ablations", help="compare adaptation with its alternatives")] = False,
    parent_only: Annotated[bool, typer.Option("--parent-only", help="train the parent, without a report")] = False,
) -> None:
    """Run the laboratory, or go on with it, and write its report."""
    name = "tiny" if budget == "tiny" else f"tiny-{budget}"
    lab = Lab(budget, folder or ROOT / "runs" / name, processes)
    lab.make_data()
    if parent_only:
        print(f"parent in {lab.train_parent()}")
    elif ablations:
        compare_arms(lab)
        report_arms(lab)
    else:
        report_chain(lab, run_chain(lab))


def adapt_parent(lab: Lab) -> tuple[Path, Path, Path]:
    """The parent, the denoiser that it becomes, and that denoiser after stage 1."""
    parent = lab.train_parent()
    start = lab.runs.convert(parent, "start")
    return parent, start, lab.train("adapt", "adapt", "adapt", "corpus", model=start)


def run_chain(lab: Lab) -> dict[str, dict[str, Any]]:
    """Train every stage; return what each solves, by number of steps."""
    parent, _, adapted = adapt_parent(lab)
    middle = lab.train("mid", "adapt", "mid", "clean", model=adapted)
    tuned = lab.train("sft", "sft", "sft", "chat", model=middle)
    return {
        "parent": lab.solve("parent", parent, "--base", "--causal", steps="64"),
        "adapt": lab.solve("adapt", adapted, "--base", steps="64,32"),
        "mid": lab.solve("mid", middle, "--base", steps="64,32"),
        "sft": lab.solve("sft", tuned, steps="64,32"),
    }


def compare_arms(lab: Lab) -> None:
    """Adaptation against its alternatives: the same data and settings, except what an arm's name says."""
    _, start, _ = adapt_parent(lab)
    untrained = lab.train("fresh", "pretrain", "parent", "corpus", tokenizer=lab.data / "tokenizer", steps=0, seed=9)
    nothing = lab.runs.convert(untrained, "fresh-start")
    recipe = tomllib.loads((HERE / "adapt.toml").read_text(encoding="utf-8"))
    steps = int((recipe | lab.budget.get("adapt", {}))["steps"])
    arms: dict[str, dict[str, Any]] = {
        "adapt-half": {"model": start, "steps": steps // 2},
        "abrupt": {"model": start, "anneal_steps": 0},
        "unshifted": {"model": start, "shifted": False},
        "nothing": {"model": nothing, "anneal_steps": 0},
        "nothing-twice": {"model": nothing, "anneal_steps": 0, "steps": 2 * steps},
    }
    for name, settings in arms.items():
        lab.train(name, "adapt", "adapt", "corpus", **settings)


# --- reports ---------------------------------------------------------------------------------------------------------


def report_chain(lab: Lab, solved: dict[str, dict[str, Any]]) -> None:
    """What each stage took and gave."""
    rows = []
    for name in STAGES:
        row = [name, *training_cells(lab, name)]
        for steps in ("64", "32"):
            figures = solved[name].get(steps)
            row.append(f"{figures['share']:.1%}" if figures else "–")
        rows.append(row)
    write_report(lab, "lab", "stages", "", table(["stage", *COLUMNS, "pass@1, 64 steps", "32 steps"], rows), STAGES)


def report_arms(lab: Lab) -> None:
    """Adaptation and its alternatives."""
    rows = [[f"{name}: {description}", *training_cells(lab, name)] for name, description in ARMS.items()]
    crossings = [crossing(lab, name) for name in ("nothing", "nothing-twice")]
    content = table(["arm", *COLUMNS], rows) + "\n\n" + "\n".join(crossings)
    write_report(lab, "lab_ablations", "ablations", " --ablations", content, tuple(ARMS))


def write_report(lab: Lab, page: str, figure: str, options: str, content: str, runs: Sequence[str]) -> None:
    """Update a page in docs/, that of `quick` in the run folder, and draw the held-out loss of each run."""
    folder = ROOT / "docs"
    if lab.name == "quick":
        folder = lab.runs.folder
    suffix = "_tiny" if lab.name == "tiny" else ""
    with drawing(folder / "lab" / f"{figure}{suffix}.svg") as axes:
        for name in runs:
            tokens, losses = zip(*lab.curve(name), strict=True)
            axes.plot(tokens, losses, marker=".", label=name)
        axes.set(xlabel="tokens seen (millions)", ylabel="held-out loss (nats per token)", yscale="log")
        axes.legend()
    minutes = lab.runs.minutes()
    for name in list(minutes):
        if name.removesuffix(" solves") not in (*COMMON_COMMANDS, *runs):  # a run of another report
            del minutes[name]
    parts = ", ".join([f"{name} {taken:.1f}" for name, taken in minutes.items()])
    workers = f"training processes: {lab.runs.processes}, threads: {torch.get_num_threads()}"
    took = f"{sum(minutes.values()):.0f} minutes ({parts})"
    command = f"python recipes/tiny/lab.py {lab.name}{options}"
    sections = {"run": provenance(command, f"{workers}, {took}"), "table": content}
    update_page(folder / f"{page}{suffix}.md", sections)


def training_cells(lab: Lab, name: str) -> list[str]:
    """Steps, tokens and last held-out loss of a run."""
    tokens, loss = lab.curve(name)[-1]
    return [str(lab.runs.metrics(name)[-1]["step"]), f"{tokens:.2f}", f"{loss:.4f}"]


def crossing(lab: Lab, name: str) -> str:
    """After how many tokens each way of adapting reaches the last loss of a run from nothing."""
    tokens, target = lab.curve(name)[-1]
    arms = []
    for arm in ("adapt", "adapt-half", "abrupt", "unshifted"):
        reached = [seen for seen, loss in lab.curve(arm) if loss <= target]
        when = f"after {reached[0]:.2f} M ({reached[0] / tokens:.0%})" if reached else "never"
        arms.append(f"`{arm}` {when}")
    return f"* `{name}` ends at {target:.4f} after {tokens:.2f} M tokens. The others reach this: {', '.join(arms)}."


if __name__ == "__main__":
    typer.run(main)
