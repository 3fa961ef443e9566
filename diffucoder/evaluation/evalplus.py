"""EvalPlus's rules: what a call's arguments are, whether its result is right, how long it may take.

Source: evalplus 0.3.1 (Apache-2.0; Liu et al. 2023, arXiv 2305.01210), expressed anew and checked by replaying
published verdicts. A result arrives here as plain data, outside of the process that computed it; one that is not plain
data arrives as an object that equals nothing. Where ours differs, on purpose:

- HumanEval/32: a root is judged by the polynomial; EvalPlus judges it so and then forgets to count the pass.
- The tolerance depends on the expected value alone: floats have one, at any depth of lists and tuples. EvalPlus gives
  it to flat ones, and then to all inputs behind the first, integers too: a verdict depends on the inputs' order.
- NaN equals NaN. EvalPlus compares in one process, where a NaN that was passed through is the same object.
- Within the tolerance nested lists must have the same lengths; NumPy stretches a list of one to any length.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any  # an argument or result: None, bool, numbers, str, bytes, list, tuple, set, frozenset, dict

from diffucoder.grading.values import set_of

MEMORY = 4 * 2**30  # bytes a program may take
SECONDS = 60.0  # for all calls of a program together, before its grace

Row = Sequence[Any]  # the arguments of one call

# --- arguments: JSON knows no tuples, sets and complex numbers -------------------------------------------------------


def _same(value: Any) -> Any:
    return value


def _tuples(values: list[Any]) -> list[Any]:
    return [tuple(value) for value in values]


def _tuple_of_tuples(values: list[Any]) -> Any:
    return tuple(tuple(value) if isinstance(value, list) else value for value in values)


def _deep_tuple(value: Any) -> Any:
    return tuple(map(_deep_tuple, value)) if isinstance(value, list) else value


def _sets(values: list[Any]) -> list[Any]:
    # an empty set cannot be told from an empty dictionary in the file; EvalPlus reads both, and all else, as the latter
    return [set(value) if isinstance(value, list) and value else {} for value in values]


def _tuple_values(table: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) for key, value in table.items()}


# ids of MBPP tasks, the readers of their first arguments, the reader of all further ones
_READERS: tuple[tuple[str, tuple[Callable[[Any], Any], ...], Callable[[Any], Any]], ...] = (
    ("2 116 132 143 222 261 273 394 399 421 424 429 470 560 579 596 616 630 726 740 744 809", (), tuple),
    ("63 64 70 94 120 237 272 299 400 409 417 438 473 614 780", (), _tuples),
    ("259 278 401 445", (), _tuple_of_tuples),
    ("580 615 791", (), _deep_tuple),
    ("250 307 405 446 617 720 763 808", (tuple,), _same),
    ("75 413 444 753", (_tuples,), _same),
    ("106 750", (_same, tuple), _same),
    ("115", (_sets,), _same),
    ("124", (float, complex), _same),
    ("252", (complex,), _same),
    ("722", (_tuple_values,), _same),
)
_READERS_OF = {f"Mbpp/{number}": (first, rest) for ids, first, rest in _READERS for number in ids.split()}


def arguments(task_id: str, rows: Iterable[Row]) -> tuple[tuple[Any, ...], ...]:
    """The calls' arguments, from `base_input` or `plus_input` as the published file has them."""
    first, rest = _READERS_OF.get(task_id, ((), _same))

    def read(row: Row) -> tuple[Any, ...]:
        readers = [*first, *[rest] * (len(row) - len(first))]
        return tuple(reader(value) for reader, value in zip(readers, row, strict=True))

    return tuple(read(row) for row in rows)


# --- results ---------------------------------------------------------------------------------------------------------

_DEFAULT_ATOL, _RTOL = 1e-6, 1e-7


def correct(
    task_id: str, arguments: Row, expected: Any, got: Any, atol: float = 0.0, *, in_order: bool = False
) -> bool:
    """Whether `got` is a right result of a call, when the published solution gives `expected`.

    `atol` is the task's own. `in_order` leaves out the rule that eight MBPP tasks are about sets: it is younger than
    MBPP+ v0.1.0, and verdicts published on that version do without it. Never raises, whatever `got` is: what cannot be
    compared is wrong.
    """
    rule = _RULES.get(task_id, _equal)
    if in_order and rule is _same_members:
        rule = _equal
    try:
        return bool(rule(arguments, expected, got, atol))
    except (TypeError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return False


def _equal(arguments: Row, expected: Any, got: Any, atol: float) -> bool:
    if got == expected:
        return True
    tolerance = atol or (_DEFAULT_ATOL if _floats(expected) else 0.0)
    return tolerance > 0 and type(got) is type(expected) and _close(expected, got, tolerance)


def _floats(value: Any) -> bool:
    return any(map(_floats, value)) if isinstance(value, list | tuple) else isinstance(value, float)


def _close(expected: Any, got: Any, atol: float) -> bool:
    """As numpy.allclose judges: numbers alone can be close, and lists and tuples are the same to it."""
    if isinstance(expected, list | tuple):
        if not isinstance(got, list | tuple) or len(got) != len(expected):
            return False
        return all(_close(one, other, atol) for one, other in zip(expected, got, strict=True))
    if not isinstance(expected, int | float | complex) or not isinstance(got, int | float | complex):
        return False
    if got == expected or (expected != expected and got != got):
        return True
    # the first test is for an infinite `expected`, from which all is within the relative tolerance
    return abs(expected) < math.inf and abs(got - expected) <= atol + _RTOL * abs(expected)


def _same_members(arguments: Row, expected: Any, got: Any, atol: float) -> bool:
    return set_of(got) == set(expected)


def _same_presence(arguments: Row, expected: Any, got: Any, atol: float) -> bool:
    """The published solution returns a match or None; a program may as well return the bool."""
    return (got if isinstance(got, bool) else got is not None) == (expected is not None)


def _any_result(arguments: Row, expected: Any, got: Any, atol: float) -> bool:
    return True


def _or(other: Callable[..., int]) -> Callable[[Row, Any, Any, float], bool]:
    """The published solution is one reading of the task; `other(*arguments)` is another, as good."""

    def rule(arguments: Row, expected: Any, got: Any, atol: float) -> bool:
        return _equal(arguments, expected, got, atol) or bool(abs(got - other(*arguments)) <= atol)

    return rule


def _pyramid(base: float, height: float) -> int:
    """Mbpp/581 with the height of the pyramid in place of its side's."""
    return round(base**2 + 2 * base * math.hypot(base / 2, height))


def _digits_apart(one: int, other: int) -> int:
    """Mbpp/558 with the shorter number filled with zeros on the left."""
    width = max(len(str(one)), len(str(other)))
    pairs = zip(str(one).zfill(width), str(other).zfill(width), strict=True)
    return sum(abs(int(a) - int(b)) for a, b in pairs)


def _root(arguments: Row, expected: Any, got: Any, atol: float) -> bool:
    value: float = sum(factor * math.pow(got, power) for power, factor in enumerate(arguments[0]))
    return abs(value) <= atol


_RULES: dict[str, Callable[[Row, Any, Any, float], bool]] = {
    "HumanEval/32": _root,
    "Mbpp/164": _any_result,  # the published solution compares floats and is wrong itself
    "Mbpp/295": _or(lambda number: 0),
    "Mbpp/558": _or(_digits_apart),
    "Mbpp/581": _or(_pyramid),
    **{f"Mbpp/{number}": _same_members for number in (2, 7, 111, 140, 232, 249, 579, 769)},
    **{f"Mbpp/{number}": _same_presence for number in (737, 787, 794)},
}

# --- time ------------------------------------------------------------------------------------------------------------


def time_limit(reference: float) -> float:
    """Seconds a call may take whose published solution took `reference` seconds."""
    return max(1.0, 4.0 * reference)


def total_limit(references: Iterable[float]) -> float:
    """Seconds all calls of one program may take together, with a second to start and one to report."""
    return min(SECONDS, sum(map(time_limit, references))) + 2.0
