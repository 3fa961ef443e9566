"""Stage 4 of the laboratory: coupled-GRPO against its alternatives, on hard held-out problems, three seeds each.

    python recipes/tiny/grpo.py                                       # every arm and seed, hours
    python recipes/tiny/grpo.py --arms coupled --seeds 0 --jobs 1     # one run
    python recipes/tiny/grpo.py --report                              # the report of what has been run

Every run is a `diffucoder train grpo` command, printed as it is run. `--jobs 2` has two runs side by side, one thread
each. All of it can be stopped at any moment: called again, it goes on. Problems are chains of three blocks: training on
the train split, curves on the dev split, the figures reported on 2,000 problems of the test split, which nothing
else reads. The report goes to docs/grpo.md.
"""

import json
import os
import random
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from diffucoder.problems import problems
from diffucoder.training.exercises import Exercise, write_exercises

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RECIPE = tomllib.loads((HERE / "grpo.toml").read_text(encoding="utf-8"))
ARMS = {
    "coupled": "complementary masks and everything hidden",
    "decoupled": "as many passes, masks drawn by themselves",
    "full_mask": "everything hidden, one pass",
    "d1": "everything hidden, and 15 % of the prompt",
}
PASSES = {"coupled": 3, "decoupled": 3, "full_mask": 1, "d1": 1}  # of a score
STEPS = "64,32,16"
_lock = threading.Lock()


def main(
    arms: Annotated[str, typer.Option(help="which, separated by commas")] = ",".join(ARMS),
    seeds: Annotated[str, typer.Option(help="seeds of every arm")] = "0,1,2",
    folder: Annotated[Path, typer.Option(help="run folder")] = ROOT / "runs" / "tiny-grpo",
    model: Annotated[str | None, typer.Option(help="where to start; the shipped model if left out")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="runs side by side, one thread each; 1: all threads")] = 2,
    count: Annotated[int, typer.Option(help="test problems behind each figure")] = 2000,
    report: Annotated[bool, typer.Option("--report", help="only write the report")] = False,
) -> None:
    """Run the arms, or go on with them, and write the report."""
    folder.mkdir(parents=True, exist_ok=True)
    if not report:
        make_data(folder)
        wanted = [(arm, int(seed)) for seed in seeds.split(",") for arm in arms.split(",")]
        with ThreadPoolExecutor(jobs) as pool:
            measured = pool.submit(solved, folder, "start", model, count, jobs)
            done = [pool.submit(run, folder, arm, seed, model, count, jobs) for arm, seed in wanted]
            for each in [measured, *done]:
                each.result()
    print(f"report in {write_report(folder)}")


def make_data(folder: Path) -> None:
    """Exercises of the train split, and of the dev split for the curves."""
    for split, number in (("train", 20_000), ("dev", 1000)):
        path = folder / f"{split}.jsonl"
        if not path.exists():
            drawn = problems(split, number, seed=5, hard=True)  # type: ignore[arg-type]  # a literal
            write_exercises(path, [Exercise(f"{split}/{at}", p.prompt, p.tests) for at, p in enumerate(drawn)])


def run(folder: Path, arm: str, seed: int, model: str | None, count: int, jobs: int) -> None:
    """One arm with one seed, and what its model solves."""
    name = f"{arm}-{seed}"
    if not (folder / name / "model" / "tokenizer_config.json").exists():
        settings = {
            "run": folder / name,
            "data": str(folder / "train.jsonl"),
            "held_out": str(folder / "dev.jsonl"),
            "estimator": arm,
            "seed": seed,
            "steps": steps_of(arm),
            "workers": 1 if jobs > 1 else 0,
            **({"model": model} if model else {}),
        }
        changes = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        command = ["-m", "diffucoder.cli", "train", "grpo", str(HERE / "grpo.toml"), "--resume", *changes]
        execute(folder, name, command, jobs)
    solved(folder, name, str(folder / name / "model"), count, jobs)


def steps_of(arm: str) -> int:
    """Optimiser steps for as many forward passes as the coupled arm spends; a backward one counts twice."""
    inner, rollout = RECIPE["iterations"], RECIPE["decoding_steps"]
    cost = {name: rollout + views * (3 * inner + inner - 1) for name, views in PASSES.items()}  # a completion's
    return round(RECIPE["steps"] * cost["coupled"] / cost[arm] / inner) * inner


def solved(folder: Path, name: str, model: str | None, count: int, jobs: int) -> None:
    """What a model solves of the test split at all, half and a quarter of the steps."""
    path = folder / f"{name}.solved.json"
    if path.exists():
        return
    command = [str(ROOT / "benchmarks" / "tiny_accuracy.py"), "--hard", "--count", str(count), "--steps", STEPS]
    command += ["--figures", str(path), "--run", str(folder / "answers"), *(["--model", model] if model else [])]
    execute(folder, f"{name} solves", command, jobs)


def execute(folder: Path, what: str, command: list[str], jobs: int) -> None:
    """Run a command of ours, with one thread where others run beside it."""
    environment = {**os.environ, **({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})}
    print("$", sys.executable, *command, flush=True)
    began = time.monotonic()
    done = subprocess.run([sys.executable, *command], env=environment)
    if done.returncode:  # it has said why
        raise SystemExit(done.returncode)
    with _lock, (folder / "minutes.jsonl").open("a", encoding="utf-8") as file:
        minutes = round((time.monotonic() - began) / 60, 2)
        file.write(json.dumps({"what": what, "minutes": minutes, "jobs": jobs}) + "\n")


# --- report ----------------------------------------------------------------------------------------------------------

Solved = dict[str, Any]  # what tiny_accuracy writes for each number of steps


def write_report(folder: Path) -> Path:
    """Tables and curves of whatever has been run."""
    start = _read(folder / "start.solved.json")
    runs = {arm: [_read(path) for path in sorted(folder.glob(f"{arm}-?.solved.json"))] for arm in ARMS}
    runs = {arm: found for arm, found in runs.items() if found}
    count = len(start["64"]["solved"])
    draw(folder, ROOT / "docs" / "grpo", list(runs))
    parts = [
        "# Coupled-GRPO at the size of a laptop",
        f"`python recipes/tiny/grpo.py`, {time.strftime('%Y-%m-%d')}; settings in recipes/tiny/grpo.toml. pass@1 is "
        f"greedy, of {count} problems of the test split (chains of three blocks, canvas of 64), run in the sandbox. "
        "Differences are of the same problems before and after; their 95 % intervals come from resampling problems, "
        "and runs where there are several.",
        "## Learning",
        learning_table(start, runs, minutes(folder)),
        "Every arm has as many forward passes as the coupled one, a backward one counted twice; so arms with one pass "
        "a score take more steps.",
        "![held-out pass@1 of each run](grpo/learning.svg)",
        "## Fewer steps, and the order of decoding",
        "Drop is relative to the same model at 64 steps, one token each. AR-ness@1 is of the same greedy answers.",
        steps_table(start, runs),
        "![reward of each run](grpo/reward.svg)",
    ]
    path = ROOT / "docs" / "grpo.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def learning_table(start: Solved, runs: dict[str, list[Solved]], taken: dict[str, float]) -> str:
    rows = [["start", "", "", f"{start['64']['share']:.1%}", "", ""]]
    for arm, found in runs.items():
        low, middle, high = difference(start["64"]["solved"], [each["64"]["solved"] for each in found])
        shares = ", ".join(f"{each['64']['share']:.1%}" for each in found)
        spent = [taken[name] for name in taken if name.startswith(f"{arm}-")]
        mean = f"{sum(spent) / len(spent):.0f}" if spent else "–"
        change = f"{middle:+.1%} ({low:+.1%} to {high:+.1%})"
        rows.append([f"{arm}: {ARMS[arm]}", str(steps_of(arm)), mean, shares, change])
    rows[0] = rows[0][:5]
    return _table(["arm", "steps", "minutes a run", "pass@1 of each seed", "against the start (95 %)"], rows)


def steps_table(start: Solved, runs: dict[str, list[Solved]]) -> str:
    rows = []
    for name, found in {"start": [start], **runs}.items():
        cells = [name]
        whole = _mean(found, "64", "share")
        for steps in STEPS.split(","):
            share = _mean(found, steps, "share")
            cells.append(f"{share:.1%}" + (f" ({share / whole - 1:+.1%})" if steps != "64" else ""))
        rows.append([*cells, *(f"{_mean(found, '64', which):.3f}" for which in ("local", "global"))])
    head = ["model", "64 steps", "32 steps (drop)", "16 steps (drop)", "local AR-ness", "global AR-ness"]
    return _table(head, rows)


def difference(before: Sequence[int], after: Sequence[Sequence[int]], draws: int = 2000) -> tuple[float, float, float]:
    """Mean gain in the share solved, between the ends of its 95 % interval; resamples problems, and runs."""
    rng = random.Random(0)
    gains = []
    for _ in range(draws):
        chosen = rng.choices(range(len(before)), k=len(before))
        picked = rng.choices(after, k=len(after))
        old = sum(before[at] for at in chosen)
        gains.append(sum(sum(run_[at] for at in chosen) - old for run_ in picked) / len(picked) / len(before))
    gains.sort()
    mean = sum(sum(run_) for run_ in after) / len(after) / len(before) - sum(before) / len(before)
    return gains[int(0.025 * draws)], mean, gains[int(0.975 * draws)]


def draw(folder: Path, target: Path, arms: list[str]) -> None:
    """Held-out pass@1 and reward against completions seen, a line for each run."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "diffucoder"  # the same drawing gives the same bytes
    from matplotlib import pyplot

    target.mkdir(exist_ok=True)
    figures = {"learning": ("held_out_pass@1", "held-out pass@1 (256 problems)"), "reward": ("reward", "reward")}
    for name, (key, label) in figures.items():
        figure, axes = pyplot.subplots(figsize=(7, 4))
        for colour, arm in enumerate(arms):
            for at, path in enumerate(sorted(folder.glob(f"{arm}-?/metrics.jsonl"))):
                lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
                points = [(line["step"] / steps_of(arm), line[key]) for line in lines if key in line]
                axes.plot(*zip(*points, strict=True), color=f"C{colour}", alpha=0.8, label=arm if at == 0 else None)
        axes.set(xlabel="share of the forward passes spent", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(target / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
        pyplot.close(figure)


def minutes(folder: Path) -> dict[str, float]:
    """What each run took; of one that was stopped and went on, all of it."""
    taken: dict[str, float] = {}
    path = folder / "minutes.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        told = json.loads(line)
        if not told["what"].endswith(" solves"):
            taken[told["what"]] = taken.get(told["what"], 0.0) + told["minutes"]
    return taken


def _mean(found: Sequence[Solved], steps: str, which: str) -> float:
    return sum(float(each[steps][which]) for each in found) / len(found)


def _read(path: Path) -> Solved:
    told: Solved = json.loads(path.read_text(encoding="utf-8"))
    return told


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    typer.run(main)
