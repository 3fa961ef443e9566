"""How many held-out tiny problems a model solves, with intervals, by number of steps.

    python benchmarks/tiny_accuracy.py    # the shipped model, 2,000 problems: `make tiny-eval`

`diffucoder eval --benchmark tiny` measures 500 of the same problems. The laboratories use this script. The table of the
shipped model goes to benchmarks/results/tiny_accuracy.md.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated

import torch
import typer
from common import RESULTS, decode, model_id, solved, write_page

from diffucoder import DecodingParams, DiffuCoder, Generation
from diffucoder.config import load_settings
from diffucoder.files import write_json
from diffucoder.metrics import wilson
from diffucoder.models.checkpoint import load_denoiser, load_tokenizer
from recipes.tiny.problems import Problem, problems

HEAD = ("steps", "solved", "95 % interval", "chains", "branches", "guards", "passes", "tokens per pass")


def main(
    model: Annotated[str | None, typer.Option(help="folder; default: the shipped model")] = None,
    split: Annotated[str, typer.Option(help="test for figures to report, dev for decisions")] = "test",
    count: Annotated[int, typer.Option(help="distinct problems")] = 2000,
    steps: Annotated[str, typer.Option(help="numbers of steps, separated by commas")] = "64,32,16",
    changes: Annotated[list[str] | None, typer.Option("--set", help="name=value of decoding; repeatable")] = None,
    hard: Annotated[bool, typer.Option("--hard", help="only chains of three blocks")] = False,
    lower: Annotated[bool, typer.Option("--lower", help="requests in lower case, unlike all tuning examples")] = False,
    base: Annotated[bool, typer.Option("--base", help="ask in a comment: for models without a chat template")] = False,
    causal: Annotated[bool, typer.Option("--causal", help="an autoregressive model, decoded left to right")] = False,
    figures: Annotated[Path | None, typer.Option(help="write the figures to this JSON file instead")] = None,
) -> None:
    """Ask, grade, and write the table or the figures."""
    drawn = list(problems(split, count, seed=1, hard=hard))
    prompts = []
    for problem in drawn:
        prompt = problem.prompt.lower() if lower else problem.prompt
        prompts.append(f"# {prompt}\n" if base else prompt)  # as recipes/tiny/data.py writes documents
    overrides = list(changes or ())
    if causal:
        coder = load_causal(model)
        overrides.append("block=1")
    else:
        coder = DiffuCoder.load(model)
    rows = []
    shares = {}
    for number in steps.split(","):
        params = load_settings(DecodingParams, overrides=[*overrides, f"steps={number}"])
        results = list(decode(coder, prompts, params, chat=not base))
        verdicts = solved([result.text for result in results], drawn)
        digits = "".join([str(int(verdict)) for verdict in verdicts])
        shares[number] = {"share": mean(verdicts), "solved": digits}
        rows.append([number, *row_of(results, verdicts, drawn)])
        print(*rows[-1], flush=True)
    if figures is not None:
        write_json(figures, shares)
    elif model is None and not overrides and split == "test" and not (hard or lower or base):
        details = (f"{count} problems of the test split (seed 1); model {model_id(None)}",)
        write_page(RESULTS / "tiny_accuracy.md", "python benchmarks/tiny_accuracy.py", details, HEAD, rows)


def load_causal(model: str | None) -> DiffuCoder:
    """An autoregressive model: it attends to the left only, and the blocks of one position are filled in order."""
    from recipes.tiny.causal import CausalModel  # late: it brings training

    tokenizer = load_tokenizer(model)
    parent = load_denoiser(model, dtype=torch.float32, mask_id=tokenizer.mask_id)
    return DiffuCoder(CausalModel(parent.model, mask_id=parent.mask_id), tokenizer)


def row_of(results: Sequence[Generation], verdicts: Sequence[bool], drawn: Sequence[Problem]) -> list[str]:
    """The cells of the table for one number of steps."""
    low, high = wilson(sum(verdicts), len(verdicts))
    cells = [f"**{mean(verdicts):.1%}**", f"{low:.1%} – {high:.1%}"]
    for kind in ("chain", "branch", "guard"):
        of_kind = [verdict for verdict, problem in zip(verdicts, drawn, strict=True) if problem.composition[0] == kind]
        cells.append(f"{mean(of_kind):.1%}" if of_kind else "–")
    passes = mean([result.forward_passes for result in results])
    tokens = mean([len(result.tokens) for result in results])
    return [*cells, f"{passes:.1f}", f"{tokens / passes:.2f}"]


if __name__ == "__main__":
    typer.run(main)
