"""How fast the shipped model decodes one request on this machine, at which quality: a row and a dot for each way.

    python benchmarks/decoding.py                           # every way, 2,000 problems of the test split: an hour
    python benchmarks/decoding.py --split dev --count 200   # to decide by
    python benchmarks/decoding.py --ways fast --against reference    # what the preset fast gains and costs: 20 minutes

Tokens per second are of single requests, timed one after the other on an otherwise quiet machine; only tokens before
the terminator count. pass@1 is of the same ways in batches, answers run in the sandbox; differences are
paired by problem. The matmul of the same run is the ceiling beside them. Table and plot go to benchmarks/results/.
"""

import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import typer
from diffucoder.decoding.generate import Generation
from tiny_accuracy import key_of, written
from torch import Tensor

from diffucoder import DecodingParams, DiffuCoder
from diffucoder.bench import matmul_rate, operations
from diffucoder.config import load_settings
from diffucoder.grading.extract import program_from
from diffucoder.grading.grade import grade_many
from diffucoder.problems import Problem, problems

RESULTS = Path(__file__).parent / "results"
WAYS = {
    "reference": "preset=reference policy=entropy steps=64",
    "exact": "",
    "fast": "preset=fast",
    "steps 32": "steps=32",
    "steps 16": "steps=16",
    "steps 8": "steps=8",
    "threshold 0.99": "threshold=0.99",
    "threshold 0.98": "threshold=0.98",
    "threshold 0.95": "threshold=0.95",
    "threshold 0.9": "threshold=0.9",
    "threshold 0.8": "threshold=0.8",
    "threshold 0.6": "threshold=0.6",
    "margin 0.9": "threshold=0.9 policy=margin",
    "factor 0.25": "factor=0.25",
    "factor 0.5": "factor=0.5",
    "factor 1": "factor=1.0",
    "entropy bound 0.01": "entropy_bound=0.01",
    "entropy bound 0.01, prompt kept": "entropy_bound=0.01 block=64 cache=prefix",
    "entropy bound 0.01, prompt kept, drafts 3": "entropy_bound=0.01 block=64 cache=prefix drafts=3",
    "entropy bound 0.01, block 32, dual": "entropy_bound=0.01 block=32 cache=dual",
    "entropy bound 0.01, horizon 32": "entropy_bound=0.01 horizon=32",
    "entropy bound 0.01, drafts 3": "entropy_bound=0.01 drafts=3",
    "entropy bound 0.01, branches 3": "entropy_bound=0.01 branches=3",
    "entropy bound 0.02": "entropy_bound=0.02",
    "entropy bound 0.02, prompt kept": "entropy_bound=0.02 block=64 cache=prefix",
    "entropy bound 0.05": "entropy_bound=0.05",
    "entropy bound 0.1": "entropy_bound=0.1",
    "entropy bound 0.2": "entropy_bound=0.2",
    "entropy bound 0.4": "entropy_bound=0.4",
    "AR bound 0.06": "ar_bound=0.06",
    "AR bound 0.12": "ar_bound=0.12",
    "adaptive": "adaptive=true policy=max_prob",
    "adaptive, revoke 1/8": "adaptive=true policy=max_prob revoke=0.125",
    "drafts 4": "drafts=4",
    "block 16": "block=16",
    "block 16, dual": "block=16 cache=dual",
    "threshold 0.99, block 32, dual": "threshold=0.99 block=32 cache=dual",
    "threshold 0.9, block 16, dual": "threshold=0.9 block=16 cache=dual",
    "threshold 0.9, block 32, dual": "threshold=0.9 block=32 cache=dual",
    "threshold 0.9, block 32, prefix": "threshold=0.9 block=32 cache=prefix",
    "threshold 0.9, horizon 24": "threshold=0.9 horizon=24",
    "threshold 0.9, revoke 1/4": "threshold=0.9 revoke=0.25",
    "entropy bound 0.1, block 32": "entropy_bound=0.1 block=32",
    "entropy bound 0.1, block 32, dual": "entropy_bound=0.1 block=32 cache=dual",
    "entropy bound 0.1, block 16, dual": "entropy_bound=0.1 block=16 cache=dual",
    "entropy bound 0.1, horizon 24": "entropy_bound=0.1 horizon=24",
    "entropy bound 0.1, horizon 32": "entropy_bound=0.1 horizon=32",
    "entropy bound 0.1, branches 3": "entropy_bound=0.1 branches=3",
    "entropy bound 0.1, drafts 3": "entropy_bound=0.1 drafts=3",
    "entropy bound 0.1, revoke 1/8": "entropy_bound=0.1 revoke=0.125",
    "threshold 0.9, branches 3": "threshold=0.9 branches=3",
    "threshold 0.9, drafts 3": "threshold=0.9 drafts=3",
}


def main(
    ways: Annotated[str, typer.Option(help="names of WAYS, separated by semicolons; all if left out")] = "",
    split: Annotated[str, typer.Option(help="test for figures to report, dev for decisions")] = "test",
    count: Annotated[int, typer.Option(help="problems behind pass@1")] = 2000,
    against: Annotated[str, typer.Option(help="the way that pass@1 is compared with")] = "exact",
    timed: Annotated[int, typer.Option(help="requests that are timed")] = 40,
    run: Annotated[Path, typer.Option(help="folder for the answers")] = Path("runs/decoding"),
) -> None:
    """Time and grade every way, and write the table."""
    names = [name.strip() for name in ways.split(";")] if ways else list(WAYS)
    if unknown := [name for name in (against, *names) if name not in WAYS]:
        raise typer.BadParameter(f"way {unknown[0]!r} is not one of: {'; '.join(WAYS)}")
    coder = DiffuCoder.load()
    drawn = list(problems(split, count, seed=1))  # type: ignore[arg-type]  # it checks
    names = list(dict.fromkeys([against, *names]))
    settings = {name: load_settings(DecodingParams, overrides=WAYS[name].split()) for name in names}
    rows = timing(coder, [problem.prompt for problem in drawn[:timed]], settings)
    for name, params in settings.items():
        print(json.dumps({"way": name, **rows[name]}), flush=True)
        rows[name]["solved"] = solved(coder, drawn, params, run / f"{key_of(None)}-{split}-{name}.jsonl")
    ceiling = matmul_rate(coder.model.dtype, coder.model.device)
    path = RESULTS / ("decoding.md" if split == "test" and not ways else f"decoding_{split}.md")
    path.write_text(
        report(coder, rows, against, split, count, timed, ceiling, path.with_suffix(".svg").name), encoding="utf-8"
    )
    draw(path.with_suffix(".svg"), rows)
    print(f"written to {path}")


def timing(coder: DiffuCoder, prompts: Sequence[str], ways: Mapping[str, DecodingParams]) -> dict[str, dict[str, Any]]:
    """Of each way: tokens per second and pass of single requests, and what a pass is made of, in milliseconds.

    The ways take turns at each request, so that a machine that is quicker for a while is so for all of them.
    """
    splits = {name: Split(coder) for name in ways}
    results: dict[str, list[Generation]] = {name: [] for name in ways}
    for params in ways.values():
        for prompt in prompts[:3]:
            coder.generate(prompt, params)
    for prompt in prompts:
        for name, params in ways.items():
            with splits[name]:
                results[name].append(coder.generate(prompt, params))
    return {name: _figures(results[name], splits[name]) for name in ways}


def _figures(results: Sequence[Generation], split: "Split") -> dict[str, Any]:
    passes = sum(result.forward_passes for result in results)
    tokens = sum(len(result.tokens) for result in results)
    seconds = sum(result.seconds for result in results)
    parts = {name: 1e3 * spent / split.calls for name, spent in split.spent.items()}
    whole = 1e3 * seconds / split.calls
    return {
        "tokens_per_second": tokens / seconds,
        "tokens_per_forward": tokens / passes,
        "passes": passes / len(results),
        "ms": whole,
        **parts,
        "python": whole - sum(parts.values()),
        "operations": split.operations / split.calls,
    }


class Split:
    """Times the body, and the head with the sampler, of every call of a model, for as long as it is entered."""

    def __init__(self, coder: DiffuCoder) -> None:
        self.model, self.calls, self.operations = coder.model, 0, 0.0
        self.spent = {"body": 0.0, "head and sampler": 0.0}

    def __enter__(self) -> "Split":
        forward = self.model.forward

        def timed(tokens: Tensor, **more: Any) -> Any:  # Any: as the Denoiser's
            began, inside = time.perf_counter(), 0.0
            reduce = more["reduce"]

            def sampled(logits: Tensor, chunk: slice) -> Any:
                nonlocal inside
                start = time.perf_counter()
                found = reduce(logits, chunk)
                inside += time.perf_counter() - start
                return found

            found = forward(tokens, **{**more, "reduce": sampled})
            self.calls += 1
            self.operations += operations(self.model, tokens, more["rows"])
            self.spent["head and sampler"] += inside
            self.spent["body"] += time.perf_counter() - began - inside
            return found

        self.model.forward = timed  # type: ignore[method-assign]  # for as long as this is entered
        return self

    def __exit__(self, *_: object) -> None:
        del self.model.forward


def solved(coder: DiffuCoder, drawn: Sequence[Problem], params: DecodingParams, path: Path) -> list[bool]:
    """Whether each problem's greedy answer passes its tests."""

    def answer(prompts: Sequence[str], params: DecodingParams) -> list[dict[str, Any]]:
        return [{"text": result.text} for result in coder.generate_batch(prompts, params)]

    answers = written(answer, [problem.prompt for problem in drawn], params, path, 32)
    verdicts = grade_many([(program_from(a["text"]), p.tests) for a, p in zip(answers, drawn, strict=True)])
    return [verdict.passed for verdict in verdicts]


def report(
    coder: DiffuCoder,
    rows: dict[str, dict[str, Any]],
    against: str,
    split: str,
    count: int,
    timed: int,
    ceiling: float,
    plot: str,
) -> str:
    base = rows[against]
    lines = []
    for name, row in rows.items():
        differences = [int(a) - int(b) for a, b in zip(row["solved"], base["solved"], strict=True)]
        half = 1.96 * stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
        share = row["operations"] / (row["ms"] / 1e3) / ceiling
        cells = [
            f"{row['tokens_per_second']:.0f}",
            f"{row['tokens_per_second'] / rows.get('reference', base)['tokens_per_second']:.1f}",
            f"{row['tokens_per_forward']:.2f}",
            f"{row['passes']:.1f}",
            f"{row['ms']:.1f}",
            f"{row['body']:.1f} / {row['head and sampler']:.1f} / {row['python']:.1f}",
            f"{share:.0%}",
            f"{mean(row['solved']):.1%}",
            "" if name == against else f"{mean(differences):+.1%} ± {half:.1%}",
        ]
        lines.append(f"| {name} | `{WAYS[name] or 'as it is'}` | {' | '.join(cells)} |")
    head = ["way", "settings", "tokens/s", "× reference", "tokens a pass", "passes", "ms a pass"]
    head += ["body / head, sampler / Python", "of matmul", "pass@1", f"against {against}"]
    return "\n".join(
        [
            "# Decoding one request with the shipped model",
            "",
            f"`python benchmarks/decoding.py`, {time.strftime('%Y-%m-%d')}: {timed} requests timed one by one, "
            f"the ways in turns; pass@1 of {count} problems of the {split} split, greedy, canvas of 64; ± is half of a "
            f"paired 95 % interval. "
            f"Model {key_of(None)}, {str(coder.model.dtype).removeprefix('torch.')} on {coder.model.device}, "
            f"{torch.get_num_threads()} threads; a matmul of 1024³ reaches {ceiling / 1e9:.0f} GFLOP/s in the same "
            f"run. Python {platform.python_version()}, torch {torch.__version__}.",
            "",
            f"| {' | '.join(head)} |",
            f"| --- | --- |{' --: |' * 9}",
            *lines,
            "",
            f"![quality against speed]({plot})",
            "",
        ]
    )


def draw(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """pass@1 against tokens per second, a dot for each way."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "diffucoder"  # the same drawing gives the same bytes
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    for name, row in rows.items():
        at = row["tokens_per_second"], 100 * mean(row["solved"])
        axes.scatter(*at, s=18)
        axes.annotate(name, at, fontsize=7, xytext=(4, 2), textcoords="offset points")
    axes.set(xscale="log", xlabel="tokens per second, one request", ylabel="pass@1 (%)")
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    typer.run(main)
