"""Exercises for reinforcement learning: a request, and the tests that an answer must pass.

A line of their JSONL is {"id": "mbpp/601", "prompt": "Write a function ...", "tests": ["assert f(2) == 4"]}.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffucoder.errors import ConfigError
from diffucoder.files import Json, write_jsonl
from diffucoder.grading.reading import read_limited
from diffucoder.grading.syntax import asserts_of_check
from diffucoder.training.sources import Sources, first_name, read_usable, text_field, text_of


@dataclass(frozen=True)
class Exercise:
    """What a user requests, and assert statements that hold for a right answer."""

    id: str
    prompt: str
    tests: tuple[str, ...]
    source: str = ""


def read_exercises(sources: Sources) -> list[Exercise]:
    """The exercises of `sources`; rows that cannot be used are counted on stderr. Errors of `sources.read_usable`."""
    return read_usable(sources, parse_exercise)


def write_exercises(path: Path, exercises: Iterable[Exercise]) -> None:
    """Write the whole file or leave it as it was. Raises ConfigError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, map(asdict, exercises))
    except OSError as error:
        raise ConfigError(f"file {str(path)!r} cannot be written ({error.strerror}); name another place") from None


def parse_exercise(where: str, fields: Json) -> Exercise:
    """An exercise with our field names, AceCode's, MBPP's or HumanEval's. Raises ValueError."""
    prompt = text_field(fields, first_name(("prompt", "question", "text"), fields))
    if str(fields.get("test_setup_code", "")).strip():
        raise ValueError("field 'test_setup_code' has code that its tests need before them, which is not supported")
    exercise_id = fields.get("id", fields.get("task_id", Path(where).name))  # else file and line
    return Exercise(str(exercise_id), prompt, tests_of(fields), str(fields.get("source", "")))


def tests_of(fields: Json) -> tuple[str, ...]:
    """The tests of a row with our field name, AceCode's, MBPP's or HumanEval's. Raises ValueError."""
    name = first_name(("tests", "test_cases", "test_list", "test"), fields)
    tests: Any = fields[name]  # Any: from a file
    if name == "test" and isinstance(tests, str):  # HumanEval's `check(candidate)`
        too_long: tuple[list[str], bool, str] = ([], False, "takes too long to read")
        function = str(fields.get("entry_point"))
        tests, _, problem = read_limited(asserts_of_check, tests, function, otherwise=too_long)
        if problem:
            raise ValueError(f"field 'test' {problem}")
    if not isinstance(tests, list) or not tests:
        raise ValueError(f"field {name!r} is not a list of asserts")
    return tuple(text_of(test, f"a test of {name!r}") for test in tests)
