"""Stage 4 of the laboratory: coupled-GRPO against its alternatives, on hard held-out problems, three seeds each.

    python recipes/tiny/grpo.py                                       # every arm and seed, hours
    python recipes/tiny/grpo.py --arms coupled --seeds 0 --jobs 1     # one run
    python recipes/tiny/grpo.py --arms causal --parent runs/tiny/parent/model   # the parent that `make tiny` leaves
    python recipes/tiny/grpo.py --report                              # the report of finished runs

Every run is a command that is printed: `diffucoder train grpo`, or causal.py. `--jobs 2` does two runs at a time, with
one thread each. You can stop the laboratory at any moment and call it again to go on. The result of a finished run goes
to benchmarks/results/grpo/; delete its file to repeat the run. The report goes to docs/grpo.md.

Problems are chains of three blocks in lower case. Everything that the model was tuned on begins with a capital; in
lower case it solves a third fewer of the same problems. Training uses the train split, curves the dev split, and the
reported figures 2,000 problems of the test split, which nothing else reads.
"""

import json
import math
import sys
import tomllib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
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
# Steps of an arm in the time of one coupled step. A score takes three forward passes, one in `full_mask` and `d1`.
# Measured: decoding and grading a completion cost 6.8 passes of learning, and a third of the completions is learnt from
# (the causal arm gets as many completions).
STEPS_IN_TIME = {"coupled": 1.0, "decoupled": 1.0, "full_mask": 1.27, "d1": 1.27, "causal": 1.0}
# How the test problems are asked and decoded: as in training
ASKED = (
    *("--hard", "--lower", "--steps", str(DECODING["steps"])),
    *("--set", f"threshold={DECODING['threshold']}", "--set", f"temperature={DECODING['temperature']}"),
)
STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}  # 97.5 % quantiles, by degrees of freedom

Pair = tuple[NDArray[np.int_], NDArray[np.int_]]  # verdicts of the same problems: before, after


@dataclass(frozen=True)
class Result:
    """What a run gave."""

    seed: str
    verdicts: NDArray[np.int_]  # of the test problems
    curve: list[dict[str, float]]  # its metrics

    @classmethod
    def read(cls, name: str) -> "Result":
        content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        verdicts = np.array(list(content["solved"]["drawn"]["solved"]), dtype=int)
        return cls(name.rpartition("-")[2], verdicts, content.get("curve", []))

    def share(self) -> str:
        return f"{self.verdicts.mean():.1%}"

    def seconds(self) -> float:
        """What the steps took, without steps that a stop made the run repeat."""
        return sum([line["tokens"] / line["tokens_per_second"] for line in self.curve])


Runs = dict[str, list[Result]]  # by arm


def main(
    arms: Annotated[str, typer.Option(help="arms to run, separated by commas")] = "coupled,decoupled,full_mask,d1",
    seeds: Annotated[str, typer.Option(help="seeds of every arm")] = "0,1,2",
    folder: Annotated[Path, typer.Option(help="run folder")] = ROOT / "runs" / "tiny-grpo",
    parent: Annotated[str | None, typer.Option(help="where the arm causal starts: an autoregressive model")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="runs at a time, one thread each; 1: all threads")] = 2,
    count: Annotated[int, typer.Option(help="test problems behind each figure")] = 2000,
    report: Annotated[bool, typer.Option("--report", help="only write the report")] = False,
) -> None:
    """Run the arms, or go on with them, and write the report."""
    names = arms.split(",")
    for name in names:
        if name not in ARMS:
            raise typer.BadParameter(f"arm {name!r} is not one of {', '.join(ARMS)}")
        if name == "causal" and parent is None and not report:
            raise typer.BadParameter("the arm causal needs --parent; make tiny leaves one in runs/tiny/parent/model")
    if not report:
        lab = Lab(RunFolder(folder, threads=1 if jobs > 1 else None), parent, count)
        make_data(folder)
        RESULTS.mkdir(parents=True, exist_ok=True)
        tasks: list[Callable[[], None]] = [partial(lab.measure, "start", None)]
        if parent is not None:
            tasks.append(partial(lab.measure, "parent", parent))
        for seed in seeds.split(","):
            for name in names:
                tasks.append(partial(lab.run, name, int(seed)))
        run_side_by_side(tasks, jobs)
    elif not (RESULTS / "start.json").exists():
        raise typer.BadParameter(f"nothing has been run: {RESULTS / 'start.json'} does not exist")
    report_runs()


def make_data(folder: Path) -> None:
    """Write exercises of the train split, and of the dev split for the curves; `_base` as the parent is asked."""
    for split, count in (("train", 20_000), ("dev", 1000)):
        path = folder / f"{split}.jsonl"
        if not path.exists():
            chat = []
            base = []
            for number, problem in enumerate(problems(split, count, seed=5, hard=True)):
                row = {"id": f"{split}/{number}", "prompt": problem.prompt.lower(), "tests": problem.tests}
                chat.append(row)
                base.append({**row, "prompt": f"# {row['prompt']}\n"})
            write_jsonl(folder / f"{split}_base.jsonl", base)
            write_jsonl(path, chat)


def run_side_by_side(tasks: Sequence[Callable[[], None]], jobs: int) -> None:
    """Run the tasks, `jobs` at a time. After a failure or a stop, no further task begins."""
    pool = ThreadPoolExecutor(jobs)
    try:
        for ended in as_completed([pool.submit(task) for task in tasks]):
            ended.result()
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Lab:
    """Runs the arms in one folder, from the shipped model, and keeps what the report needs."""

    runs: RunFolder
    parent: str | None  # where the arm causal starts
    count: int

    def measure(self, name: str, model: str | Path | None, curve: list[dict[str, Any]] | None = None) -> None:
        """Keep what a model solves, and the metrics of the run that made it."""
        path = RESULTS / f"{name}.json"
        if not path.exists():
            options = [*ASKED, "--count", str(self.count)]
            if name.startswith(("causal", "parent")):
                options += ["--causal", "--base"]
            figures = self.runs.solve(name, model, options)[str(DECODING["steps"])]
            write_json(path, {"curve": curve or [], "solved": {"drawn": figures}})

    def run(self, arm: str, seed: int) -> None:
        """Train one arm with one seed, and measure its model."""
        name = f"{arm}-{seed}"
        if (RESULTS / f"{name}.json").exists():
            return
        folder = self.runs.folder
        settings: dict[str, Any] = {"seed": seed, "steps": steps_of(arm), "workers": self.runs.threads or 0}
        program: list[object] = [*TRAIN, "grpo"]
        if arm == "causal":
            program = [HERE / "causal.py"]
            settings |= {"data": folder / "train_base.jsonl", "held_out": folder / "dev_base.jsonl", "chat": False}
            settings |= {"model": self.parent, "score_padding": False}  # the parent writes no pads
        else:
            settings |= {"data": folder / "train.jsonl", "held_out": folder / "dev.jsonl", "estimator": arm}
        model = self.runs.train(name, program, HERE / "grpo.toml", settings)
        self.measure(name, model, self.runs.metrics(name))


def steps_of(arm: str) -> int:
    """Optimiser steps that take about as long as those of the coupled arm."""
    inner: int = RECIPE["iterations"]
    return round(RECIPE["steps"] * STEPS_IN_TIME[arm] / inner) * inner


# --- report ----------------------------------------------------------------------------------------------------------


def report_runs() -> None:
    """Write tables and curves of all finished runs."""
    start = Result.read("start")
    runs: Runs = {}  # in the order of ARMS
    for arm in ARMS:
        for path in sorted(RESULTS.glob(f"{arm}-*.json")):
            runs.setdefault(arm, []).append(Result.read(path.stem))
    figures = ROOT / "docs" / "grpo"
    draw(figures / "learning.svg", runs, "held_out_pass@1", f"pass@1 of {RECIPE['held_out_rows']} dev problems")
    draw(figures / "reward.svg", runs, "reward", "reward")
    run = provenance("python recipes/tiny/grpo.py", f"pass@1 of {len(start.verdicts)} test problems")
    update_page(ROOT / "docs" / "grpo.md", {"run": run, "learning": learning_table(start, runs)})


def learning_table(start: Result, runs: Runs) -> str:
    """What each arm gains over the start, and over the coupled arm with the same seeds."""
    rows: list[list[object]] = [["start", "", "", "", start.share(), "", ""]]
    coupled = {result.seed: result for result in runs.get("coupled", [])}
    for arm, results in runs.items():
        if arm == "causal":  # the last arm
            start = Result.read("parent")
            rows.append(["parent", "", "", "", start.share(), "", ""])
        gains: list[Pair] = []  # over its start
        differences: list[Pair] = []  # from the coupled arm
        seconds = []
        learnt = []
        shares = []
        for result in results:
            gains.append((start.verdicts, result.verdicts))
            if result.seed in coupled and arm not in ("coupled", "causal"):
                differences.append((coupled[result.seed].verdicts, result.verdicts))
            seconds.append(result.seconds())
            learnt += [line["scored_share"] for line in result.curve]
            shares.append(result.share())
        cells = [f"{arm}: {ARMS[arm]}", steps_of(arm), f"{mean(seconds) / 60:.0f}", f"{mean(learnt):.0%}"]
        rows.append([*cells, ", ".join(shares), interval(gains), interval(differences)])
    head = ["arm", "steps", "minutes a run", "learnt from", "pass@1 of each seed", "against its start"]
    return table([*head, "against coupled"], rows)


def interval(pairs: Sequence[Pair]) -> str:
    if not pairs:
        return ""
    gain, half = difference(pairs)
    return f"{gain:+.1%} ± {half:.1%}"


def difference(pairs: Sequence[Pair]) -> tuple[float, float]:
    """Mean gain in the share solved, and half of its 95 % interval, over pairs (before, after) of one seed each.

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


def draw(path: Path, runs: Runs, metric: str, title: str) -> None:
    """Draw a metric over the course of each run, one colour for each arm."""
    with drawing(path) as axes:
        for number, (arm, results) in enumerate(runs.items()):
            for result in results:
                shares = []
                values = []
                for line in result.curve:
                    if metric in line:
                        shares.append(line["step"] / steps_of(arm))
                        values.append(line[metric])
                label = arm if result is results[0] else None
                axes.plot(shares, values, color=f"C{number}", alpha=0.8, label=label)
        axes.set(xlabel="share of the run", ylabel=title)
        axes.legend()


if __name__ == "__main__":
    typer.run(main)
