"""Find tests that a constant passes: a program that always answers the same, whatever it is called with.

    assert f(3) in "the right answer"     passed by ""
    assert not abs(f(7) - 49) > 1e-6      passed by nan
    assert f(3) == True                   passed by True; with assert f(4) == False beside it, by no constant

Such tests reward programs that do nothing. The constants tried are common ones, and those that the tests name, which
count only if a function is called in two ways: any single result could be guessed. Not for: tests that are not split
(`asserts`), which are no basis for rewards.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any  # plain data

from diffucoder.grading.asserts import Assert, parse_locally
from diffucoder.grading.reading import read_limited
from diffucoder.grading.values import Opaque, short

_COMMON: tuple[Any, ...] = (
    *(None, False, True, 0, 1, -1, 0.5, float("nan"), float("inf"), -float("inf")),
    *("", " ", "x" * 100, b"", [], (), {}, set(), [[]], [""], [0], [*range(100)]),
    *(Opaque("object"), Opaque("object", 0)),
)
_MOST = 1000  # of a number that a test names: the length of a list that is tried
_CALLED = re.compile(r"(?:[^\W\d]\w*(?:\(\))?\.)*[^\W\d]\w*")


def passing_constants(tests: Sequence[str]) -> str:
    """The constants that pass all tests that are split, as in "f: nan"; "" if there are none."""
    return read_limited(_passing_constants, list(tests), otherwise="")


def _passing_constants(tests: list[str]) -> str:
    by_function: dict[str, list[Assert]] = {}
    for split in filter(None, map(parse_locally, tests)):
        called = _CALLED.match(ast.unparse(split.call))
        by_function.setdefault(called[0] if called else "", []).append(split)
    found = []
    for function, asserts in by_function.items():
        for value in _candidates(asserts):
            # the program may have an `int` of its own, so what it answers need be no result of Python's
            if all(each.holds_for_result(value) or each.holds(value) for each in asserts):
                found.append(f"{function}: {short(value)}")
                break
        else:
            return ""
    return ", ".join(found)


def _candidates(asserts: Sequence[Assert]) -> Iterator[Any]:
    yield from _COMMON
    if len({each.expression for each in asserts}) == 1:
        return
    for value in chain.from_iterable(each.literals() for each in asserts):
        yield value
        if isinstance(value, int | float) and abs(value) <= _MOST:
            for number in (value, value - 1, value + 1):
                length = max(0, int(number))
                yield from (number, [number], [0] * length, [*range(length)], "x" * length)
        if isinstance(value, str | list | tuple | set | frozenset | dict):
            yield from islice(value, 1)
