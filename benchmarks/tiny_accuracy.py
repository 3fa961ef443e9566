"""How many held-out problems a model solves, at full, half and a quarter of the steps: pass@1, greedy, in the sandbox.

    python benchmarks/tiny_accuracy.py                       # the shipped model, 2,000 problems of the test split
    python benchmarks/tiny_accuracy.py --split dev --count 200 --steps 64
    python benchmarks/tiny_accuracy.py --model runs/tiny-lab/parent/model --causal --base --split dev --count 200

Answers are written to the run folder as they come and are not asked for twice, so a stopped run goes on where it was.
The table goes to benchmarks/results/tiny_accuracy.md; `--figures` writes the shares as JSON instead.
"""

import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffucoder.decoding.generate import Generation
from rich.progress import track
from transformers import AutoModelForCausalLM

from diffucoder import DecodingParams, DiffuCoder
from diffucoder.config import load_settings
from diffucoder.decoding.trace import commit_order, global_ar_ness, local_ar_ness
from diffucoder.grading.extract import program_from
from diffucoder.grading.grade import grade_many
from diffucoder.models.checkpoint import load_tokenizer
from diffucoder.models.hub import SHIPPED
from diffucoder.problems import Problem, problems

Answer = Callable[[Sequence[str], DecodingParams], list[dict[str, Any]]]
RESULTS = Path(__file__).parent / "results" / "tiny_accuracy.md"


def main(
    model: Annotated[str | None, typer.Option(help="folder; the shipped model if left out")] = None,
    split: Annotated[str, typer.Option(help="test for figures to report, dev for decisions")] = "test",
    count: Annotated[int, typer.Option(help="distinct problems")] = 2000,
    new_tokens: Annotated[int, typer.Option(help="canvas behind the request")] = 64,
    steps: Annotated[str, typer.Option(help="steps to measure at, separated by commas")] = "64,32,16",
    changes: Annotated[list[str] | None, typer.Option("--set", help="name=value of decoding; repeatable")] = None,
    seed: Annotated[int, typer.Option(help="of the problems drawn")] = 1,
    hard: Annotated[bool, typer.Option("--hard", help="chains of three blocks only")] = False,
    lower: Annotated[bool, typer.Option("--lower", help="requests in lower case, as no tuning example is")] = False,
    batch: Annotated[int, typer.Option(help="requests decoded together")] = 32,
    base: Annotated[bool, typer.Option("--base", help="ask in a comment, as a model that knows no chat")] = False,
    causal: Annotated[bool, typer.Option("--causal", help="an autoregressive model: left to right, always")] = False,
    figures: Annotated[Path | None, typer.Option(help="write what each number of steps gave to this JSON file")] = None,
    run: Annotated[Path, typer.Option(help="folder for the answers")] = Path("runs/tiny-accuracy"),
) -> None:
    drawn = list(problems(split, count, seed=seed, hard=hard))  # type: ignore[arg-type]  # `problems` checks it
    prompts = [p.prompt.lower() if lower else p.prompt for p in drawn]
    prompts = [f"# {prompt}\n" if base else prompt for prompt in prompts]  # as recipes/tiny/data.py writes documents
    answer = _causal(model) if causal else _denoising(DiffuCoder.load(model), chat=not base)
    rows, told = [], {}
    for budget in (int(part) for part in steps.split(",")):
        params = load_settings(DecodingParams, overrides=[*(changes or ()), f"steps={budget}"])
        params = params.replace(new_tokens=new_tokens)
        asked = f"{split}{'-hard' * hard}{'-lower' * lower}-{seed}-{'base' if base else 'chat'}"
        name = "-".join([key_of(model), asked, str(new_tokens), str(budget), *(changes or ())]) + ".jsonl"
        answers = written(answer, prompts, params, run / name, batch)
        programs = [program_from(answer["text"]) for answer in answers]
        verdicts = grade_many([(text, p.tests) for text, p in zip(programs, drawn, strict=True)], workers=2)
        solved = [verdict.passed for verdict in verdicts]
        told[budget] = {"share": sum(solved) / len(solved), "solved": [int(each) for each in solved]}
        for measure in ("local", "global"):
            known = [answer[measure] for answer in answers if answer.get(measure) is not None]
            told[budget][measure] = sum(known) / len(known) if known else None
        parsed = [_parses(a["text"]) for a in answers]
        rows.append(_row(budget, answers, solved, parsed, drawn))
        print(rows[-1])
    if figures is not None:
        figures.write_text(json.dumps(told) + "\n", encoding="utf-8")
    elif split == "test" and model is None and not changes and not hard and not lower:
        coder = DiffuCoder.load()
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(_report(rows, coder, count, seed, params), encoding="utf-8")
        print(f"written to {RESULTS}")


def key_of(model: str | None) -> str:
    """A name that changes with the weights, so that answers of another model are never taken for this one's."""
    folder = Path(model) if model else SHIPPED
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:10]


def _denoising(coder: DiffuCoder, *, chat: bool) -> Answer:
    def answer(prompts: Sequence[str], params: DecodingParams) -> list[dict[str, Any]]:
        results = coder.decode(coder.canvas(prompts, params, chat=chat), params)
        return [{"text": r.text, "passes": r.forward_passes, "tokens": len(r.tokens), **_ar_ness(r)} for r in results]

    return answer


def _ar_ness(result: Generation) -> dict[str, float | None]:
    """AR-ness@1 of the answer with its terminator; None where there is nothing to order."""
    order = commit_order(result.trace.steps[: len(result.tokens) + 1])
    both = {"local": local_ar_ness(order, 1), "global": global_ar_ness(order, 1)}
    return {name: None if math.isnan(value) else round(value, 4) for name, value in both.items()}


def _causal(model: str | None) -> Answer:
    """Left to right by transformers, cut at its first end of text; drawn at `temperature`, greedy at 0."""
    parent = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(model)

    def answer(prompts: Sequence[str], params: DecodingParams) -> list[dict[str, Any]]:
        ids = [tokenizer.encode(prompt, special=False) for prompt in prompts]
        width = max(map(len, ids))
        tokens = torch.tensor([[tokenizer.pad_id] * (width - len(row)) + row for row in ids])  # (B, P), left-padded
        torch.manual_seed(params.seed)
        sampled = {"do_sample": True, "temperature": params.temperature, "top_k": 0} if params.temperature else {}
        written = parent.generate(
            input_ids=tokens,
            attention_mask=(tokens != tokenizer.pad_id).long(),
            max_new_tokens=params.new_tokens,
            **{"do_sample": False, **sampled},
            eos_token_id=sorted(tokenizer.terminator_ids),
            pad_token_id=tokenizer.pad_id,
        )[:, width:].tolist()
        stops = tokenizer.terminator_ids
        ends = [next((at for at, id_ in enumerate(row) if id_ in stops), len(row)) for row in written]
        return [
            {"text": tokenizer.decode(row[:end]), "passes": end + 1, "tokens": end}
            for row, end in zip(written, ends, strict=True)
        ]

    return answer


def written(
    answer: Answer, prompts: Sequence[str], params: DecodingParams, path: Path, batch: int
) -> list[dict[str, Any]]:
    """An answer to each prompt: those that stand in `path` already, and the others, which are written there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]  # a kill may have torn the last
    if len(whole) < len(lines):
        path.write_text("".join(whole))
    done = [json.loads(line) for line in whole]
    starts = range(len(done), len(prompts), batch)
    with path.open("a") as file:
        for start in track(starts, description=f"{params.steps} steps"):
            for result in answer(prompts[start : start + batch], params):
                done.append(result)
                file.write(json.dumps(result) + "\n")
            file.flush()
    return done[: len(prompts)]


def _parses(text: str) -> bool:
    try:
        compile(program_from(text), "answer", "exec")
    except (SyntaxError, ValueError):
        return False
    return True


def wilson(passed: int, count: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share."""
    z, share = 1.96, passed / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return centre - half, centre + half


def _row(
    budget: int, answers: Sequence[dict[str, Any]], solved: list[bool], parsed: list[bool], drawn: Sequence[Problem]
) -> str:
    low, high = wilson(sum(solved), len(solved))
    kinds = []
    for kind in ("chain", "branch", "guard"):
        own = [ok for ok, problem in zip(solved, drawn, strict=True) if problem.composition[0] == kind]
        kinds.append(f"{sum(own) / max(1, len(own)):.1%}")
    passes = sum(a["passes"] for a in answers) / len(answers)
    tokens = sum(a["tokens"] for a in answers) / len(answers)
    share = sum(solved) / len(solved)
    return (
        f"| {budget} | **{share:.1%}** | {low:.1%} – {high:.1%} | {' | '.join(kinds)} | "
        f"{sum(parsed) / len(parsed):.1%} | {passes:.1f} | {tokens / passes:.2f} |"
    )


def _report(rows: list[str], coder: DiffuCoder, count: int, seed: int, params: DecodingParams) -> str:
    return "\n".join(
        [
            "# Held-out problems solved by the shipped model",
            "",
            f"`python benchmarks/tiny_accuracy.py`, {time.strftime('%Y-%m-%d')}; {count} problems of the test split "
            f"(seed {seed}), whose compositions no training problem has; canvas of {params.new_tokens} tokens, policy "
            f"{params.policy}, temperature 0, pass@1; answers run against the problem's asserts in the sandbox.",
            "",
            f"Model {key_of(None)} (sha256 of the weights), {str(coder.model.dtype).removeprefix('torch.')} on "
            f"{coder.model.device}; Python {platform.python_version()}, torch {torch.__version__}.",
            "",
            "| steps | solved | 95 % interval | chains | branches | guards | parse | passes | tokens per pass |",
            "| --: | --: | --- | --: | --: | --: | --: | --: | --: |",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    typer.run(main)
