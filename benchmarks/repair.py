"""Repair correct programs with one mutation each, against writing them again with the same number of passes.

    python benchmarks/repair.py                        # 500 programs of the test split
    python benchmarks/repair.py --split dev --count 100

A program is the solution of a tiny problem under its request as a comment. A repair sees the first three of the five
tests; a program is repaired if it passes all five. Writing again draws answers until one passes the same three tests,
and takes
as many forward passes as the repair of that program, rounded up to whole answers. The table goes to
benchmarks/results/repair.md.
"""

import math
import random
import re
from collections.abc import Iterator
from statistics import mean
from typing import Annotated

import torch
import typer
from common import RESULTS, write_page

from diffucoder import DecodingParams, DiffuCoder
from diffucoder.decoding.repair import PASSES, Judge
from diffucoder.grading.extract import program_from
from diffucoder.grading.sandbox import Sandbox
from diffucoder.metrics import wilson
from recipes.tiny.problems import Problem, problems

NEW_TOKENS = 64  # of an answer, which takes as many passes
SEEN = 3  # tests that a repair is given
OPERATORS = (" + ", " - ", " * ", " // ", " % ", " == ", " != ", " < ", " > ", " <= ", " >= ", " and ", " or ")


def main(
    count: Annotated[int, typer.Option(help="programs, a quarter with each kind of mutation")] = 500,
    split: Annotated[str, typer.Option(help="test for figures to report, dev for decisions")] = "test",
    passes: Annotated[int, typer.Option(help="forward passes of a row for each program")] = PASSES,
) -> None:
    """Mutate, repair, write again, and write the table."""
    coder = DiffuCoder.load(dtype=torch.float32)
    figures: dict[str, list[tuple[bool, int, bool]]] = {}
    with Sandbox(2) as sandbox:
        for kind, broken, problem in mutated(coder, split, count, sandbox):
            seen = Judge(problem.tests[:SEEN], sandbox)
            every = Judge(problem.tests, sandbox)
            result = coder.repair(broken, tests=seen.tests, passes=passes, sandbox=sandbox)
            again = written_again(coder, problem, seen, result.passes)
            outcome = (every(result.text).passed, result.passes, every(again).passed)
            figures.setdefault(kind, []).append(outcome)
            print(kind, *outcome, flush=True)
    rows = [row_of(kind, outcomes) for kind, outcomes in sorted(figures.items())]
    rows.append(row_of("all", [outcome for outcomes in figures.values() for outcome in outcomes]))
    for row in rows:
        print(*row)
    head = ("mutation", "programs", "repaired", "95 % interval", "passes", "written again")
    details = (f"{count} programs of the {split} split, at most {passes} passes each; {SEEN} of 5 tests are seen",)
    if split == "test":
        write_page(RESULTS / "repair.md", f"python benchmarks/repair.py --count {count}", details, head, rows)


def row_of(kind: str, outcomes: list[tuple[bool, int, bool]]) -> list[str]:
    repaired, spent, again = zip(*outcomes, strict=True)
    low, high = wilson(sum(repaired), len(repaired))
    shares = [f"**{mean(repaired):.1%}**", f"{low:.1%} – {high:.1%}", f"{mean(spent):.0f}", f"{mean(again):.1%}"]
    return [kind, str(len(repaired)), *shares]


def written_again(coder: DiffuCoder, problem: Problem, seen: Judge, passes: int) -> str:
    """The first of the answers to the request that passes the seen tests, or the last one."""
    params = DecodingParams(temperature=0.5, new_tokens=NEW_TOKENS, num_samples=math.ceil(passes / NEW_TOKENS))
    texts = [program_from(result.text) for result in coder.generate_batch([problem.prompt], params)]
    return next((text for text in texts if seen(text).passed), texts[-1])


def mutated(coder: DiffuCoder, split: str, count: int, sandbox: Sandbox) -> Iterator[tuple[str, str, Problem]]:
    """Yield the kind of a mutation, the broken program under its request, and the problem; it fails a seen test."""
    rng = random.Random(1)
    made = 0
    for problem in problems(split, 4 * count, seed=1):
        kind, mutate = list(MUTATIONS.items())[made % len(MUTATIONS)]
        broken = mutate(coder, problem.solution, rng)
        if made < count and broken and not Judge(problem.tests[:SEEN], sandbox)(broken).passed:
            made += 1
            yield kind, f"# {problem.prompt}\n{broken}", problem


def delete_tokens(coder: DiffuCoder, program: str, rng: random.Random) -> str:
    ids = coder.tokenizer.encode(program)
    start = rng.randrange(1, len(ids))
    return coder.tokenizer.decode(ids[:start] + ids[start + rng.randint(1, 4) :])


def swap_operator(coder: DiffuCoder, program: str, rng: random.Random) -> str:
    places = []
    for operator in OPERATORS:
        places += [(match.start(), operator) for match in re.finditer(re.escape(operator), program)]
    if not places:
        return ""
    start, old = rng.choice(sorted(places))
    new = rng.choice([operator for operator in OPERATORS if operator != old])
    return program[:start] + new + program[start + len(old) :]


def wrong_name(coder: DiffuCoder, program: str, rng: random.Random) -> str:
    names = sorted(set(re.findall(r"\b[a-z_]+\b", program)) - {"def", "return", "for", "in", "if", "else", "not", "is"})
    places = [match for match in re.finditer(r"\b[a-z_]+\b", program) if match[0] in names]
    place = rng.choice(places)
    new = rng.choice([name for name in names if name != place[0]])
    return program[: place.start()] + new + program[place.end() :]


def break_indentation(coder: DiffuCoder, program: str, rng: random.Random) -> str:
    lines = program.splitlines(keepends=True)
    number = rng.randrange(1, len(lines))
    body = lines[number].lstrip(" ")
    old = len(lines[number]) - len(body)
    lines[number] = " " * rng.choice([width for width in (0, 2, 4, 8, 12) if width != old]) + body
    return "".join(lines)


MUTATIONS = {
    "tokens deleted": delete_tokens,
    "operator swapped": swap_operator,
    "wrong name": wrong_name,
    "indentation broken": break_indentation,
}


if __name__ == "__main__":
    typer.run(main)
