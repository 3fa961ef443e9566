"""Programs: from the answer of a model to a sample, and from a sample to the program that is judged.

The only place that decides this. A sample holds a program in one of the two forms of EvalPlus: `solution` is a whole
program, `completion` continues the prompt. `grading.extract` finds programs in prose.
"""

from collections.abc import Mapping

from diffucoder.errors import ConfigError
from diffucoder.evaluation.benchmarks import Task
from diffucoder.grading.extract import completed, program_from


def solution(task: Task, text: str, *, continues_prompt: bool) -> str:
    """Return the program in the answer of a model. `continues_prompt`: the answer is the prompt's continuation."""
    if continues_prompt:
        return completed(task.prompt, text, task.entry_point)
    return program_from(text)


def whole_program(task: Task, sample: Mapping[str, str]) -> str:
    """Return the program that is judged. Raises ConfigError for a sample that has none."""
    if "solution" in sample:
        return task.head + sample["solution"]
    if "completion" in sample:
        return task.head + task.prompt + sample["completion"] + task.suffix
    raise ConfigError(f"sample of {task.task_id} has keys {sorted(sample)}; it needs 'completion' or 'solution'")
