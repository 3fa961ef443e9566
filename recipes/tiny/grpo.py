"""Stage 4 of the laboratory: coupled-GRPO against its alternatives, on hard held-out problems, three seeds each.

    python recipes/tiny/grpo.py                                       # every arm and seed, hours
    python recipes/tiny/grpo.py --arms coupled --seeds 0 --jobs 1     # one run
    python recipes/tiny/grpo.py --arms causal --parent runs/tiny/parent/model   # the parent that `make tiny` leaves
    python recipes/tiny/grpo.py --report                              # the report of what has been run

Every run is a `diffucoder train grpo` command, printed as it is run. `--jobs 2` has two runs side by side, one thread
each. All of it can be stopped at any moment: called again, it goes on. What a finished run gave goes to
benchmarks/results/grpo/, and a run that is there already is not run again: delete its file to do so. Problems are
chains of three blocks, asked in lower case: all that the model was tuned on begins with a capital, and of the same
problems it solves a third fewer so. Training on the train split, curves on the dev split, the figures reported on 2,000
problems of the test split, which nothing else reads. The report goes to docs/grpo.md.
"""

import json
import math
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import typer

from diffucoder.problems import problems
from diffucoder.training.exercises import Exercise, write_exercises

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RECIPE = tomllib.loads((HERE / "grpo.toml").read_text(encoding="utf-8"))
RECIPE = {**RECIPE["decoding"], **RECIPE}
ARMS = {
    "coupled": "complementary masks and everything hidden",
    "decoupled": "as many passes, masks drawn by themselves",
    "full_mask": "everything hidden, one pass",
    "d1": "everything hidden, and 15 % of the prompt",
    "causal": "ordinary GRPO of the autoregressive parent",
}
PASSES = {"coupled": 3, "decoupled": 3, "full_mask": 1, "d1": 1}  # of a score
# Measured on the start model: what it takes to write and grade a completion, in forward passes of learning over its
# canvas, and the share of completions that are learnt from (a group of equal rewards teaches nothing and is left out)
DECODING, SCORED = 6.8, 0.35
# How 2,000 held-out problems are asked and decoded: by the rule of training in lower case, drawn; the start and the
# first coupled seed also greedily, and greedily as instruction tuning asks, which nothing here trains
RULE = ("--set", f"threshold={RECIPE['threshold']}")
WAYS = {
    "drawn": ("--lower", *RULE, "--set", f"temperature={RECIPE['temperature']}"),
    "greedy": ("--lower", *RULE),
    "capitals": RULE,
}
STEPS, STEPS_COUNT = "64,32,16", 400
RESULTS = ROOT / "benchmarks" / "results" / "grpo"
STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}  # 97.5 % quantiles, by degrees of freedom


def main(
    arms: Annotated[str, typer.Option(help="which, separated by commas")] = ",".join(PASSES),
    seeds: Annotated[str, typer.Option(help="seeds of every arm")] = "0,1,2",
    folder: Annotated[Path, typer.Option(help="run folder")] = ROOT / "runs" / "tiny-grpo",
    model: Annotated[str | None, typer.Option(help="where to start; the shipped model if left out")] = None,
    parent: Annotated[str | None, typer.Option(help="autoregressive model of the arm causal")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="runs side by side, one thread each; 1: all threads")] = 2,
    count: Annotated[int, typer.Option(help="test problems behind each figure")] = 2000,
    report: Annotated[bool, typer.Option("--report", help="only write the report")] = False,
) -> None:
    """Run the arms, or go on with them, and write the report."""
    names = arms.split(",")
    if unknown := [name for name in names if name not in ARMS]:
        raise typer.BadParameter(f"arm {unknown[0]!r} is not one of {', '.join(ARMS)}")
    if "causal" in names and parent is None and not report:
        raise typer.BadParameter("the arm causal needs --parent; make tiny leaves one in runs/tiny/parent/model")
    if report and not (RESULTS / "start.json").exists():
        raise typer.BadParameter(f"nothing has been run: {RESULTS / 'start.json'} is not there")
    if not report:
        folder.mkdir(parents=True, exist_ok=True)
        make_data(folder)
        models = {arm: parent if arm == "causal" else model for arm in ARMS}
        starts = {"parent" if arm == "causal" else "start": models[arm] for arm in ("coupled", *names)}
        tasks = [partial(start, folder, name, model, count, jobs) for name, model in starts.items()]
        tasks += [
            partial(run, folder, arm, int(seed), models[arm], count, jobs) for seed in seeds.split(",") for arm in names
        ]
        side_by_side(tasks, jobs)
    print(f"report in {write_report()}")


def side_by_side(tasks: Sequence[Callable[[], None]], jobs: int) -> None:
    """Run the tasks, `jobs` at a time; where one fails or is stopped those that have not begun do not begin."""
    pool = ThreadPoolExecutor(jobs)
    try:
        for done in as_completed([pool.submit(task) for task in tasks]):
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def make_data(folder: Path) -> None:
    """Exercises of the train split, and of the dev split for the curves."""
    for split, number in (("train", 20_000), ("dev", 1000)):
        path, base = folder / f"{split}.jsonl", folder / f"{split}_base.jsonl"
        if not base.exists():
            drawn = list(problems(split, number, seed=5, hard=True))  # type: ignore[arg-type]  # a literal
            chat = [Exercise(f"{split}/{at}", p.prompt.lower(), p.tests) for at, p in enumerate(drawn)]
            write_exercises(path, chat)
            asked = [replace(each, prompt=f"# {each.prompt}\n") for each in chat]
            write_exercises(base, asked)  # as the parent knows requests


def run(folder: Path, arm: str, seed: int, model: str | None, count: int, jobs: int) -> None:
    """One arm with one seed, and what its model solves."""
    name = f"{arm}-{seed}"
    if (RESULTS / f"{name}.json").exists():
        return
    if not (folder / name / "model" / "tokenizer_config.json").exists():
        kind = "_base" if arm == "causal" else ""
        settings = {
            "run": folder / name,
            "data": str(folder / f"train{kind}.jsonl"),
            "held_out": str(folder / f"dev{kind}.jsonl"),
            "chat": "false" if kind else "true",
            **({"score_padding": "false"} if arm == "causal" else {}),  # it writes none
            "estimator": arm,
            "seed": seed,
            "steps": steps_of(arm),
            "workers": 1 if jobs > 1 else 0,
            **({"model": model} if model else {}),
        }
        changes = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        command = ["-m", "diffucoder.cli", "train", "grpo", str(HERE / "grpo.toml"), "--resume", *changes]
        execute(command, jobs)
    told = solved(folder, name, str(folder / name / "model"), count, jobs)
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = ("step", "reward", "solved", "held_out_pass@1", "zero_variance", "scored_share", "local_ar_ness")
    kept += ("global_ar_ness", "tokens_per_forward", "tokens", "tokens_per_second")
    seconds = [key for key in lines[-1] if key.endswith("_seconds")]
    curve = [{key: line[key] for key in (*kept, *seconds) if key in line} for line in lines]
    write_result(name, {"jobs": jobs, "curve": curve, "solved": told})


def start(folder: Path, name: str, model: str | None, count: int, jobs: int) -> None:
    """What a model solves before: the `parent` of the arm `causal`, or the `start` of all others."""
    if not (RESULTS / f"{name}.json").exists():
        write_result(name, {"solved": solved(folder, name, model, count, jobs)})


def write_result(name: str, told: dict[str, Any]) -> None:
    """Keep what the report needs of a run; verdicts as a string of 0 and 1."""
    for figures in told["solved"].values():
        figures["solved"] = "".join(map(str, figures["solved"]))
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def steps_of(arm: str) -> int:
    """Optimiser steps that take about as long as the coupled arm's; what they took is in the report.

    The autoregressive arm gets as many completions: with its cache they cost next to nothing.
    """
    if arm == "causal":
        return int(RECIPE["steps"])
    inner = RECIPE["iterations"]
    cost = {name: DECODING + SCORED * views * (3 * inner + inner - 1) for name, views in PASSES.items()}
    return round(RECIPE["steps"] * cost["coupled"] / cost[arm] / inner) * inner


def solved(folder: Path, name: str, model: str | None, count: int, jobs: int) -> dict[str, Any]:
    """What a model solves of the test split drawn; start and coupled also by steps, and the first in each other way."""
    most = str(RECIPE["new_tokens"])
    ways = WAYS if name in ("start", "coupled-0") else {"drawn": WAYS["drawn"]}
    told = {way: _solved(folder, name, model, count, jobs, most, way, how)[most] for way, how in ways.items()}
    if name.startswith(("start", "coupled")):
        told |= _solved(folder, name, model, min(count, STEPS_COUNT), jobs, STEPS, "steps", ("--lower",))
    return told


def _solved(
    folder: Path, name: str, model: str | None, count: int, jobs: int, steps: str, way: str, how: Sequence[str]
) -> dict[str, Any]:
    path = folder / f"{name}.{way}.json"
    command = [str(ROOT / "benchmarks" / "tiny_accuracy.py"), "--hard", "--count", str(count), "--steps", steps, *how]
    command += ["--causal", "--base"] if name.startswith(("causal", "parent")) else []
    command += ["--figures", str(path), "--run", str(folder / "answers"), *(["--model", model] if model else [])]
    if not path.exists():
        execute(command, jobs)
    told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return told


def execute(command: list[str], jobs: int) -> None:
    """Run a command of ours, with one thread where others run beside it."""
    environment = {**os.environ, **({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})}
    print("$", sys.executable, *command, flush=True)
    done = subprocess.run([sys.executable, *command], env=environment)
    if done.returncode:  # it has said why
        raise SystemExit(done.returncode)


# --- report ----------------------------------------------------------------------------------------------------------

Result = dict[str, Any]  # what `write_result` keeps


def write_report() -> Path:
    """Tables and curves of whatever has been run."""
    before = _read("start")
    runs = {arm: [_read(path.stem) for path in sorted(RESULTS.glob(f"{arm}-*.json"))] for arm in ARMS}
    runs = {arm: found for arm, found in runs.items() if found}
    draw(ROOT / "docs" / "grpo", runs)
    count = len(before["solved"]["drawn"]["solved"])
    parts = [
        "# Coupled-GRPO at the size of a laptop",
        f"`python recipes/tiny/grpo.py`, {time.strftime('%Y-%m-%d')}; settings in recipes/tiny/grpo.toml. pass@1 is of "
        f"{count} problems of the test split (chains of three blocks, canvas of {RECIPE['new_tokens']}), run in the "
        "sandbox. Differences are between the same problems, and the same seeds; ± is half of a 95 % interval over "
        "both: Student's for seeds, the normal one for problems.",
        "## Learning",
        learning_table(before, runs),
        f"Asked and decoded as in training: in lower case, by threshold={RECIPE['threshold']} at temperature "
        f"{RECIPE['temperature']}. Every arm is given about the time of the coupled one; so arms with one pass a score "
        "take more steps. The autoregressive one, which takes a step for each token, has as many completions. Learnt "
        "from is the share of completions whose group did not all earn the same.",
        ways_table(before, runs["coupled"]) if "coupled" in runs else "Not run yet.",
        "*Greedy* is at temperature 0; *capitals* is greedy too, the same problems asked as instruction tuning asks, "
        "which no arm trains.",
        "![held-out pass@1 of each run](grpo/learning.svg)",
        "![reward of each run](grpo/reward.svg)",
        "## Fewer steps, and the order of decoding",
        steps_table(before, runs["coupled"]) if "coupled" in runs else "Not run yet.",
        f"Of {STEPS_COUNT} problems, the same for both, greedily, in lower case. Lost is against the same model at 64 "
        "steps, one token each. AR-ness@1 is of the answers at 64 steps.",
        "## Where the time goes",
        time_table(runs),
    ]
    path = ROOT / "docs" / "grpo.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def learning_table(before: Result, runs: dict[str, list[Result]]) -> str:
    """What each arm gains over its start, and against the coupled one with the same seeds."""
    rows = [_start_row("start", before)]
    coupled = {each["seed"]: each for each in runs.get("coupled", ())}
    for arm, found in runs.items():
        old = before
        if arm == "causal":
            old = _read("parent")
            rows.append(_start_row("parent", old))
        scored = mean(line["scored_share"] for each in found for line in each["curve"] if "scored_share" in line)
        cells = [f"{arm}: {ARMS[arm]}", str(steps_of(arm)), f"{mean(map(seconds, found)) / 60:.0f}", f"{scored:.0%}"]
        cells += _gains(old, found, "drawn")
        paired = [
            (_verdicts(coupled[each["seed"]], "drawn"), _verdicts(each, "drawn"))
            for each in found
            if each["seed"] in coupled
        ]
        cells.append(_interval(difference(paired)) if paired and arm not in ("coupled", "causal") else "")
        rows.append(cells)
    head = ["arm", "steps", "minutes a run", "learnt from", "pass@1 of each seed", "against its start"]
    return _table([*head, "against coupled"], rows)


def ways_table(before: Result, found: list[Result]) -> str:
    """The coupled arm before and after, however it is asked and decoded; the first seed alone but where it is drawn."""
    having = {way: [each for each in found if way in each["solved"]] for way in WAYS}
    rows = [[way, f"{before['solved'][way]['share']:.1%}", *_gains(before, having[way], way)] for way in WAYS]
    return _table(["way", "start", "coupled: pass@1 of each seed", "gain"], rows)


def _gains(old: Result, found: list[Result], way: str) -> list[str]:
    """What each seed solves one way, and the gain over before."""
    shares = ", ".join(f"{each['solved'][way]['share']:.1%}" for each in found)
    return [shares, _interval(difference([(_verdicts(old, way), _verdicts(each, way)) for each in found]))]


def _start_row(name: str, result: Result) -> list[str]:
    return [name, "", "", "", f"{result['solved']['drawn']['share']:.1%}", "", ""]


def _verdicts(result: Result, way: str) -> list[int]:
    solved: list[int] = result["solved"][way]["solved"]
    return solved


def _interval(found: tuple[float, float]) -> str:
    middle, half = found
    return f"{middle:+.1%} ± {half:.1%}"


def steps_table(before: Result, runs: list[Result]) -> str:
    """What fewer steps cost before and after, on the same problems, and the order of decoding."""
    count = min(len(_verdicts(each, "64")) for each in runs)
    rows = []
    for name, found in (("start", [before]), ("coupled", runs)):
        solved = {steps: [_verdicts(each, steps)[:count] for each in found] for steps in STEPS.split(",")}
        shares = {steps: mean(mean(verdicts) for verdicts in each) for steps, each in solved.items()}
        cells = [name, f"{shares['64']:.1%}"]
        for steps in ("32", "16"):
            lost = difference(list(zip(solved["64"], solved[steps], strict=True)))
            cells += [f"{shares[steps]:.1%}", f"{_interval(lost)} ({shares[steps] / shares['64'] - 1:+.0%})"]
        cells += [f"{mean([each['solved']['64'][which] for each in found]):.3f}" for which in ("local", "global")]
        rows.append(cells)
    head = ["model", "64 steps", "32 steps", "lost (of 64)", "16 steps", "lost (of 64)", "local AR-ness", "global"]
    return _table(head, rows)


def time_table(runs: dict[str, list[Result]]) -> str:
    """Seconds of a batch of completions and its optimiser steps, and what is done in them."""
    rows = []
    inner, batch = RECIPE["iterations"], RECIPE["batch"]
    for arm, found in runs.items():
        lines = [line for each in found for line in each["curve"]]
        part = {name: mean([line[f"{name}_seconds"] for line in lines]) for name in ("decoding", "waiting", "scoring")}
        grading = mean([line["grading_seconds"] for line in lines])
        whole = mean(map(seconds, found)) / (steps_of(arm) / inner)
        part["updates and evaluation"] = whole - sum(part.values())
        shares = [f"{seconds:.1f} ({seconds / whole:.0%})" for seconds in part.values()]
        rates = [f"{batch / part['decoding']:.1f}", f"{batch / max(grading, 1e-9):.0f}", f"{inner / whole:.2f}"]
        rows.append([arm, f"{whole:.1f}", *shares, *rates])
    head = ["arm", "seconds a batch", "decoding", "waiting for grading", "old scores", "updates and evaluation"]
    return _table([*head, "rollouts/s", "graded/s", "updates/s"], rows)


def difference(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[float, float]:
    """Mean gain in the share solved, and half of its 95 % interval, over pairs (before, after) of one seed each.

    Two things vary: seeds, whose mean has Student's distribution, and problems, which all seeds share. With one seed
    the interval is of problems alone.
    """
    gains = [[new - old for old, new in zip(*pair, strict=True)] for pair in pairs]  # of each problem
    each = [mean(gain) for gain in gains]
    problems_ = [mean(gain) for gain in zip(*gains, strict=True)]  # mean over seeds
    half = 1.96 * stdev(problems_) / math.sqrt(len(problems_))
    if len(each) > 1:
        half = math.hypot(half, STUDENT[len(each) - 1] * stdev(each) / math.sqrt(len(each)))
    return mean(each), half


def draw(target: Path, runs: dict[str, list[Result]]) -> None:
    """Held-out pass@1 and reward in the course of each run, a line for each."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "diffucoder"  # the same drawing gives the same bytes
    from matplotlib import pyplot

    target.mkdir(exist_ok=True)
    labels = {"held_out_pass@1": f"pass@1 of {RECIPE['held_out_rows']} dev problems", "reward": "reward"}
    for name, key in (("learning", "held_out_pass@1"), ("reward", "reward")):
        figure, axes = pyplot.subplots(figsize=(7, 4))
        for colour, (arm, found) in enumerate(runs.items()):
            for at, each in enumerate(found):
                points = [(line["step"] / steps_of(arm), line[key]) for line in each["curve"] if key in line]
                axes.plot(*zip(*points, strict=True), color=f"C{colour}", alpha=0.8, label=arm if at == 0 else None)
        axes.set(xlabel="share of the run", ylabel=labels[key])
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(target / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
        pyplot.close(figure)


def seconds(result: Result) -> float:
    """What a run's steps took, those that were done again after a stop left out."""
    return sum(line["tokens"] / line["tokens_per_second"] for line in result["curve"])


def _read(name: str) -> Result:
    told: Result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    told["seed"] = name.rpartition("-")[2]
    for figures in told["solved"].values():
        figures["solved"] = [int(each) for each in figures["solved"]]
    return told


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    typer.run(main)
