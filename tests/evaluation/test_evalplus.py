"""EvalPlus's rules on values that probe their edges; whole files are replayed elsewhere."""

import gzip
import json
import math
import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffucoder.evaluation.evalplus import correct, read_arguments, time_limit, total_limit

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | st.text() | st.binary(),
    lambda parts: (
        st.lists(parts) | st.lists(parts).map(tuple) | st.dictionaries(st.text(), parts) | st.sets(st.integers())
    ),
    max_leaves=8,
)
SPECIAL = ["HumanEval/32", *(f"Mbpp/{n}" for n in (1, 2, 164, 295, 558, 581, 737, 769))]
ARGUMENTS = {"HumanEval/32": ([1, 2],), "Mbpp/295": (8,), "Mbpp/558": (23, 5), "Mbpp/581": (3, 4)}


class Opaque:
    """Stands for a result that is not plain data: it equals nothing."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = object.__hash__


def published(shared: Path) -> list[dict[str, Any]]:
    with gzip.open(shared / "data/MbppPlus.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize(
    ("task", "row", "read"),
    [
        (1, [[1, [2]], "a"], ([1, [2]], "a")),
        (2, [[3, 4], [5]], ((3, 4), (5,))),
        (143, [[[1], [2]]], (([1], [2]),)),
        (63, [[[3, 5], [1, 7]]], ([(3, 5), (1, 7)],)),
        (75, [[[6, 24]], 6], ([(6, 24)], 6)),
        (106, [[5], [9]], ([5], (9,))),
        (115, [[[], [1, 1], {"a": 1}, None]], ([{}, {1}, {}, {}],)),
        (124, ["0", "1j"], (0.0, 1j)),
        (252, ["(1+2j)"], (1 + 2j,)),
        (252, [1], (1 + 0j,)),
        (720, [[4], {"a": 1}], ((4,), {"a": 1})),
        (259, [[[1, 3]], [[6, 7]]], (((1, 3),), ((6, 7),))),
        (278, [[1, [4, [6]]]], ((1, (4, [6])),)),
        (580, [[4, [7, [2]]]], ((4, (7, (2,))),)),
        (722, [{"x": [6.2, 70]}, 6, 70], ({"x": (6.2, 70)}, 6, 70)),
    ],
)
def test_arguments_take_the_types_that_the_task_speaks_of(task: int, row: list[Any], read: tuple[Any, ...]) -> None:
    (found,) = read_arguments(f"Mbpp/{task}", [row])
    assert found == read
    assert repr(found) == repr(read)  # 1 == 1.0 == 1+0j


def test_arguments_satisfy_the_contracts_that_come_with_the_tasks(shared: Path) -> None:
    """MbppPlus states in asserts what each argument is."""
    broken = []
    for row in published(shared):
        head = next(filter(re.compile(rf"def {row['entry_point']}\b").match, row["canonical_solution"].split("\n")))
        contract = textwrap.indent(textwrap.dedent(row["contract"].expandtabs()), "  ")
        for call in read_arguments(row["task_id"], row["base_input"]):
            namespace: dict[str, Any] = {"re": re}
            exec(f"{head.strip()}\n{contract}\n  pass", namespace)
            try:
                namespace[row["entry_point"]](*call)
            except AssertionError:
                broken.append(row["task_id"])
    assert broken == []


@given(PLAIN)
def test_a_value_is_right_where_it_is_expected_and_a_stranger_never(value: Any) -> None:
    if "nan" not in repr(value):  # whose equality is the business of the tests below
        assert correct("Mbpp/1", (), value, value)
    assert not correct("Mbpp/1", (), value, Opaque())


@given(PLAIN, PLAIN, st.sampled_from(SPECIAL), st.sampled_from([0.0, 1e-4]))
def test_no_result_makes_a_rule_fail(expected: Any, got: Any, task: str, atol: float) -> None:
    assert correct(task, ARGUMENTS.get(task, ()), expected, got, atol) in (True, False)


@pytest.mark.parametrize("task", SPECIAL)
def test_monstrous_results_are_wrong_and_do_no_harm(task: str) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for monster in (10**5000, math.nan, -math.inf, [[{}]], deep, {1: 2}, 1e308 * 1j, "9" * 5000):
        verdict = correct(task, ARGUMENTS.get(task, ()), [1.5], monster, 1e-4)
        assert verdict is (task in ("Mbpp/164", "Mbpp/737"))


FLOATS = st.floats(-1e9, 1e9)


@given(st.lists(FLOATS, min_size=1), st.data())
def test_lists_of_floats_are_compared_as_numpy_does(expected: list[float], data: st.DataObject) -> None:
    off = st.sampled_from([0.0, 1e-9, 9e-7, 1.1e-6, 1e-4, 1.0, math.nan, math.inf])
    got = [value + data.draw(off) for value in expected]
    assert correct("Mbpp/1", (), expected, got) == (got == expected or np.allclose(got, expected, rtol=1e-7, atol=1e-6))


@pytest.mark.parametrize(
    ("expected", "got", "atol", "right"),
    [
        (0.3, 0.1 + 0.2, 0.0, True),
        (0.3, 0.30001, 0.0, False),
        (0.3, 0.30001, 1e-4, True),
        (2.0, 2, 0.0, True),  # equal is equal
        (2.0000001, 2, 0.0, False),  # close is not, to another type
        ([1.0, 2.0], (1.0, 2.0), 0.0, False),
        ([1.0, 2.0], [1.0], 0.0, False),
        ([1.0], [1.0, 1.0], 0.0, False),
        ([[0.3]], [[0.1 + 0.2]], 0.0, True),  # at any depth, whatever came before it
        ([[1.0, 1.0]], [[1.0 + 1e-9]], 0.0, False),  # no list is stretched
        ([1, 0.3], [1, 0.1 + 0.2], 0.0, True),
        ([1, 2], [1, 2.0000001], 0.0, False),  # integers have no tolerance of their own
        ((0.0, 1j), (0.0, 1j + 1e-9), 0.0, True),
        (math.inf, math.inf, 0.0, True),
        (math.inf, 1.0, 0.0, False),
        (1.0, math.inf, 0.0, False),
        (math.nan, math.nan, 0.0, True),
        (1.0, math.nan, 0.0, False),
        ("a", "b", 1e-4, False),
        (None, 0.0, 1e-4, False),
        (0.5, 10**400, 1e-4, False),
        (True, 1, 0.0, True),
        (0.5, np.float64(0.5), 0.0, True),
        (0.5, np.float64(0.5 + 1e-9), 0.0, False),  # `type(out) == type(exp)` in EvalPlus
        ([0.5, 2.0], [np.float64(0.5 + 1e-9), np.int64(2)], 0.0, True),
    ],
)
def test_tolerance(expected: Any, got: Any, atol: float, right: bool) -> None:
    assert correct("Mbpp/1", (), expected, got, atol) is right


@pytest.mark.parametrize(
    ("task", "call", "expected", "got", "right"),
    [
        ("Mbpp/2", (), (4, 5), [5, 4, 4], True),
        ("Mbpp/2", (), (4, 5), [5], False),
        ("Mbpp/2", (), (4, 5), [[4], 5], False),
        ("Mbpp/3", (), (4, 5), (5, 4), False),
        ("Mbpp/164", (2, 4), False, True, True),
        ("Mbpp/295", (8,), 7, 0, True),
        ("Mbpp/295", (8,), 7, 8, False),
        ("Mbpp/558", (23, 5), 3, 4, True),  # 2 and 2, the 5 written as 05
        ("Mbpp/558", (23, 5), 3, 3, True),
        ("Mbpp/558", (23, 5), 3, 5, False),
        ("Mbpp/581", (3, 4), 33, 35, True),  # 9 + 6 x 4.272
        ("Mbpp/581", (3, 4), 33, 34, False),
        ("Mbpp/737", (), Opaque(), Opaque(), True),
        ("Mbpp/737", (), Opaque(), True, True),
        ("Mbpp/737", (), Opaque(), False, False),
        ("Mbpp/737", (), Opaque(), None, False),
        ("Mbpp/737", (), None, False, True),
        ("Mbpp/737", (), None, None, True),
        ("HumanEval/32", ([1, 2],), -0.5, -0.49999, True),
        ("HumanEval/32", ([-6, 11, -6, 1],), 1.0, 3.0, True),  # another root is as good
        ("HumanEval/32", ([1, 2],), -0.5, 0.5, False),
        ("HumanEval/32", ([1, 2],), -0.5, None, False),
    ],
)
def test_special_tasks(task: str, call: tuple[Any, ...], expected: Any, got: Any, right: bool) -> None:
    assert correct(task, call, expected, got, 1e-4 if task == "HumanEval/32" else 0.0) is right


def test_special_tasks_are_the_ones_of_their_names(shared: Path) -> None:
    names = {row["task_id"]: row["entry_point"] for row in published(shared)}
    special = (2, 7, 111, 140, 232, 249, 579, 769, 737, 787, 794, 164, 295, 581, 558)
    assert [names[f"Mbpp/{number}"] for number in special] == (
        "similar_elements find_char_long common_in_nested_lists extract_singly larg_nnum intersection_array "
        "find_dissimilar Diff check_str text_match_three text_starta_endb are_equivalent sum_div surface_Area "
        "digit_distance_nums"
    ).split()


def test_time_is_four_times_the_published_solutions_and_a_second_at_least() -> None:
    assert (time_limit(0.0), time_limit(0.5)) == (1.0, 2.0)
    assert total_limit([0.1, 0.5]) == 1.0 + 2.0 + 2.0
    assert total_limit([1.0] * 1000) == 62.0


def test_the_older_rules_compare_what_is_now_a_set_in_order() -> None:
    assert correct("Mbpp/2", ((1, 2), (2, 1)), (1, 2), {2, 1})
    assert not correct("Mbpp/2", ((1, 2), (2, 1)), (1, 2), (2, 1), in_order=True)
    assert correct("Mbpp/295", (4,), 3, 0, in_order=True)
