"""The rules of EvalPlus: the arguments of a call, whether its result is correct, how long it may take.

Source: evalplus 0.3.1 (Apache-2.0; Liu et al. 2023, arXiv 2305.01210), rewritten and checked by replaying published
verdicts. A result that is not plain data arrives here as an object that equals nothing. We differ in four points:

- HumanEval/32: a root is judged by the polynomial. EvalPlus does so too, and then forgets to count the pass.
- The tolerance depends on the expected value alone: floats have one, at any depth of lists and tuples. EvalPlus gives
  it to flat ones, and then to all later inputs, integers too, so that a verdict depends on the order of the inputs.
- NaN equals NaN. EvalPlus compares in one process, where a NaN that was passed through is the same object.
- Within the tolerance nested lists must have the same lengths. NumPy stretches a list of one to any length.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from numbers import Complex
from typing import Any  # an argument or result: None, bool, number, str, bytes, list, tuple, set, frozenset or dict

from diffucoder.grading.values import set_of

MEMORY = 4 * 2**30  # bytes that a program may use
SECONDS = 60.0  # for all calls of a program together, before the time to start and to report

Arguments = tuple[Any, ...]  # of one call
_Reader = Callable[[Any], Any]

# --- arguments: JSON has no tuples, sets and complex numbers ---------------------------------------------------------


def _unchanged(value: Any) -> Any:
    return value


def _tuples(values: list[Any]) -> list[Any]:
    return list(map(tuple, values))


def _tuple_of_tuples(values: list[Any]) -> Any:
    return tuple(tuple(value) if isinstance(value, list) else value for value in values)


def _deep_tuple(value: Any) -> Any:
    return tuple(map(_deep_tuple, value)) if isinstance(value, list) else value


def _sets(values: list[Any]) -> list[Any]:
    # the file writes an empty set and an empty dictionary alike; EvalPlus reads both, and all else, as a dictionary
    return [set(value) if isinstance(value, list) and value else {} for value in values]


def _tuple_values(table: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(table, map(tuple, table.values()), strict=True))


# ids of MBPP tasks, readers of their first arguments, reader of all further arguments
_READERS: tuple[tuple[str, tuple[_Reader, ...], _Reader], ...] = (
    ("2 116 132 143 222 261 273 394 399 421 424 429 470 560 579 596 616 630 726 740 744 809", (), tuple),
    ("63 64 70 94 120 237 272 299 400 409 417 438 473 614 780", (), _tuples),
    ("259 278 401 445", (), _tuple_of_tuples),
    ("580 615 791", (), _deep_tuple),
    ("250 307 405 446 617 720 763 808", (tuple,), _unchanged),
    ("75 413 444 753", (_tuples,), _unchanged),
    ("106 750", (_unchanged, tuple), _unchanged),
    ("115", (_sets,), _unchanged),
    ("124", (float, complex), _unchanged),
    ("252", (complex,), _unchanged),
    ("722", (_tuple_values,), _unchanged),
)
_READERS_OF = {f"Mbpp/{number}": (first, rest) for ids, first, rest in _READERS for number in ids.split()}


def read_arguments(task_id: str, rows: Iterable[Sequence[Any]]) -> tuple[Arguments, ...]:
    """Return the arguments of each call, from `base_input` or `plus_input` of the published file."""
    first, rest = _READERS_OF.get(task_id, ((), _unchanged))
    calls = []
    for row in rows:
        readers = [*first, *[rest] * (len(row) - len(first))]
        calls.append(tuple(reader(value) for reader, value in zip(readers, row, strict=True)))
    return tuple(calls)


# --- results ---------------------------------------------------------------------------------------------------------

_DEFAULT_ATOL = 1e-6
_RTOL = 1e-7


def correct(
    task_id: str, arguments: Sequence[Any], expected: Any, result: Any, atol: float = 0.0, *, in_order: bool = False
) -> bool:
    """Return whether `result` is correct, if the published solution gives `expected`.

    `atol` is the tolerance of the task. `in_order` leaves out the rule that eight MBPP tasks are about sets: it is
    younger than MBPP+ v0.1.0, and verdicts published on that version do without it. Never raises, whatever `result` is:
    a result that cannot be compared is wrong.
    """
    try:
        if task_id == _ROOT:
            return abs(_polynomial(arguments[0], result)) <= atol
        if task_id == _ANY_RESULT:
            return True
        if task_id in _MATCHES:  # the published solution returns a match or None; a program may return a bool instead
            present = result if isinstance(result, bool) else result is not None
            return present == (expected is not None)
        if task_id in _SETS and not in_order:
            return set_of(result) == set(expected)
        if _equal(expected, result, atol):
            return True
        other_reading = _OTHER_READINGS.get(task_id)
        return other_reading is not None and bool(abs(result - other_reading(*arguments)) <= atol)
    except (TypeError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return False


def _equal(expected: Any, result: Any, atol: float) -> bool:
    if result == expected:
        return True
    tolerance = atol
    if not tolerance and _has_floats(expected):
        tolerance = _DEFAULT_ATOL
    return tolerance > 0 and type(result) is type(expected) and _close(expected, result, tolerance)


def _has_floats(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_has_floats, value))
    return isinstance(value, float)


def _close(expected: Any, result: Any, atol: float) -> bool:
    """Compare as numpy.allclose does: only numbers can be close; lists and tuples are alike."""
    if isinstance(expected, list | tuple):
        if not isinstance(result, list | tuple) or len(result) != len(expected):
            return False
        return all(_close(*pair, atol) for pair in zip(expected, result, strict=True))
    if not _is_number(expected) or not _is_number(result):
        return False
    if result == expected or (expected != expected and result != result):
        return True
    # without the first test any result would be within the relative tolerance of an infinite `expected`
    return bool(abs(expected) < math.inf and abs(result - expected) <= atol + _RTOL * abs(expected))


def _is_number(value: object) -> bool:
    """Return whether numpy treats it as a number, Python's or its own."""
    if isinstance(value, int | float | complex):
        return True
    return isinstance(value, Complex) and not isinstance(value, Fraction)


def _pyramid(base: float, height: float) -> int:
    """Mbpp/581, where `height` is that of the pyramid instead of that of its sides."""
    return round(base**2 + 2 * base * math.hypot(base / 2, height))


def _digits_apart(one: int, other: int) -> int:
    """Mbpp/558, where the shorter number is filled with zeros on the left."""
    width = max(len(str(one)), len(str(other)))
    digits = zip(str(one).zfill(width), str(other).zfill(width), strict=True)
    return sum(abs(int(a) - int(b)) for a, b in digits)


def _polynomial(factors: Sequence[float], x: float) -> float:
    value = 0.0
    for power, factor in enumerate(factors):
        value += factor * math.pow(x, power)
    return value


_ROOT = "HumanEval/32"  # any root of the polynomial is right
_ANY_RESULT = "Mbpp/164"  # the published solution compares floats and is wrong itself
_SETS = {f"Mbpp/{number}" for number in (2, 7, 111, 140, 232, 249, 579, 769)}
_MATCHES = {"Mbpp/737", "Mbpp/787", "Mbpp/794"}
# the published solution follows one reading of the task; these give the result of another
_OTHER_READINGS: dict[str, Callable[..., int]] = {
    "Mbpp/295": lambda number: 0,
    "Mbpp/558": _digits_apart,
    "Mbpp/581": _pyramid,
}

# --- time ------------------------------------------------------------------------------------------------------------


def time_limit(reference: float) -> float:
    """Seconds that a call may take when the published solution took `reference` seconds."""
    return max(1.0, 4.0 * reference)


def total_limit(references: Iterable[float]) -> float:
    """Seconds that all calls of one program may take together, with a second to start and one to report."""
    return min(SECONDS, sum(map(time_limit, references))) + 2.0
