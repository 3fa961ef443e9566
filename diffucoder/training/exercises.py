"""Exercises: a request and the tests that its answer must pass, as reinforcement learning reads and keeps them.

For: JSONL of exercises in and out. Not for: where they come from (`prepare`), or what an answer is worth (`rewards`).

An exercise is a line such as {"id": "mbpp/601", "prompt": "Write a function ...", "tests": ["assert f(2) == 4"]}.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from diffucoder.errors import ConfigError
from diffucoder.training.sources import Json, Skipped, parsed_rows, text_of

_PROMPTS, _TESTS = ("prompt", "question"), ("tests", "test_cases", "test_list")  # as ours, AceCode and MBPP name them
_T = TypeVar("_T")


@dataclass(frozen=True)
class Exercise:
    """What a user asks, and assert strings that hold for a right answer."""

    id: str
    prompt: str
    tests: tuple[str, ...]
    source: str = ""


Solved = tuple[Exercise, str]  # with a program that solves it; "" where none is known


def read_exercises(sources: Sequence[str]) -> list[Exercise]:
    """The exercises of `sources`: JSONL files, folders of them, or `hub:owner/name[/config][@split]`.

    What cannot be used is counted, and the first is named on stderr. ConfigError where nothing can be used, or a source
    is not there; CheckpointError for a hub that cannot be reached.
    """
    return list(told(parsed_rows(sources, _exercise), ", ".join(sources)))


def write_exercises(path: Path, exercises: Iterable[Exercise]) -> None:
    """Write whole or not at all, by way of a file beside it."""
    write_whole(path, "".join(json.dumps(asdict(each)) + "\n" for each in exercises))


def write_whole(path: Path, text: str) -> None:
    """Write a file that is never seen half-written. ConfigError where there is no writing."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"file {str(path)!r} cannot be written ({error.strerror}); name another place") from None


def told(rows: Iterable[_T | Skipped], name: str) -> Iterator[_T]:
    """The usable ones of `rows`; at their end stderr hears of the others. ConfigError where none was usable."""
    skipped: list[Skipped] = []
    count = 0
    for row in rows:
        count += 1
        if isinstance(row, Skipped):
            skipped.append(row)
        else:
            yield row
    first = f"the first: {skipped[0].where}: {skipped[0].why}" if skipped else ""
    if len(skipped) == count:
        none = f"none of {count:,} records of {name} can be used; {first}"
        raise ConfigError(none if count else f"{name} holds no record; name another source")
    if skipped:
        print(f"skipped {len(skipped):,} of {count:,} records; {first}", file=sys.stderr)


def tests_of(fields: Json) -> tuple[str, ...]:
    """The tests of a row, by any of their names. Raises ValueError."""
    name = _name(_TESTS, fields)
    tests: Any = fields[name]  # Any: from a file
    if not isinstance(tests, list) or not tests:
        raise ValueError(f"field {name!r} is no list of asserts")
    return tuple(text_of(test, f"a test of {name!r}") for test in tests)


def _exercise(where: str, fields: Json) -> Exercise:
    name = _name(_PROMPTS, fields)
    at = fields.get("id", fields.get("task_id", Path(where).name))  # the last: file and line
    return Exercise(str(at), text_of(fields[name], f"field {name!r}"), tests_of(fields), str(fields.get("source", "")))


def _name(names: Sequence[str], fields: Json) -> str:
    found = next((name for name in names if name in fields), None)
    if found is None:
        raise ValueError(f"has no field {' or '.join(map(repr, names))}")
    return found
