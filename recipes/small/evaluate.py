"""The small model against its parent on the same harness: some tasks of each benchmark, spread over all of it.

    python recipes/small/evaluate.py --data ../shared/data --tasks 40 --parent START MODEL [MODEL ...] shipped

Each model is asked by `diffucoder evaluate` at as many steps as tokens, at half and at a quarter: to continue the text
(HumanEval, MBPP), to fill a line in it (HumanEval-Infilling), and by a request (the tiny problems). The parent is asked
left to right: greedy, in the same prompts, for as many tokens; a hole it fills with the line that continues the prefix,
since it cannot see what follows. What is there already is not asked again.
"""

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from diffucoder.evaluation.benchmarks import Task, load
from diffucoder.grading.extract import completed, program_from
from diffucoder.models.checkpoint import load_denoiser, load_tokenizer
from diffucoder.models.denoiser import set_causal
from diffucoder.tokenizer import Tokenizer

FILES = {
    "humaneval-infilling": "HumanEval-SingleLineInfilling.jsonl.gz",
    "humaneval": "HumanEvalPlus.jsonl.gz",
    "mbpp": "MbppPlus.jsonl.gz",
}
TOKENS = 64  # of an answer: a short function
LONGEST = 24  # of the lengths that `infill` tries
RAW = ("humaneval", "mbpp")  # the text itself is continued: asked by chat, a model would have to repeat it first


def main(
    models: Annotated[
        list[Path] | None, typer.Argument(help="folders of denoisers; `shipped` is the one in the package")
    ] = None,
    *,
    data: Annotated[Path, typer.Option(help="folder of the benchmarks' files")],
    tasks: Annotated[int, typer.Option(help="about so many of each benchmark", min=1)] = 40,
    parent: Annotated[Path | None, typer.Option(help="the untrained denoiser: asked as the parent it still is")] = None,
    benchmarks: Annotated[str, typer.Option(help="separated by commas")] = "humaneval-infilling,humaneval,mbpp,tiny",
    run: Annotated[Path, typer.Option(help="folder for answers and verdicts")] = Path("runs/small-evaluate"),
) -> None:
    """Ask, grade, and print a table."""
    rows = []
    for name in benchmarks.split(","):
        some = chosen(name, data, tasks, run)
        if parent is not None:
            samples = run / f"parent-{name}-{tasks}.jsonl"
            if not samples.exists():
                answer_all(parent, some, samples)
            rows += reports("parent, left to right", name, some, ["--samples", str(samples)])
        for model in models or ():
            longest = LONGEST if name == "humaneval-infilling" else TOKENS
            asked = ["--model", str(model)] if str(model) != "shipped" else []
            asked += ["--run", str(run / f"{key(model)}-{name}-{tasks}")]
            asked += ["--new-tokens", str(TOKENS), "--steps", f"{longest},{longest // 2},{longest // 4}"]
            rows += reports(str(model), name, some, asked + ["--raw"] * (name in RAW))
    print("| model | benchmark | tasks | steps | solved | 95 % interval | tokens a pass |")
    print("| --- | --- | --: | --: | --: | --- | --: |")
    print("\n".join(rows))


def key(model: Path) -> str:
    return "-".join(model.parts[-2:])


def chosen(name: str, data: Path, tasks: int, run: Path) -> dict[str, Any]:
    """Name, folder and number of a subset: a published file with some of its lines, or the first tiny problems."""
    if name == "tiny":  # already drawn at random
        return {"name": name, "folder": None, "limit": tasks}
    folder = run / f"some-{tasks}"
    path = folder / FILES[name]
    if not path.exists():
        if not (data / FILES[name]).exists():
            raise typer.BadParameter(f"--data {str(data)!r} holds no {FILES[name]}; name the folder that does")
        folder.mkdir(parents=True, exist_ok=True)
        lines = gzip.decompress((data / FILES[name]).read_bytes()).decode().splitlines(keepends=True)
        path.write_bytes(gzip.compress("".join(lines[:: max(1, len(lines) // tasks)][:tasks]).encode(), mtime=0))
    return {"name": name, "folder": folder, "limit": None}


def reports(model: str, name: str, some: dict[str, Any], options: list[str]) -> list[str]:
    """`diffucoder evaluate` on a subset: a line of the table for each run."""
    command = [sys.executable, "-m", "diffucoder.cli", "evaluate", name, "--json", *options]
    command += ["--data", str(some["folder"])] if some["folder"] else []
    command += ["--limit", str(some["limit"])] if some["limit"] else []
    print("$", *command, file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:  # it has said why
        raise SystemExit(done.returncode)
    return [row(model, name, json.loads(line)) for line in done.stdout.splitlines()]


def row(model: str, name: str, report: dict[str, Any]) -> str:
    """A line of the table; the interval is Wilson's, which says something of none solved too."""
    tasks, share = report["tasks"], report["pass@1"]
    steps = report["settings"].get("params", {}).get("steps", "a token each")
    middle, spread = share + 1.92 / tasks, 1.96 * (share * (1 - share) / tasks + 0.96 / tasks**2) ** 0.5
    low, high = (max(0.0, middle + sign * spread) / (1 + 3.84 / tasks) for sign in (-1, 1))
    each = report["tokens_per_forward"]
    cells = [model, name, tasks, steps, f"{share * tasks:.0f} ({share:.0%})", f"{low:.0%} – {high:.0%}"]
    return "| " + " | ".join(map(str, [*cells, f"{each:.2f}" if each else "–"])) + " |"


# --- the parent ------------------------------------------------------------------------------------------------------


def answer_all(folder: Path, some: dict[str, Any], path: Path) -> None:
    """Write the parent's completions as EvalPlus has them."""
    tasks = load(some["name"], some["folder"])[: some["limit"]]
    answer, tokenizer = greedy(folder), load_tokenizer(folder)
    lines = [{"task_id": task.task_id, **asked(some["name"], task, answer, tokenizer)} for task in tasks]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def asked(
    name: str, task: Task, answer: Callable[[list[int], str | None], str], tokenizer: Tokenizer
) -> dict[str, str]:
    """A task in the prompt that `diffucoder evaluate` gives it."""
    if task.suffix:
        return {"completion": answer(tokenizer.encode(task.prompt), "\n")}
    if name in RAW:
        return {"solution": completed(task.prompt, answer(tokenizer.encode(task.prompt), None), task.entry_point)}
    return {"solution": program_from(answer(tokenizer.encode(tokenizer.chat(task.request)), None))}


def greedy(folder: Path) -> Callable[[list[int], str | None], str]:
    """Left to right, a token a pass, up to a terminator or `stop`."""
    denoiser, tokenizer = load_denoiser(folder, dtype=torch.bfloat16, device="cpu"), load_tokenizer(folder)
    model = denoiser.model
    set_causal(model, True)  # no weight has changed: it is the parent again

    @torch.no_grad()
    def answer(prompt: list[int], stop: str | None) -> str:
        past, fed, written = None, torch.tensor([prompt]), list[int]()
        while len(written) < TOKENS:
            out = model(input_ids=fed, past_key_values=past, use_cache=True)
            past, token = out.past_key_values, int(out.logits[0, -1, : denoiser.mask_id].argmax())
            if token in tokenizer.terminator_ids:
                break
            written.append(token)
            if stop is not None and stop in tokenizer.decode(written):
                break
            fed = torch.tensor([[token]])
        text = tokenizer.decode(written)
        return text if stop is None else text.partition(stop)[0]

    return answer


if __name__ == "__main__":
    typer.run(main)
