"""How many held-out problems a model solves, at full, half and a quarter of the steps: pass@1, greedy, in the sandbox.

    python benchmarks/tiny_accuracy.py                       # the shipped model, 2,000 problems of the test split
    python benchmarks/tiny_accuracy.py --split dev --count 200 --steps 64
    python benchmarks/tiny_accuracy.py --model runs/tiny-lab/parent/model --causal --base --split dev --count 200

Answers are kept in the run folder, so a stopped run goes on where it was. The table goes to
benchmarks/results/tiny_accuracy.md; `--figures` writes the shares as JSON instead.

`diffucoder evaluate tiny` asks 500 of the same problems. This script draws any number, of either split, hard ones and
autoregressive models too; the laboratories use it.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer
from common import RESULTS, key_of, machine, solved
from rich.progress import track

from diffucoder import DecodingParams, DiffuCoder, Generation
from diffucoder.config import load_settings
from diffucoder.decoding.trace import commit_order, global_ar_ness, local_ar_ness
from diffucoder.files import append_jsonl, read_whole_lines, write_json, write_jsonl
from diffucoder.grading.extract import program_from
from diffucoder.models.checkpoint import load_denoiser, load_tokenizer
from recipes.report import provenance, table, update_page, wilson
from recipes.tiny.problems import Problem, problems

Answer = dict[str, Any]  # text, passes, tokens, and AR-ness where there is an order
SEED = 1  # of the problems
BATCH = 32  # requests decoded together


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
    run: Annotated[Path, typer.Option(help="folder for the answers")] = Path("runs/tiny-accuracy"),
) -> None:
    """Ask, grade, and write the table or the figures."""
    drawn = list(problems(split, count, seed=SEED, hard=hard))  # type: ignore[arg-type]  # `problems` checks it
    prompts = []
    for problem in drawn:
        prompt = problem.prompt.lower() if lower else problem.prompt
        prompts.append(f"# {prompt}\n" if base else prompt)  # as recipes/tiny/data.py writes documents
    overrides = list(changes or ())
    kind = [split, *[name for name, given in (("hard", hard), ("lower", lower), ("base", base)) if given]]
    if causal:
        coder = load_causal(model)
        overrides.append("block=1")
    else:
        coder = DiffuCoder.load(model)
    rows = []
    shares = {}
    for number in steps.split(","):
        params = load_settings(DecodingParams, overrides=[*overrides, f"steps={number}"])
        name = "-".join([key_of(model), *kind, str(params.new_tokens), number, *overrides])
        answers = answer_all(coder, prompts, params, run / f"{name}.jsonl", chat=not base)
        passed = solved([answer["text"] for answer in answers], drawn)
        shares[number] = {
            "share": mean(passed),
            "solved": "".join([str(int(each)) for each in passed]),
            "local": mean_of(answers, "local"),
            "global": mean_of(answers, "global"),
        }
        rows.append([number, *row_of(answers, passed, drawn)])
        print(*rows[-1], flush=True)
    if figures is not None:
        write_json(figures, shares)
        return
    command = "python benchmarks/tiny_accuracy.py"
    details = f"{count} problems of the {split} split (seed {SEED}); model {key_of(model)}"
    head = ["steps", "solved", "95 % interval", "chains", "branches", "guards", "parse", "passes", "tokens per pass"]
    sections = {"run": provenance(command, details, machine()), "table": table(head, rows)}
    folder = run
    if model is None and not overrides and kind == ["test"]:
        folder = RESULTS
    update_page(folder / "tiny_accuracy.md", sections)


def load_causal(model: str | None) -> DiffuCoder:
    """An autoregressive model: it attends to the left only, and the blocks of one position are filled in order."""
    from recipes.tiny.causal import CausalModel  # late: it brings training

    tokenizer = load_tokenizer(model)
    parent = load_denoiser(model, dtype=torch.float32, mask_id=tokenizer.mask_id)
    return DiffuCoder(CausalModel(parent.model, mask_id=parent.mask_id), tokenizer)


def answer_of(result: Generation) -> Answer:
    """Text, cost, and AR-ness@1 of the answer with its terminator, where there is an order."""
    answer: Answer = {"text": result.text, "passes": result.forward_passes, "tokens": len(result.tokens)}
    order = commit_order(result.trace.steps[: len(result.tokens) + 1])
    for name, ar_ness in (("local", local_ar_ness(order, 1)), ("global", global_ar_ness(order, 1))):
        if not math.isnan(ar_ness):
            answer[name] = round(ar_ness, 4)
    return answer


def answer_all(
    coder: DiffuCoder, prompts: Sequence[str], params: DecodingParams, path: Path, *, chat: bool
) -> list[Answer]:
    """An answer to each prompt: those that `path` has already, then the others, which are added to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    answers = read_whole_lines(path)
    write_jsonl(path, answers)  # a stop may have cut the last line short
    for start in track(range(len(answers), len(prompts), BATCH), description=f"{params.steps} steps"):
        results = coder.generate_batch(prompts[start : start + BATCH], params, chat=chat)
        fresh = [answer_of(result) for result in results]
        append_jsonl(path, fresh)
        answers += fresh
    return answers[: len(prompts)]


def mean_of(answers: Sequence[Answer], name: str) -> float | None:
    values = [answer[name] for answer in answers if name in answer]
    if not values:
        return None
    return mean(values)


def row_of(answers: Sequence[Answer], passed: Sequence[bool], drawn: Sequence[Problem]) -> list[str]:
    """The cells of the table for one number of steps."""
    low, high = wilson(sum(passed), len(passed))
    cells = [f"**{mean(passed):.1%}**", f"{low:.1%} – {high:.1%}"]
    by_kind: dict[str, list[bool]] = {"chain": [], "branch": [], "guard": []}
    for verdict, problem in zip(passed, drawn, strict=True):
        by_kind[problem.composition[0]].append(verdict)
    for verdicts in by_kind.values():
        cells.append(f"{mean(verdicts):.1%}" if verdicts else "–")
    parse = mean(parses(answer["text"]) for answer in answers)
    passes = mean_of(answers, "passes") or 0.0
    tokens = mean_of(answers, "tokens") or 0.0
    return [*cells, f"{parse:.1%}", f"{passes:.1f}", f"{tokens / passes:.2f}"]


def parses(text: str) -> bool:
    try:
        compile(program_from(text), "answer", "exec")
    except (SyntaxError, ValueError):
        return False
    return True


if __name__ == "__main__":
    typer.run(main)
