"""Rewards of reinforcement learning: completion + tests → format, share of tests passed, and their weighted sum.

DiffuCoder, appendix B.2: 0.5 for the format and 2.0 for the share of tests passed, which counts only if the format is
right. Two readings of "right":

* `paper`, as released: text, one block opened by exactly "```python" and closed by "```" and a newline, and nothing
  else. A missing last newline costs everything, and so does one test that runs out of time.
* `robust`, the default: whatever a person would read as one program (`grading.extract`), fenced or bare.

Programs run in the sandbox. Not for: which tests a problem has (`exercises`).
"""

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from diffucoder.grading.extract import parsed, program_from
from diffucoder.grading.grade import grade
from diffucoder.grading.sandbox import Limits, Sandbox

Style = Literal["robust", "paper"]

_RELEASED = re.compile(r"(?:(?!```).)*```python\n((?:(?!```).)*)```\n", re.DOTALL)
_STATEMENTS = (  # that define, assign or decide something
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AugAssign),
    *(ast.For, ast.While, ast.If, ast.With, ast.Try, ast.TryStar, ast.Match),
)


@dataclass(frozen=True)
class Reward:
    """What a completion is worth, and why."""

    total: float  # weighted sum
    format: float  # 1: right; 0.5: right except for a syntax error; 0
    pass_rate: float  # share of tests passed; 0 if the format is not right and nothing was run
    status: str  # of the first test that did not pass, as in `grading`; "format" if nothing was run
    detail: str
    seconds: float  # in the sandbox

    @property
    def solved(self) -> bool:
        """Whether every test passed."""
        return self.pass_rate == 1


def format_reward(completion: str, style: Style = "robust") -> float:
    """1.0 for a program where the style wants it, 0.5 for one with a syntax error, 0.0 for anything else."""
    if style == "paper":
        block = _RELEASED.fullmatch(completion)
        if block is None:
            return 0.0
        return 1.0 if _parses(block[1].strip()) else 0.5
    program = program_from(completion)
    if _parses(program):
        return float(_does_something(program))
    if "```" in completion and program.strip():
        return 0.5
    return 0.0


def reward(
    completion: str,
    tests: Sequence[str],
    sandbox: Sandbox,
    *,
    style: Style = "robust",
    format_weight: float = 0.5,
    tests_weight: float = 2.0,
    limits: Limits | None = None,
) -> Reward:
    """Judge one completion; its program is run only if its format is right."""
    form = format_reward(completion, style)
    if form < 1:
        detail = "syntax error" if form else "no program in the required form"
        return Reward(format_weight * form, form, 0.0, "format", detail, 0.0)
    program = program_from(completion)
    if style == "paper" and (block := _RELEASED.fullmatch(completion)):
        program = block[1]
    verdict = grade(program, tests, limits or Limits(), sandbox=sandbox)
    rate = verdict.pass_rate
    if style == "paper" and any(test.status == "timeout" for test in verdict.tests):
        rate = 0.0
    total = format_weight * form + tests_weight * rate
    return Reward(total, form, rate, verdict.status, verdict.detail, verdict.seconds)


def _parses(program: str) -> bool:
    try:
        parsed(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _does_something(program: str) -> bool:
    """Whether something is defined, assigned or decided: much of prose is Python too, as in "Answer: yes"."""
    for node in parsed(program).body:
        if isinstance(node, _STATEMENTS) or (isinstance(node, ast.AnnAssign) and node.value):
            return True
    return False
