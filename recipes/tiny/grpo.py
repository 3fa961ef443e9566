"""Stage 4 of the laboratory: coupled-GRPO against its alternatives, on hard held-out problems, three seeds each.

    python recipes/tiny/grpo.py                                       # every arm and seed, hours
    python recipes/tiny/grpo.py --arms coupled --seeds 0              # one run
    python recipes/tiny/grpo.py --arms causal --parent runs/tiny/parent/model   # the parent that `make tiny` leaves

Every run is a command that is printed. You can stop the laboratory at any moment and call it again to go on, or call it
twice with other seeds to do two runs at a time. The result of a finished run goes to benchmarks/results/grpo/; delete
its file to repeat the run. The report of all finished runs goes to docs/grpo.md.

Problems are chains of three blocks in lower case, which tuning never had. Training uses the train split, curves the dev
split, and the reported figures 2,000 problems of the test split, which nothing else reads.
"""

import json
import math
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from diffucoder.files import write_json, write_jsonl

sys.path.append(str(Path(__file__).parents[2]))

from recipes.report import drawing, provenance, table, update_page
from recipes.runner import ROOT, TRAIN, RunFolder
from recipes.tiny.problems import problems

HERE = Path(__file__).parent
RESULTS = ROOT / "benchmarks" / "results" / "grpo"
RECIPE = tomllib.loads((HERE / "grpo.toml").read_text(encoding="utf-8"))
DECODING = RECIPE["decoding"]
ARMS = {
    "coupled": "complementary masks and everything hidden",
    "decoupled": "as many passes, independent masks",
    "full_mask": "everything hidden, one pass",
    "d1": "everything hidden, and 15 % of the prompt",
    "causal": "ordinary GRPO of the autoregressive parent",
}
# Steps of an arm in about the time of the coupled one: a score takes one forward pass instead of three (docs/log.md)
STEPS_IN_TIME = {"full_mask": 1.27, "d1": 1.27}
# How the test problems are asked and decoded: as in training
ASKED = (
    *("--hard", "--lower", "--steps", str(DECODING["steps"])),
    *("--set", f"threshold={DECODING['threshold']}", "--set", f"temperature={DECODING['temperature']}"),
)
STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}  # 97.5 % quantiles, by degrees of freedom

Results = dict[str, dict[str, dict[str, Any]]]  # arm -> seed -> verdicts and curve


def main(
    arms: Annotated[str, typer.Option(help="arms to run, separated by commas")] = "coupled,decoupled,full_mask,d1",
    seeds: Annotated[str, typer.Option(help="seeds of every arm")] = "0,1,2",
    folder: Annotated[Path, typer.Option(help="run folder")] = ROOT / "runs" / "tiny-grpo",
    parent: Annotated[str | None, typer.Option(help="where the arm causal starts: an autoregressive model")] = None,
) -> None:
    """Run the arms, or go on with them, and write the report."""
    names = arms.split(",")
    for name in names:
        if name not in ARMS:
            raise typer.BadParameter(f"arm {name!r} is not one of {', '.join(ARMS)}")
        if name == "causal" and parent is None:
            raise typer.BadParameter("the arm causal needs --parent; make tiny leaves one in runs/tiny/parent/model")
    runs = RunFolder(folder)
    make_data(folder)
    measure(runs, "start", None)
    if parent is not None:
        measure(runs, "parent", parent)
    for seed in seeds.split(","):
        for name in names:
            run_arm(runs, name, int(seed), parent)
    report_runs()


def make_data(folder: Path) -> None:
    """Write exercises of the train split, and of the dev split for the curves; `_base` as the parent is asked."""
    for split, count in (("train", 20_000), ("dev", 1000)):
        path = folder / f"{split}.jsonl"
        if path.exists():
            continue
        chat = []
        base = []
        for number, problem in enumerate(problems(split, count, seed=5, hard=True)):
            row = {"id": f"{split}/{number}", "prompt": problem.prompt.lower(), "tests": problem.tests}
            chat.append(row)
            base.append({**row, "prompt": f"# {row['prompt']}\n"})
        write_jsonl(folder / f"{split}_base.jsonl", base)
        write_jsonl(path, chat)


def measure(runs: RunFolder, name: str, model: str | Path | None, curve: Sequence[Mapping[str, Any]] = ()) -> None:
    """Keep what a model solves, and the metrics of the run that made it."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        options = ["--causal", "--base"] if name.startswith(("causal", "parent")) else []
        figures = runs.solve(name, model, [*ASKED, *options])[str(DECODING["steps"])]
        write_json(path, {"curve": curve, "solved": {"drawn": figures}})


def run_arm(runs: RunFolder, arm: str, seed: int, parent: str | None) -> None:
    """Train one arm with one seed, and measure its model."""
    name = f"{arm}-{seed}"
    if (RESULTS / f"{name}.json").exists():
        return
    settings: dict[str, Any] = {"seed": seed, "steps": steps_of(arm)}
    if arm == "causal":
        program = (HERE / "causal.py",)
        settings |= {"data": runs.folder / "train_base.jsonl", "held_out": runs.folder / "dev_base.jsonl"}
        settings |= {"chat": False, "model": parent, "score_padding": False}  # the parent writes no pads
    else:
        program = (*TRAIN, "grpo")
        settings |= {"data": runs.folder / "train.jsonl", "held_out": runs.folder / "dev.jsonl", "estimator": arm}
    model = runs.train(name, program, HERE / "grpo.toml", settings)
    measure(runs, name, model, runs.metrics(name))


def steps_of(arm: str) -> int:
    """Optimiser steps that take about as long as those of the coupled arm."""
    return round(RECIPE["steps"] * STEPS_IN_TIME.get(arm, 1.0))


def report_runs() -> None:
    """Write the table and the curves of all finished runs."""
    results: Results = {}  # in the order of ARMS
    for arm in ARMS:
        paths = sorted(RESULTS.glob(f"{arm}-*.json"))
        results[arm] = {path.stem.rpartition("-")[2]: read_result(path.stem) for path in paths}
    draw("learning", results, "held_out_pass@1", f"pass@1 of {RECIPE['held_out_rows']} dev problems")
    draw("reward", results, "reward", "reward")
    run = provenance("python recipes/tiny/grpo.py", "pass@1 of test problems")
    update_page(ROOT / "docs" / "grpo.md", {"run": run, "learning": learning_table(results)})


def read_result(name: str) -> dict[str, Any]:
    """The verdicts of the test problems and the curve of a run."""
    content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    verdicts = np.array(list(content["solved"]["drawn"]["solved"]), dtype=int)
    return {"verdicts": verdicts, "curve": content.get("curve", [])}


def learning_table(results: Results) -> str:
    """What each arm gains over its start, and over the coupled arm with the same seeds."""
    rows = []
    for name, arms in (("start", ["coupled", "decoupled", "full_mask", "d1"]), ("parent", ["causal"])):
        if not (RESULTS / f"{name}.json").exists():
            continue
        before = read_result(name)["verdicts"]
        rows.append([name, "", "", f"{before.mean():.1%}", "", ""])
        for arm in arms:
            if not results[arm]:
                continue
            after = {seed: result["verdicts"] for seed, result in results[arm].items()}
            gains = [(before, verdicts) for verdicts in after.values()]
            coupled = {}
            if arm not in ("coupled", "causal"):
                coupled = results["coupled"]
            differences = [(coupled[seed]["verdicts"], after[seed]) for seed in after if seed in coupled]
            learnt = []
            for result in results[arm].values():
                learnt += [line["scored_share"] for line in result["curve"]]
            shares = ", ".join([f"{verdicts.mean():.1%}" for verdicts in after.values()])
            cells = [f"{arm}: {ARMS[arm]}", steps_of(arm), f"{mean(learnt):.0%}", shares]
            for pairs in (gains, differences):
                cells.append("{:+.1%} ± {:.1%}".format(*difference(pairs)) if pairs else "")
            rows.append(cells)
    head = ["arm", "steps", "learnt from", "pass@1 of each seed", "against its start", "against coupled"]
    return table(head, rows)


def difference(pairs: Sequence[tuple[NDArray[np.int_], NDArray[np.int_]]]) -> tuple[float, float]:
    """Mean gain in the share solved, and half of its 95 % interval, over pairs (before, after) of verdicts, one a seed.

    Two things vary: seeds, whose mean has Student's distribution, and problems, which all seeds share. With one seed
    the interval is over problems only.
    """
    before, after = zip(*pairs, strict=True)
    gains = np.stack(after) - np.stack(before)  # (seeds, problems)
    seeds = gains.mean(axis=1)
    half = 1.96 * float(gains.mean(axis=0).std(ddof=1)) / math.sqrt(gains.shape[1])
    if len(seeds) > 1:
        half = math.hypot(half, STUDENT[len(seeds) - 1] * float(seeds.std(ddof=1)) / math.sqrt(len(seeds)))
    return float(seeds.mean()), half


def draw(name: str, results: Results, metric: str, title: str) -> None:
    """Draw a metric over the course of each run, one colour for each arm."""
    with drawing(ROOT / "docs" / "grpo" / f"{name}.svg") as axes:
        for number, (arm, runs) in enumerate(results.items()):
            label = arm
            for result in runs.values():
                points = [(line["step"] / steps_of(arm), line[metric]) for line in result["curve"] if metric in line]
                axes.plot(*zip(*points, strict=True), color=f"C{number}", alpha=0.8, label=label)
                label = None
        axes.set(xlabel="share of the run", ylabel=title)
        axes.legend()


if __name__ == "__main__":
    typer.run(main)
