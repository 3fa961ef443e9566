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
    prompts = [problem.prompt.lower() if lower else problem.prompt for problem in drawn]
    if base:
        prompts = [f"# {prompt}\n" for prompt in prompts]  # as recipes/tiny/data.py writes documents
    coder = load_causal(model) if causal else DiffuCoder.load(model)
    fixed = ["block=1"] if causal else []
    kind = f"{split}{'-hard' * hard}{'-lower' * lower}-{SEED}-{'base' if base else 'chat'}"
    rows = []
    shares = {}
    for number in steps.split(","):
        params = load_settings(DecodingParams, overrides=[*(changes or ()), *fixed, f"steps={number}"])
        name = "-".join([key_of(model), kind, str(params.new_tokens), number, *(changes or ())])
        answers = answer_all(coder, prompts, params, run / f"{name}.jsonl", chat=not base)
        passed = solved([answer["text"] for answer in answers], drawn)
        shares[number] = {
            "share": mean(passed),
            "solved": "".join(["1" if each else "0" for each in passed]),
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
    standard = split == "test" and model is None and not (changes or hard or lower or base)
    update_page(RESULTS / "tiny_accuracy.md" if standard else run / "tiny_accuracy.md", sections)


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
    return mean(values) if values else None


def row_of(answers: Sequence[Answer], passed: Sequence[bool], drawn: Sequence[Problem]) -> list[str]:
    """The cells of the table for one number of steps."""
    low, high = wilson(sum(passed), len(passed))
    cells = [f"**{mean(passed):.1%}**", f"{low:.1%} – {high:.1%}"]
    for kind in ("chain", "branch", "guard"):
        verdicts = [ok for ok, problem in zip(passed, drawn, strict=True) if problem.composition[0] == kind]
        cells.append(f"{mean(verdicts):.1%}" if verdicts else "–")
    passes = mean(answer["passes"] for answer in answers)
    tokens = mean(answer["tokens"] for answer in answers)
    parse = mean(parses(answer["text"]) for answer in answers)
    return [*cells, f"{parse:.1%}", f"{passes:.1f}", f"{tokens / passes:.2f}"]


def parses(text: str) -> bool:
    try:
        compile(program_from(text), "answer", "exec")
    except (SyntaxError, ValueError):
        return False
    return True


if __name__ == "__main__":
    typer.run(main)
