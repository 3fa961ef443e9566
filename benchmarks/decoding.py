"""How fast the shipped model decodes one request on this machine, at which quality: a row and a dot for each way.

    python benchmarks/decoding.py                           # every way, 2,000 problems of the test split: an hour
    python benchmarks/decoding.py --split dev --count 200   # for decisions during development
    python benchmarks/decoding.py --ways fast --against reference    # what the preset fast gains and costs: 20 minutes
    python benchmarks/decoding.py --ways "fast; threshold=0.9 block=32"    # any settings of decoding

Tokens per second are of single requests on an otherwise quiet machine. The ways take turns at each request, so that a
machine that is faster for a while is so for all of them. Only tokens before the terminator count. pass@1 is of the same
ways in batches, answers run in the sandbox; differences are paired by problem. A matmul of the same run is the ceiling.
Table and plot go to benchmarks/results/.

The script also runs with an older package: PYTHONPATH=OLD_CHECKOUT python benchmarks/decoding.py ... --output FILE.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer
from common import RESULTS, key_of, machine, paired_gain, solved

import diffucoder
from diffucoder import DecodingParams, DiffuCoder
from diffucoder.bench import matmul_rate
from diffucoder.config import load_settings
from recipes.report import drawing, provenance, table, update_page
from recipes.tiny.problems import Problem, problems

PRESETS = {"reference": "preset=reference policy=entropy steps=64", "exact": "", "fast": "preset=fast"}
FRONTIER = (
    *("steps=32", "steps=16", "steps=8"),
    *("threshold=0.99", "threshold=0.95", "threshold=0.9", "threshold=0.8", "threshold=0.9 policy=margin"),
    *("factor=0.25", "factor=0.5", "factor=1.0"),
    *("entropy_bound=0.01", "entropy_bound=0.02", "entropy_bound=0.05", "entropy_bound=0.1", "entropy_bound=0.2"),
    *("entropy_bound=0.01 cache=delayed", "entropy_bound=0.05 cache=delayed", "entropy_bound=0.1 cache=delayed"),
    *("entropy_bound=0.01 block=64 cache=prefix", "entropy_bound=0.1 block=32 cache=dual"),
    *("threshold=0.9 revoke=0.25", "entropy_bound=0.1 revoke=0.125"),
)
BATCH = 32
WARM_UP = 3  # requests before the timed ones


def main(
    ways: Annotated[str, typer.Option(help="presets or settings, separated by semicolons; default: all")] = "",
    split: Annotated[str, typer.Option(help="test for figures to report, dev for decisions")] = "test",
    count: Annotated[int, typer.Option(help="problems behind pass@1")] = 2000,
    against: Annotated[str, typer.Option(help="the way that pass@1 is compared with")] = "exact",
    timed: Annotated[int, typer.Option(help="requests that are timed")] = 40,
    output: Annotated[Path | None, typer.Option(help="file of the table; default: in benchmarks/results/")] = None,
) -> None:
    """Time and grade every way, and write the table."""
    names = [name.strip() for name in ways.split(";")] if ways else [*PRESETS, *FRONTIER]
    names = list(dict.fromkeys([against, *names]))
    settings = {name: load_settings(DecodingParams, overrides=PRESETS.get(name, name).split()) for name in names}
    coder = DiffuCoder.load()
    drawn = list(problems(split, count, seed=1))  # type: ignore[arg-type]  # it checks
    rows = time_in_turns(coder, drawn[:timed], settings)
    for name, params in settings.items():
        print(json.dumps({"way": name, **rows[name]}), flush=True)
        rows[name]["solved"] = solved(answers(coder, drawn, params), drawn)
    ceiling = matmul_rate(coder.model.dtype, coder.model.device)
    sections = {
        "run": provenance(
            "python benchmarks/decoding.py",
            f"{timed} requests timed one by one; pass@1 of {count} problems of the {split} split, greedy",
            f"model {key_of(None)} in {coder.model.dtype}; package in {Path(diffucoder.__file__).parent}",
            f"{machine()}, where a matmul of 1024³ reaches {ceiling / 1e9:.0f} GFLOP/s",
        ),
        "table": table_of(rows, against),
    }
    path = output or RESULTS / ("decoding.md" if split == "test" and not ways else f"decoding_{split}.md")
    update_page(path, sections)
    with drawing(path.with_suffix(".svg"), size=(9, 6)) as axes:
        for name, row in rows.items():
            place = (row["tokens_per_second"], 100 * mean(row["solved"]))
            axes.scatter(*place, s=18)
            axes.annotate(name, place, fontsize=7, xytext=(4, 2), textcoords="offset points")
        axes.set(xscale="log", xlabel="tokens per second, one request", ylabel="pass@1 (%)")


def time_in_turns(
    coder: DiffuCoder, drawn: Sequence[Problem], ways: Mapping[str, DecodingParams]
) -> dict[str, dict[str, Any]]:
    """Speed and passes of each way, over single requests."""
    totals = {name: {"tokens": 0, "passes": 0, "seconds": 0.0} for name in ways}
    for params in ways.values():
        for problem in drawn[:WARM_UP]:
            coder.generate(problem.prompt, params)
    for problem in drawn:
        for name, params in ways.items():
            result = coder.generate(problem.prompt, params)
            totals[name]["tokens"] += len(result.tokens)
            totals[name]["passes"] += result.forward_passes
            totals[name]["seconds"] += result.seconds
    figures = {}
    for name, total in totals.items():
        figures[name] = {
            "tokens_per_second": total["tokens"] / total["seconds"],
            "tokens_per_forward": total["tokens"] / total["passes"],
            "passes": total["passes"] / len(drawn),
            "ms": 1e3 * total["seconds"] / total["passes"],
        }
    return figures


def answers(coder: DiffuCoder, drawn: Sequence[Problem], params: DecodingParams) -> list[str]:
    """The answer to each problem, decoded in batches."""
    texts = []
    for start in range(0, len(drawn), BATCH):
        prompts = [problem.prompt for problem in drawn[start : start + BATCH]]
        for result in coder.generate_batch(prompts, params):
            texts.append(result.text)
    return texts


def table_of(rows: dict[str, dict[str, Any]], against: str) -> str:
    base = rows.get("reference", rows[against])
    lines = []
    for name, row in rows.items():
        gain = "" if name == against else paired_gain(rows[against]["solved"], row["solved"])
        lines.append([
            f"{name} (`{PRESETS[name]}`)" if PRESETS.get(name) else name,
            f"{row['tokens_per_second']:.0f}",
            f"{row['tokens_per_second'] / base['tokens_per_second']:.1f}",
            f"{row['tokens_per_forward']:.2f}",
            f"{row['passes']:.1f}",
            f"{row['ms']:.1f}",
            f"{mean(row['solved']):.1%}",
            gain,
        ])  # fmt: skip
    head = ["way", "tokens/s", "× reference", "tokens a pass", "passes", "ms a pass", "pass@1", f"against {against}"]
    return table(head, lines)


if __name__ == "__main__":
    typer.run(main)
