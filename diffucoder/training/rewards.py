"""Rewards of reinforcement learning: completion + tests → format, share of tests passed, and their weighted sum.

DiffuCoder, appendix B.2. The share of tests passed counts only if the format is right. Two readings of "right":

* `paper`, as released: text, one block opened by exactly "```python" and closed by "```" and a newline, and nothing
  else. One test that runs out of time costs all tests.
* `robust`, the default: whatever a person would read as one program (`grading.extract`), fenced or bare.
"""

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from diffucoder.grading.constants import passing_constants
from diffucoder.grading.grade import grade
from diffucoder.grading.reading import read_limited
from diffucoder.grading.replies import called_names, program_from
from diffucoder.grading.sandbox import DEFAULT_LIMITS, Limits, Sandbox
from diffucoder.grading.syntax import parses, statements_of

Style = Literal["robust", "paper"]
FORMAT_WEIGHT = 0.5
TESTS_WEIGHT = 2.0

_RELEASED = re.compile(r"(?:(?!```).)*```python\n((?:(?!```).)*)```\n", re.DOTALL)
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)
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


def read_program(completion: str, style: Style = "robust", tests: Sequence[str] = ()) -> tuple[float, str]:
    """The reward of the format, 1, 0.5 with a syntax error, or 0, and the program: `robust` reads what `tests` call."""
    form, program = read_limited(_read_program, completion, style, list(tests), otherwise=(0.0, ""))
    return form, program


def _read_program(completion: str, style: Style, tests: Sequence[str]) -> tuple[float, str]:
    if style == "paper":
        block = _RELEASED.fullmatch(completion)
        if block is None:
            return 0.0, ""
        return 1.0 if parses(block[1].strip()) else 0.5, block[1]
    program = program_from(completion, called_names(tests))
    if parses(program):
        return float(_does_something(program)), program
    is_fenced = bool(_FENCE.search(completion) and program.strip())
    return 0.5 * is_fenced, program


def reward(
    completion: str, tests: Sequence[str], sandbox: Sandbox, *, style: Style = "robust", limits: Limits = DEFAULT_LIMITS
) -> Reward:
    """Judge one completion; only a program in the right form is run. Tests that can be cheated earn nothing."""
    form, program = read_program(completion, style, tests)
    if form < 1:
        detail = "syntax error" if form else "no program in the required form"
        return Reward(FORMAT_WEIGHT * form, form, 0.0, "format", detail, 0.0)
    constants = passing_constants(tests)
    if constants:
        return Reward(FORMAT_WEIGHT * form, form, 0.0, "failed", f"a constant passes all tests ({constants})", 0.0)
    verdict = grade(program, tests, limits, sandbox=sandbox)
    earned = [test for test in verdict.tests if test.passed and test.trusted]
    rate = len(earned) / len(tests)
    if style == "paper" and any(test.status == "timeout" for test in verdict.tests):
        rate = 0.0
    total = FORMAT_WEIGHT * form + TESTS_WEIGHT * rate
    return Reward(total, form, rate, verdict.status, verdict.detail, verdict.seconds)


def _does_something(program: str) -> bool:
    """Whether something is defined, assigned or decided: much of prose is Python too, as in "Answer: yes"."""
    for node in statements_of(program) or ():
        if isinstance(node, _STATEMENTS) or (isinstance(node, ast.AnnAssign) and node.value):
            return True
    return False
