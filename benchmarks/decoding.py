"""How fast the shipped model decodes one request on this machine, at which quality: a row and a dot for each way.

    python benchmarks/decoding.py                           # every way, 2,000 problems of the test split: an hour
    python benchmarks/decoding.py --split dev --count 200   # for decisions during development
    python benchmarks/decoding.py --ways fast --against reference    # what the preset fast gains and costs: 20 minutes
    python benchmarks/decoding.py --ways "fast; threshold=0.9 block=32"    # any settings of decoding

Tokens per second are of single requests, for which the ways take turns; only tokens before the terminator count. pass@1
is of the same ways in batches; differences are paired by problem. Table and plot go to benchmarks/results/. The script
also runs with an older package: PYTHONPATH=OLD_CHECKOUT python benchmarks/decoding.py ... --output FILE.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated

import typer
from common import RESULTS, decode, model_id, paired_gain, solved, write_page

import diffucoder
from diffucoder import DecodingParams, DiffuCoder
from diffucoder.bench import matmul_rate
from diffucoder.config import load_settings
from recipes.report import drawing
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


@dataclass
class Way:
    """One way to decode, and what it took."""

    name: str
    params: DecodingParams
    tokens: int = 0  # of the timed requests, as passes and seconds
    passes: int = 0
    seconds: float = 0.0
    solved: Sequence[bool] = ()

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


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
    measured = []
    for name in dict.fromkeys([against, *names]):
        params = load_settings(DecodingParams, overrides=PRESETS.get(name, name).split())
        measured.append(Way(name, params))
    coder = DiffuCoder.load()
    drawn = list(problems(split, count, seed=1))
    time_in_turns(coder, drawn[:timed], measured)
    for way in measured:
        results = decode(coder, [problem.prompt for problem in drawn], way.params)
        way.solved = solved([result.text for result in results], drawn)
        print(f"{way.name}: {way.speed:.0f} tokens/s, {mean(way.solved):.1%}", flush=True)
    ceiling = matmul_rate(coder.model.dtype, coder.model.device)
    details = (
        f"{timed} requests timed one by one; pass@1 of {count} problems of the {split} split, greedy",
        f"model {model_id(None)} in {coder.model.dtype}; package in {Path(diffucoder.__file__).parent}",
        f"a matmul of 1024³ reaches {ceiling / 1e9:.0f} GFLOP/s",
    )
    head = ["way", "tokens/s", "× reference", "tokens a pass", "passes", "ms a pass", "pass@1", f"against {against}"]
    path = output or RESULTS / ("decoding.md" if split == "test" and not ways else f"decoding_{split}.md")
    write_page(path, "python benchmarks/decoding.py", details, head, rows_of(measured, timed))
    with drawing(path.with_suffix(".svg"), size=(9, 6)) as axes:
        for way in measured:
            place = (way.speed, 100 * mean(way.solved))
            axes.scatter(*place, s=18)
            axes.annotate(way.name, place, fontsize=7, xytext=(4, 2), textcoords="offset points")
        axes.set(xscale="log", xlabel="tokens per second, one request", ylabel="pass@1 (%)")


def time_in_turns(coder: DiffuCoder, drawn: Sequence[Problem], ways: Sequence[Way]) -> None:
    """Add up tokens, passes and seconds of each way over single requests."""
    for way in ways:
        for problem in drawn[:3]:  # warm-up
            coder.generate(problem.prompt, way.params)
    for problem in drawn:
        for way in ways:
            result = coder.generate(problem.prompt, way.params)
            way.tokens += len(result.tokens)
            way.passes += result.forward_passes
            way.seconds += result.seconds


def rows_of(ways: Sequence[Way], timed: int) -> list[list[str]]:
    """The cells of each way; the first one is what the others are compared with."""
    base = next((way for way in ways if way.name == "reference"), ways[0])
    rows = []
    for way in ways:
        rows.append([
            f"{way.name} (`{PRESETS[way.name]}`)" if PRESETS.get(way.name) else way.name,
            f"{way.speed:.0f}",
            f"{way.speed / base.speed:.1f}",
            f"{way.tokens / way.passes:.2f}",
            f"{way.passes / timed:.1f}",
            f"{1e3 * way.seconds / way.passes:.1f}",
            f"{mean(way.solved):.1%}",
            "" if way is ways[0] else paired_gain(ways[0].solved, way.solved),
        ])  # fmt: skip
    return rows


if __name__ == "__main__":
    typer.run(main)
