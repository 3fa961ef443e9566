"""How many held-out problems a model solves, at full, half and a quarter of the steps: pass@1, greedy, in the sandbox.

    python benchmarks/tiny_accuracy.py                       # the shipped model, 2,000 problems of the test split
    python benchmarks/tiny_accuracy.py --split dev --count 200 --steps 64

Answers are written to the run folder as they come and are not asked for twice, so a stopped run goes on where it was.
The table goes to benchmarks/results/tiny_accuracy.md.
"""

import hashlib
import json
import math
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

from diffucoder import DecodingParams, DiffuCoder
from diffucoder.grading.extract import program_from
from diffucoder.grading.grade import grade_many
from diffucoder.models.hub import SHIPPED
from diffucoder.problems import Problem, problems

RESULTS = Path(__file__).parent / "results" / "tiny_accuracy.md"


def main(
    model: Annotated[str | None, typer.Option(help="folder; the shipped model if left out")] = None,
    split: Annotated[str, typer.Option(help="test for figures to report, dev for decisions")] = "test",
    count: Annotated[int, typer.Option(help="distinct problems")] = 2000,
    new_tokens: Annotated[int, typer.Option(help="canvas behind the request")] = 64,
    steps: Annotated[str, typer.Option(help="steps to measure at, separated by commas")] = "64,32,16",
    policy: Annotated[str, typer.Option(help="which positions go first")] = "entropy",
    seed: Annotated[int, typer.Option(help="of the problems drawn")] = 1,
    batch: Annotated[int, typer.Option(help="requests decoded together")] = 32,
    run: Annotated[Path, typer.Option(help="folder for the answers")] = Path("runs/tiny-accuracy"),
) -> None:
    drawn = list(problems(split, count, seed=seed))  # type: ignore[arg-type]  # `problems` checks it
    coder = DiffuCoder.load(model)
    rows = []
    for budget in (int(part) for part in steps.split(",")):
        params = DecodingParams(steps=budget, new_tokens=new_tokens, policy=policy)  # type: ignore[arg-type]
        name = f"{_key(model)}-{split}-{seed}-{policy}-{new_tokens}-{budget}.jsonl"
        answers = _answers(coder, drawn, params, run / name, batch)
        programs = [program_from(answer["text"]) for answer in answers]
        verdicts = grade_many([(text, p.tests) for text, p in zip(programs, drawn, strict=True)], workers=2)
        solved = [verdict.passed for verdict in verdicts]
        parsed = [_parses(a["text"]) for a in answers]
        rows.append(_row(budget, answers, solved, parsed, drawn))
        print(rows[-1])
    if split == "test" and model is None:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(_report(rows, coder, count, seed, new_tokens, policy), encoding="utf-8")
        print(f"written to {RESULTS}")


def _key(model: str | None) -> str:
    """A name that changes with the weights, so that answers of another model are never taken for this one's."""
    folder = Path(model) if model else SHIPPED
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:10]


def _answers(
    coder: DiffuCoder, drawn: Sequence[Problem], params: DecodingParams, path: Path, batch: int
) -> list[dict[str, Any]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    starts = range(len(done), len(drawn), batch)
    with path.open("a") as file:
        for start in track(starts, description=f"{params.steps} steps"):
            results = coder.generate_batch([p.prompt for p in drawn[start : start + batch]], params)
            for result in results:
                done.append({"text": result.text, "passes": result.forward_passes, "tokens": len(result.tokens)})
                file.write(json.dumps(done[-1]) + "\n")
            file.flush()
    return done[: len(drawn)]


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


def _report(rows: list[str], coder: DiffuCoder, count: int, seed: int, new_tokens: int, policy: str) -> str:
    return "\n".join(
        [
            "# Held-out problems solved by the shipped model",
            "",
            f"`python benchmarks/tiny_accuracy.py`, {time.strftime('%Y-%m-%d')}; {count} problems of the test split "
            f"(seed {seed}), whose compositions no training problem has; canvas of {new_tokens} tokens, policy "
            f"{policy}, temperature 0, pass@1; answers run against the problem's asserts in the sandbox.",
            "",
            f"Model {_key(None)} (sha256 of the weights), {str(coder.model.dtype).removeprefix('torch.')} on "
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
