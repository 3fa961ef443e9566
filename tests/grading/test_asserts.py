"""An assert is split into a question and a check, which together mean what the assert means."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffucoder.grading.asserts import parse

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.integers(), inner),
    max_leaves=6,
)


@given(expected=PLAIN, got=PLAIN)
def test_an_equality_holds_for_equal_values_and_no_others(expected: object, got: object) -> None:
    split = parse(f"assert f(1, 2) == {expected!r}")
    if "inf" in repr(expected):  # no literal says it
        assert split is None
        return
    assert split is not None
    assert split.expression == "f(1, 2)"
    assert split.holds(expected)
    assert split.holds(got) == (got == expected)


@pytest.mark.parametrize(
    ("test", "expression", "good", "bad"),
    [
        ("assert f(2) == 4, 'squares'", "f(2)", 4, 5),
        ("assert 4 == f(2)", "f(2)", 4, 5),
        ("assert f(2) != 4", "f(2)", 5, 4),
        ("assert f(2) is None", "f(2)", None, 0),
        ("assert f(2) is not None", "f(2)", 0, None),
        ("assert f(2) == -1.5", "f(2)", -1.5, 1.5),
        ("assert set(f(x)) == set((4, 5))", "set(f(x))", {4, 5}, {4}),
        ("assert f(2) in [1, 2]", "f(2)", 2, 3),
        ("assert f(2) > 3", "f(2)", 4, 3),
        ("assert 3 < f(2)", "f(2)", 4, 3),
        ("assert abs(f(2) - 0.5) < 1e-3", "f(2)", 0.5001, 0.6),
        ("assert abs(0.5 - f(2)) <= 1e-3", "f(2)", 0.5, 0.6),
        ("assert math.isclose(f(2), 0.5, rel_tol=0.1)", "f(2)", 0.52, 0.6),
        ("assert math.isclose(0.5, f(2))", "f(2)", 0.5, 0.6),
        ("assert f(2)", "not not f(2)", True, False),
        ("assert f(2)", "not not f(2)", True, 1),
        ("assert not f(2)", "not f(2)", True, False),
        ("assert f(2) == 4", "f(2)", 4, math.nan),
        ("assert abs(f(2) - 1) < 1", "f(2)", 1, "one"),
    ],
)
def test_an_assert_is_split(test: str, expression: str, good: object, bad: object) -> None:
    split = parse(test)
    assert split is not None
    assert split.expression.replace("(f(2))", " f(2)").replace("  ", " ") == expression
    assert split.holds(good)
    assert not split.holds(bad)


@pytest.mark.parametrize(
    "test",
    [
        "assert f(1) == f(2)",
        "x = f(1)\nassert x == 1",
        "assert f(1) == 1 and f(2) == 2",
        "assert 1 < f(1) < 3",
        "assert [f(1)] in g()",
        "assert 1 in f(1)",
        "f(1)",
        "assert f(",
        "",
    ],
)
def test_what_has_another_form_is_left_whole(test: str) -> None:
    assert parse(test) is None
