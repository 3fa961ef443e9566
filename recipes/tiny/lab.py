"""The laboratory: the paper's first three stages at the size of a laptop, from a parent to a tuned model.

    python recipes/tiny/lab.py lab                  # parent -> adaptation -> mid-training -> instruction tuning
    python recipes/tiny/lab.py lab --ablations      # adaptation against its alternatives, from the same parent
    python recipes/tiny/lab.py tiny --processes 2   # the shipped model
    python recipes/tiny/lab.py tiny --parent-only   # the first 15 minutes of it: its parent, for grpo.py's arm causal

Every stage is a `diffucoder` command, printed as it is run, so that any of them can be run by hand. All of it can be
stopped at any moment: called again, it goes on. Budgets stand in budgets.toml, the stages' settings in the files beside
it; the reports go to docs/lab.md, docs/lab_ablations.md and docs/lab_tiny.md; those of `quick` into the run folder.
"""

import json
import platform
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class Lab:
    """One run folder: commands that fill it, each left out where its result is there already."""

    def __init__(self, budget: str, folder: Path, processes: int) -> None:
        budgets = tomllib.loads((HERE / "budgets.toml").read_text(encoding="utf-8"))
        if budget not in budgets:
            raise typer.BadParameter(f"budget {budget!r} is not in budgets.toml; use one of {', '.join(budgets)}")
        self.name, self.budget, self.folder, self.processes = budget, budgets[budget], folder, processes
        self.data = folder / "data"

    def make_data(self) -> None:
        script = [str(HERE / "data.py"), str(self.data), "--problems", str(self.budget["problems"])]
        self._run("data", script)

    def train(self, run: str, stage: str, recipe: str, data: str, held_out: str, **settings: Any) -> Path:
        """Run `diffucoder train STAGE RECIPE` into the folder `run`, or go on with it; returns its model."""
        folder = self.folder / run
        if not (folder / "model" / "tokenizer_config.json").exists():
            values = {
                "run": folder,
                "data": [str(self.data / data)],
                "held_out": [str(self.data / held_out)],
                "cache": self.folder / "cache",
                **self.budget.get(recipe, {}),
                **settings,
            }
            overrides = [part for key, value in values.items() for part in ("--set", f"{key}={_toml(value)}")]
            command = ["-m", "diffucoder.cli", "train", stage, str(HERE / f"{recipe}.toml"), "--resume", *overrides]
            self._run(run, command, processes=self.processes)
        return folder / "model"

    def convert(self, source: Path, name: str) -> Path:
        """`diffucoder convert`: a parent's folder becomes a Dream checkpoint."""
        folder = self.folder / name
        if not (folder / "tokenizer_config.json").exists():
            self._run(name, ["-m", "diffucoder.cli", "convert", str(source), str(folder)])
        return folder

    def solved(self, run: str, model: Path, *options: str, steps: str) -> dict[str, float]:
        """Share of held-out problems (dev split) that `model` solves, for each number of steps."""
        path = self.folder / f"{run}.solved.json"
        if not path.exists():
            options = (*options, "--split", "dev", "--count", str(self.budget["solve"]), "--steps", steps)
            script = [str(ROOT / "benchmarks" / "tiny_accuracy.py"), "--model", str(model), *options]
            self._run(f"{run} solves", [*script, "--figures", str(path), "--run", str(self.folder / "answers")])
        told = json.loads(path.read_text(encoding="utf-8"))
        return {steps: figures["share"] for steps, figures in told.items()}

    def curve(self, run: str, figure: str = "held_out_loss") -> list[tuple[float, float]]:
        """(million tokens seen, figure) wherever the run's metrics tell it."""
        points, seen = [], 0.0
        for line in (self.folder / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            metrics = json.loads(line)
            seen += metrics["tokens"] / 1e6
            if figure in metrics:
                points.append((seen, metrics[figure]))
        return points

    def minutes(self) -> dict[str, float]:
        """What each command took; of one that was run again, all of it."""
        taken: dict[str, float] = {}
        for line in (self.folder / "minutes.jsonl").read_text(encoding="utf-8").splitlines():
            told = json.loads(line)
            taken[told["what"]] = taken.get(told["what"], 0.0) + told["minutes"]
        return taken

    def _run(self, what: str, command: list[str], processes: int = 1) -> None:
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes/accelerate/ddp.yaml")]
            launcher += ["--num_processes", str(processes), *(["-m"] if command[0] == "-m" else [])]
            command = command[1:] if command[0] == "-m" else command
        print("$", *launcher, *command, flush=True)
        began = time.monotonic()
        done = subprocess.run([*launcher, *command])
        if done.returncode:  # it has said why
            raise SystemExit(done.returncode)
        with (self.folder / "minutes.jsonl").open("a", encoding="utf-8") as file:
            line = {"what": what, "minutes": round((time.monotonic() - began) / 60, 2)}
            file.write(json.dumps(line) + "\n")


def main(
    budget: Annotated[str, typer.Argument(help="a table of budgets.toml: tiny, lab or quick")],
    folder: Annotated[Path | None, typer.Option(help="run folder; runs/tiny-BUDGET if left out")] = None,
    processes: Annotated[int, typer.Option(help="training processes; more than one need as many cores")] = 1,
    ablations: Annotated[bool, typer.Option("--ablations", help="adaptation's alternatives too")] = False,
    parent_only: Annotated[
        bool, typer.Option("--parent-only", help="stop behind the parent, without a report")
    ] = False,
) -> None:
    """Run the laboratory, or go on with it, and write its report."""
    folder = folder or ROOT / "runs" / ("tiny" if budget == "tiny" else f"tiny-{budget}")
    folder.mkdir(parents=True, exist_ok=True)
    lab = Lab(budget, folder, processes)
    lab.make_data()
    if parent_only:
        print(f"parent in {train_parent(lab)}")
        return
    if ablations:
        compare(lab)
    else:
        chain(lab)
    print(f"report in {report_arms(lab) if ablations else report_chain(lab)}")


def train_parent(lab: Lab) -> Path:
    """The autoregressive model that all else begins with."""
    tokenizer = lab.data / "tokenizer"
    return lab.train("parent", "pretrain", "parent", "corpus.jsonl", "held_out_clean.jsonl", tokenizer=tokenizer)


def adaptation(lab: Lab) -> tuple[Path, Path, Path]:
    """The parent, the denoiser it becomes, and that after stage 1."""
    parent = train_parent(lab)
    start = lab.convert(parent, "start")
    return parent, start, lab.train("adapt", "adapt", "adapt", "corpus.jsonl", "held_out_clean.jsonl", model=start)


def chain(lab: Lab) -> None:
    """Parent, stage 1, stage 2, stage 3, and what each solves."""
    parent, _, adapted = adaptation(lab)
    middle = lab.train("mid", "adapt", "mid", "clean.jsonl", "held_out_clean.jsonl", model=adapted)
    tuned = lab.train("sft", "sft", "sft", "chat.jsonl", "held_out_chat.jsonl", model=middle)
    lab.solved("parent", parent, "--base", "--causal", steps="64")
    lab.solved("adapt", adapted, "--base", steps="64,32")
    lab.solved("mid", middle, "--base", steps="64,32")
    lab.solved("sft", tuned, steps="64,32")


ARMS = {
    "adapt": "from the parent, attention annealed, rows shifted",
    "adapt-half": "as `adapt`, on half the tokens",
    "abrupt": "from the parent, full attention at once",
    "unshifted": "from the parent, rows not shifted",
    "nothing": "from nothing, equal tokens",
    "nothing-twice": "from nothing, twice the tokens",
}


def compare(lab: Lab) -> None:
    """Adaptation against its alternatives: same data, same settings, but for what the arm's name says."""
    tokenizer, (_, start, _) = lab.data / "tokenizer", adaptation(lab)
    fresh = lab.train(
        "fresh", "pretrain", "parent", "corpus.jsonl", "held_out_clean.jsonl", tokenizer=tokenizer, steps=0, seed=9
    )
    random = lab.convert(fresh, "fresh-start")
    steps = int(_recipe(lab, "adapt")["steps"])
    arms: dict[str, dict[str, Any]] = {
        "adapt-half": {"model": start, "steps": steps // 2},
        "abrupt": {"model": start, "anneal_steps": 0},
        "unshifted": {"model": start, "shifted": False},
        "nothing": {"model": random, "anneal_steps": 0},
        "nothing-twice": {"model": random, "anneal_steps": 0, "steps": 2 * steps},
    }
    for name, settings in arms.items():
        lab.train(name, "adapt", "adapt", "corpus.jsonl", "held_out_clean.jsonl", **settings)


def _recipe(lab: Lab, name: str) -> dict[str, Any]:
    return tomllib.loads((HERE / f"{name}.toml").read_text(encoding="utf-8")) | lab.budget.get(name, {})


def _toml(value: Any) -> str:
    """A value as `--set key=value` reads it."""
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, list) else str(value)


# --- report ----------------------------------------------------------------------------------------------------------


def report_chain(lab: Lab) -> Path:
    """What each stage took and gave."""
    path, figure = _places(lab, "lab.md", "stages.svg")
    names = ("parent", "adapt", "mid", "sft")
    draw(figure, {name: lab.curve(name) for name in names})
    asked = f"{lab.budget['solve']} problems behind pass@1 (greedy, canvas of 64, policy entropy, run in the sandbox)"
    parts = [
        f"# Laboratory report: budget `{lab.name}`",
        _told(lab, "", ("data", "start", *names, *(f"{name} solves" for name in names))),
        f"Losses are on the dev split, as are the {asked}.",
        chain_table(lab),
        "The parent answers left to right, one token a pass. Before instruction tuning a model is asked in a comment, "
        "after it in the chat template. The held-out loss is nats per token: of the next token for the parent, the "
        "1/t-weighted bound on the likelihood for the others; the last one is of answers given their requests alone.",
        f"![held-out loss of each stage]({figure.relative_to(path.parent)})",
    ]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def report_arms(lab: Lab) -> Path:
    """Adaptation and its alternatives."""
    path, figure = _places(lab, "lab_ablations.md", "ablations.svg")
    draw(figure, {name: lab.curve(name) for name in ARMS})
    parts = [
        f"# Adaptation and its alternatives: budget `{lab.name}`",
        _told(lab, " --ablations", ("data", "parent", "start", "fresh", "fresh-start", *ARMS)),
        "Held-out losses are the 1/t-weighted bound on the likelihood of the dev split's documents, in nats per token.",
        arms_table(lab),
        crossing(lab),
        f"![held-out loss of each arm]({figure.relative_to(path.parent)})",
    ]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _places(lab: Lab, report: str, figure: str) -> tuple[Path, Path]:
    """Where a report and its figure go."""
    if lab.name == "quick":
        return lab.folder / report, lab.folder / figure
    (ROOT / "docs" / "lab").mkdir(exist_ok=True)
    names = [Path(name) for name in (report, figure)]
    if lab.name != "lab":
        names = [name.with_stem(f"{name.stem}_{lab.name}") for name in names]
    return ROOT / "docs" / names[0], ROOT / "docs" / "lab" / names[1]


def _told(lab: Lab, options: str, commands: Sequence[str]) -> str:
    """The command, the day, the machine, and the minutes that its parts took."""
    minutes = {what: taken for what, taken in lab.minutes().items() if what in commands}
    parts = ", ".join(f"{what} {taken:.1f}" for what, taken in minutes.items())
    threads = f"{lab.processes} processes" if lab.processes > 1 else f"{torch.get_num_threads()} threads"
    return (
        f"`python recipes/tiny/lab.py {lab.name}{options}`, {time.strftime('%Y-%m-%d')}, {threads}: "
        f"{sum(minutes.values()):.0f} minutes ({parts}). "
        f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}."
    )


def chain_table(lab: Lab) -> str:
    rows = []
    for name in ("parent", "adapt", "mid", "sft"):
        told = json.loads((lab.folder / f"{name}.solved.json").read_text(encoding="utf-8"))
        solved = [f"{told[steps]['share']:.1%}" if steps in told else "–" for steps in ("64", "32")]
        rows.append([name, *_cells(lab, name), *solved])
    return _table(["stage", *_COLUMNS, "pass@1, 64 steps", "32 steps"], rows)


def arms_table(lab: Lab) -> str:
    return _table(["arm", *_COLUMNS], [[f"{name}: {told}", *_cells(lab, name)] for name, told in ARMS.items()])


_COLUMNS = ("steps", "M tokens", "held-out loss")


def _cells(lab: Lab, name: str) -> list[str]:
    curve = lab.curve(name)
    last = json.loads((lab.folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return [str(last["step"]), f"{curve[-1][0]:.2f}", f"{curve[-1][1]:.4f}"]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def crossing(lab: Lab) -> str:
    """After how many tokens each way of adapting is where training from nothing ends."""
    lines = []
    for name in ("nothing", "nothing-twice"):
        tokens, target = lab.curve(name)[-1]
        said = []
        for arm in ("adapt", "adapt-half", "abrupt", "unshifted"):
            reached = next((at for at, loss in lab.curve(arm) if loss <= target), None)
            said.append(f"`{arm}` " + (f"after {reached:.2f} M ({reached / tokens:.0%})" if reached else "never"))
        lines.append(f"* `{name}` ends at {target:.4f} after {tokens:.2f} M tokens. There is: {', '.join(said)}.")
    return "\n".join(lines)


def draw(path: Path, curves: dict[str, list[tuple[float, float]]]) -> None:
    """Held-out loss against tokens, a line for each run."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "diffucoder"  # the same drawing gives the same bytes
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker=".", label=name)
    axes.set(xlabel="tokens seen (millions)", ylabel="held-out loss (nats per token)", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    typer.run(main)
