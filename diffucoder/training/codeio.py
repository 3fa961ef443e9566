"""Exercises from programs that bring a generator of inputs: what each answers becomes the tests, run in the sandbox.

For: CodeI/O (arXiv 2502.07316) as the package reasoning-gym ships it: statements, reference programs whose function is
`main_solution`, and `generate_inputs(rng)`. Only its data file is read; the package is not imported, nor needed. Not
for: grading answers (`rewards`).

Language models wrote these programs, so none runs in this process. One is left out, for a reason that is counted, where
its tests would be no fair judge: it fails, is slow, says two things in two runs, fails its own tests in a third, gives
what a literal cannot say, or gives everybody the same answer, so that a constant would pass.
"""

import ast
import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from diffucoder.errors import ConfigError
from diffucoder.grading.extract import parsed
from diffucoder.grading.grade import Call, Outcome, call, grade
from diffucoder.grading.sandbox import Limits, Sandbox
from diffucoder.training.exercises import Exercise, Solved
from diffucoder.training.sources import Json, Skipped, text_of

FUNCTION = "main_solution"
FILE = "codeio.jsonl.gz"

_QUESTIONS = 16  # inputs tried
_TESTS = range(4, 9)  # fewer inputs with answers leave a program out; of more, the last are not used
_SECONDS = 0.5  # of a processor for one answer: a rollout has 5 for all its tests
_LIMITS = Limits(seconds=4.0)
_LONGEST = 2000  # characters of a test
_DIGITS = 6  # decimals of floats in a container, which are compared exactly

# The generator's names come after the program's, as where they were published.
_ASKING = f"""

from copy import deepcopy as _copied
from random import Random

{{}}

def _asked(seed):
    inputs = generate_inputs(Random(seed))
    return _copied(inputs), {FUNCTION}(**inputs)
"""


@dataclass(frozen=True)
class Program:
    """A reference program, what it does in words, and code that makes inputs for it."""

    id: str
    statement: str
    specification: str  # its inputs and outputs, in words
    code: str
    generator: str


def program(where: str, fields: Json) -> Program:
    """A program from its row; ValueError where something is missing."""
    names = ("task_description", "input_output_spec", "code_sample", "input_generator")
    return Program(
        f"codeio/{where.rpartition(':')[2]}", *(text_of(fields.get(name), f"field {name!r}") for name in names)
    )


def installed() -> str:
    """The data file of reasoning-gym where that is installed. ConfigError where it is not."""
    spec = find_spec("reasoning_gym")  # finds the package, does not import it
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder, "data", FILE)).is_file():
            return str(path)
    raise ConfigError(
        f"source 'reasoning-gym' is not here; pip install --no-deps reasoning-gym, or name its {FILE} with --data"
    )


def exercises(programs: Iterable[Program], sandbox: Sandbox) -> Iterator[Solved | Skipped]:
    """The exercise of each program and the program itself, or why there is none; in order, made when asked for."""
    programs = iter(programs)
    with ThreadPoolExecutor(sandbox.workers) as pool:
        while some := list(islice(programs, 4 * sandbox.workers)):
            yield from pool.map(partial(_exercise, sandbox=sandbox), some)


def _exercise(program: Program, sandbox: Sandbox) -> Solved | Skipped:
    try:
        tests = _tests(program, sandbox)
    except ValueError as error:
        return Skipped(program.id, str(error))
    # last what must not be lost: of a prompt that is too long, training keeps the end
    parts = (
        program.statement.strip(),
        program.specification.strip(),
        f"Write a Python function `{_signature(program)}`.",
    )
    return Exercise(program.id, "\n\n".join(parts), tuple(tests), "reasoning-gym"), program.code


def _signature(program: Program) -> str:
    defined = [
        node for node in parsed(program.code).body if isinstance(node, ast.FunctionDef) and node.name == FUNCTION
    ]
    return f"{FUNCTION}({ast.unparse(defined[-1].args)})" if defined else FUNCTION


def _tests(program: Program, sandbox: Sandbox) -> list[str]:
    """Asserts on what the program gives for its own inputs, all answers among them. ValueError: why there are none."""
    seeds = range(_QUESTIONS)
    outcomes = _ask(program, seeds, sandbox)
    answered = [seed for seed in seeds if outcomes[seed].status == "ok"]
    failure = next((_failure(each) for each in outcomes.values() if each.status != "ok"), "has too few inputs")
    if len(answered) < _TESTS.start:
        raise ValueError(failure)
    said = {seed: _said(outcomes[seed].value) for seed in answered}
    # the other way round, so that what one call leaves behind for the next shows
    again = _ask(program, answered[::-1], sandbox)
    if any(each.status != "ok" or _said(each.value) != said[seed] for seed, each in again.items()):
        raise ValueError("two runs differ")
    by_answer: dict[str, dict[str, None]] = {}
    for arguments, answer in said.values():
        if len(test := _test(arguments, answer)) <= _LONGEST:
            by_answer.setdefault(answer, {})[test] = None
    tests = [test for layer in zip_longest(*by_answer.values()) for test in layer if test is not None]
    if len(tests) < _TESTS.start:
        raise ValueError("has too few inputs of readable size")
    if len(by_answer) == 1:
        raise ValueError("gives one answer to all inputs")
    tests = tests[: _TESTS.stop - 1]
    # as rewards are given: by itself, a new process for every test
    if not grade(program.code, tests, sandbox=sandbox).passed:
        raise ValueError("fails its own tests")
    return tests


def _ask(program: Program, seeds: Iterable[int], sandbox: Sandbox) -> dict[int, Outcome]:
    calls = {seed: Call("_asked(*_)", (seed,), _SECONDS) for seed in seeds}
    outcomes = call(program.code + _ASKING.format(program.generator), list(calls.values()), _LIMITS, sandbox=sandbox)
    return dict(zip(calls, outcomes, strict=True))


def _failure(outcome: Outcome) -> str:
    if outcome.detail.startswith("ModuleNotFoundError"):
        return "needs a package"
    return {"timeout": "runs too long", "killed": "breaks a limit"}.get(outcome.status, "fails")


def _said(value: Any) -> tuple[str, str]:  # Any: from the sandbox
    """A call's arguments and its answer, as code. ValueError where literals cannot say them."""
    inputs, answer = value
    if not isinstance(inputs, dict) or not all(isinstance(name, str) and name.isidentifier() for name in inputs):
        raise ValueError("makes inputs without names")
    try:
        arguments = ", ".join(f"{name}={literal(each)}" for name, each in inputs.items())
        expected = literal(answer)
    except (ValueError, RecursionError):
        raise ValueError("gives no plain data") from None
    if not isinstance(answer, float) and not _rounded(answer):
        raise ValueError("gives unrounded numbers in a container")  # another order of sums would fail the test
    return arguments, expected


def _test(arguments: str, answer: str) -> str:
    if isinstance(ast.literal_eval(answer), float):
        return f"assert math.isclose({FUNCTION}({arguments}), {answer}, rel_tol=1e-06, abs_tol=1e-09)"
    return f"assert {FUNCTION}({arguments}) == {answer}"


def literal(value: Any) -> str:  # Any: plain data, or not
    """`value` as code that `ast.literal_eval` reads, the same in every process. ValueError where there is none."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} has no literal")
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(key)}: {literal(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple, set)):
        parts = [literal(each) for each in value]
        if isinstance(value, list):
            return f"[{', '.join(parts)}]"
        if isinstance(value, tuple):
            return f"({', '.join(parts)}{',' * (len(parts) == 1)})"
        return "{" + ", ".join(sorted(parts)) + "}" if parts else "set()"
    raise ValueError(f"{type(value).__name__} has no literal")


def _rounded(value: Any) -> bool:
    """Whether all floats in a container have few enough decimals to be compared exactly."""
    if isinstance(value, float):
        return round(value, _DIGITS) == value
    if isinstance(value, Mapping):
        return all(_rounded(key) and _rounded(each) for key, each in value.items())
    return all(map(_rounded, value)) if isinstance(value, (list, tuple, set)) else True
