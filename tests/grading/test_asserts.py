"""An assert is split into a question and a check, which together mean what the assert means."""

import json
import math
import re
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import CodeType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffucoder.grading.asserts import Assert, parse
from diffucoder.grading.runner import data_of
from diffucoder.grading.values import from_json

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.integers(), inner),
    max_leaves=6,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
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
        ("assert list([2, 1]) == [1, 2]", "list([2, 1])", [1, 2], [2, 1]),  # a program may define such a function
        ("assert [1, 2] == sorted((2, 1))", "sorted((2, 1))", [1, 2], [2, 1]),
        ("assert f(2) != 4", "f(2)", 5, 4),
        ("assert f(2) is None", "f(2)", None, 0),
        ("assert f(2) is not None", "f(2)", 0, None),
        ("assert f(2) == -1.5", "f(2)", -1.5, 1.5),
        ("assert set(f(2)) == set((4, 5))", "{*f(2)}", {5, 4}, {4}),
        ("assert f(2) in [1, 2]", "f(2)", 2, 3),
        ("assert f(2) > 3", "f(2)", 4, 3),
        ("assert 3 < f(2)", "f(2)", 4, 3),
        ("assert abs(f(2) - 0.5) < 1e-3", "f(2)", 0.5001, 0.6),
        ("assert abs(0.5 - f(2)) <= 1e-3", "f(2)", 0.5, 0.6),
        ("assert math.isclose(f(2), 0.5, rel_tol=0.1)", "f(2)", 0.52, 0.6),
        ("assert math.isclose(0.5, f(2))", "f(2)", 0.5, 0.6),
        ("assert f(2)", "not not f(2)", True, False),
        ("assert f(2)", "not not f(2)", True, 1),
        ("assert not f(2)", "not not f(2)", False, True),
        ("assert f(2) == 4", "f(2)", 4, math.nan),
        ("assert abs(f(2) - 1) < 1", "f(2)", 1, "one"),
        ("assert abs(f(2) - 2.0 / 3.0) < 1e-6", "f(2)", 2 / 3, 0.6),
        ("assert not f(2) != 4", "f(2)", 4, 5),
        ("assert (f(2) == 4) == True", "f(2)", 4, 5),
        ("assert (f(2) == 4) is True", "f(2)", 4, 5),
        ("assert bool(f(2) == 4)", "f(2)", 4, 5),
        ("assert (not f(2)) == True", "not not f(2)", False, True),
        ("assert f(2) - 4 == 0", "f(2)", 4, 5),
        ("assert 2 * f(2) == 'abab'", "f(2)", "ab", "ba"),
        ("assert round(abs(f(2) - 4.0), 3) == 0", "f(2)", 4.0001, 4.1),
        ("assert 1 < f(2) < 3", "f(2)", 2, 3),
        ("assert len(f(2)) == 2", "f(2)", "ab", "abc"),
        ("assert len(set(f(2)) ^ {1, 2}) == 0", "{*f(2)}", {2, 1}, {1}),
        ("assert sorted(f(2), reverse=True) == [2, 1]", "[*f(2)]", [1, 2], [2]),
        ("assert sorted(f(2)) == sorted([2, 1])", "[*f(2)]", [1, 2], [2]),
        ("assert any(f(2))", "not (True not in (not not member for member in f(2)))", True, False),
        ("assert isinstance(f(2), (int, float))", "f(2)", 1.5, "1"),
        ("assert f(2) == [0] * 3 + [1 / 2, -(3 ** 2)]", "f(2)", [0, 0, 0, 0.5, -9], []),
        ("assert f(2) == {'a': 3 * 5}", "f(2)", {"a": 15}, {"a": 3}),
        ("assert f(2)[0].x.lower() == 'a'", "f(2)[0].x.lower()", "a", "b"),
        ("assert Solution().f(2) == 4", "Solution().f(2)", 4, 5),
        ("assert f(lambda x: x + 1, *[1]) == 4", "f(lambda x: x + 1, *[1])", 4, 5),
        ("assert f(k=[i for i in range(3)]) == 4", "f(k=[i for i in range(3)])", 4, 5),
        ("assert max([1, 2]) == 2", "max([1, 2])", 2, 1),
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
        "assert [f(1)] in g()",
        "assert 1 in f(1)",
        "assert 0 < 1 in f(1)",
        "assert True",
        "assert f(x) == 1",
        "assert f(g(1)) == 1",
        "assert [f(1)] == [1]",
        "assert {4: True}[f(2)]",
        "assert str(f(2)) == '4'",
        "assert all([f(2) == 4, f(3) == 9])",
        "assert all(abs(a - b) < 1e-6 for a, b in zip(f(2), [1.0, 2.0]))",
        "assert sum(abs(a - b) for a, b in zip(f(2), [1.0, 2.0])) < 1e-6",
        "assert (lambda r: r == 4)(f(2))",
        "assert f(2)(4)",
        "assert f(2).__eq__(4)",
        "assert f().startswith('a')",
        "assert operator.eq(f(2), 4)",
        "assert is_near(f(2), 4)",
        "assert is_near(4, [result])",
        "assert eval('f(2) == 4')",
        "assert builtins.eval('f(2) == 4')",
        "assert f().near(4)",
        "assert module.f().near(4)",
        "assert f(2) == {**{'a': 1}, 'b': 2}",
        "assert f(2) == {'b': 2, **g(2)}",
        "assert f(2) == dict(**{'a': 1})",
        "assert f(2) == [*[1], 2]",
        "assert f(2) is 4",
        "assert f(2) is not 'a'",
        "assert f(2) is ()",
        "assert f(2) == ...",
        "assert '%s' % f(2) == '4'",
        "assert list(set(f(2))) == [1]",
        "assert f(2) == list({'a', 'b'})",
        "assert f(2) == tuple(set([1, 2]))",
        "assert round(4, f(2)) == 4",
        "assert f(2) == 10 ** 10 ** 10",
        "assert f(2) == 'a' * 10 ** 10",
        "assert f(2) == '%1000000000d' % 1",
        "f(1)",
        "assert f(",
        "",
    ],
)
def test_what_has_another_form_is_left_whole(test: str) -> None:
    assert parse(test) is None


def test_the_guide_says_which_asserts_are_split() -> None:
    page = (Path(__file__).parents[2] / "docs" / "sandbox.md").read_text(encoding="utf-8")
    table = page.partition("| split | not split |")[2].partition("\n\n")[0]
    rows = [row.split(" | ") for row in table.splitlines() if row.startswith("| `")]
    split, whole = ([form for row in rows for form in re.findall("`([^`]*)`", row[side])] for side in (0, 1))
    assert (len(split), len(whole)) == (11, 9)
    assert [form for form in split if parse(f"assert {form}") is None] == []
    assert [form for form in whole if parse(f"assert {form}") is not None] == []


FORMS = [
    "f(2) {} {!r}",
    "{1!r} {0} f(2)",
    "not f(2) {} {!r}",
    "abs(f(2) - {1!r}) {0} 1",
    "round(f(2), 1) {} {!r}",
    "len(f(2)) {} 1 < 3",
    "sorted(f(2)) {} {!r}",
    "tuple(f(2)) {} {!r}",
    "set(f(2)) - {{1, 2}} {} {!r}",
    "max(f(2)) {} {!r}",
    "sum(f(2)) {} {!r}",
    "f(2) * 2 {} {!r}",
    "3 - f(2) {} {!r} / 2",
    "all(f(2))",
    "f(2)",
    "not f(2)",
    "bool(f(2)) {} {!r}",
    "f(2)[0] {} {!r}",
]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(
    form=st.sampled_from(FORMS),
    order=st.sampled_from(["==", "!=", "<", "<=", ">", ">=", "is", "in"]),
    expected=PLAIN.filter(lambda value: "inf" not in repr(value)),
    got=PLAIN,
)
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_a_split_assert_means_what_the_assert_means(form: str, order: str, expected: object, got: object) -> None:
    condition = form.format(order, expected)
    split = parse(f"assert {condition}")
    if split is None:
        return

    def told(expression: str) -> object:
        try:
            return eval(expression, {"f": lambda argument: got})
        except Exception as error:
            return error

    given = told(split.expression)
    meant = told(condition)
    held = not isinstance(given, Exception) and split.holds(given)
    assert held == (not isinstance(meant, Exception) and bool(meant))


def test_no_arithmetic_with_an_answer_takes_long() -> None:
    for test, answer in [
        ("assert 'a' * f(2) == 'a'", 10**12),
        ("assert [0] * f(2) == [0]", 10**12),
        ("assert 2 ** f(2) == 1", 10**12),
        ("assert f(2) ** 1000 == 1", 10**10_000),
        ("assert f(2) % 3 == '1'", "%1000000000d"),
        ("assert sum(f(2)) == 1", [Fraction(1, n) for n in range(1, 5000)]),
    ]:
        split = parse(test)
        assert split is not None
        assert not split.holds(answer)


# Results of many types, as a program writes them. On their way to the condition they must not change in any way that a
# condition can see.
RESULTS = """
None True False 0 1 -1 2 2**70 10**30 0.5 -0.0 1e400 float('nan') 1j 2+0j '' 'a' 'ab' b'' b'ab' bytearray(b'ab')
memoryview(b'ab') [] [1,2] [2,1] [[1],[1]] [nan,nan] [0,None] (1,2) ((1,),) set() {1,2} {(1,2)} frozenset({1,2}) {}
{1:2} {'a':1} {1:[2]} {1:2}.keys() {1:2}.items() {1:[2]}.items() {1:2}.values() {2:0,1:0}.keys() range(3)
iter([1,2]) generated() map(abs,[1,-2]) zip([1],[2]) reversed([1,2]) enumerate('a') slice(1,2) Fraction(1,2)
Fraction(2) Decimal('0.5') Decimal('2') Decimal('NaN') Decimal('-Infinity') Decimal('0.67') [Decimal(1),Fraction(1)]
np.int64(2) np.int8(1) np.uint8(255) np.float64(0.5) np.float32(0.1) np.float16(2) np.longdouble('0.5')
np.bool_(True) np.bool_(False) np.complex64(1j) np.complex128(2) np.array(2) np.array([2]) np.array([[0.5]])
np.array(['ab']) np.array('ab') np.array([b'ab']) np.array([['']]) np.array([None]) np.array(['ab'],dtype=object)
np.array(2,dtype=object) np.array([{1:2}]) np.array([Fraction(1,2)]) np.array([L([1,2])]) '%d' b'%5d' UserString('%s')
Whole() Length() raising([1]) raising([0]) raising([]) nested(900,tuple)
(nested(900),1) {'a':nested(900)} {1:nested(900,tuple)} L(nested(900)) nested(900,L) {nested(900,tuple)} [Series(),{1}]
np.str_('ab') np.float64('nan') [np.int64(1),np.int64(2)] {np.int64(1):np.float64(2)} {np.int64(1),np.int64(2)}
(np.float64(0.5),) np.array([1,2]) np.arange(3.0) P(1,2) E.a S.a C.a L([1,2]) D({1:2}) Z({1,2}) T('ab') B(b'ab')
N(2) F(0.5) Counter('ab') Counter({1:2}) OrderedDict({1:2}) OrderedDict({1:2}).keys() defaultdict(int,{1:2})
ChainMap({1:2},{1:3}) MappingProxyType({1:2}) UserDict({1:2}) UserList([1,2]) UserString('ab') deque([1,2])
array('i',[1,2]) date(2020,1,2) timedelta(1) SimpleNamespace(x=1) Exception('a') int len ... NotImplemented [...]
object() [date(2020,1,2)]*3 [E.a,E.a] [(1,),(1,)] ['b','a'] [True,1,1.0] {True:2} nested(50) nested(900) selfish()
""".split()  # fmt: skip

PRELUDE = """
import enum
from array import array
from collections import ChainMap, Counter, OrderedDict, UserDict, UserList, UserString, defaultdict, deque, namedtuple
from datetime import date, timedelta
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType, SimpleNamespace
import numpy as np
nan = float('nan')
P = namedtuple('P', 'x y')
E = enum.Enum('E', {'a': 1})
S = enum.Enum('S', {'a': 'ab'}, type=str)
C = enum.IntEnum('C', {'a': 2})
L, D, Z, T, B, N, F = (type(b.__name__, (b,), {}) for b in (list, dict, set, str, bytes, int, float))
def generated():
    yield from (1, 2)
def nested(depth, kind=list):
    value = kind([])
    for _ in range(depth):
        value = kind([value])
    return value
def raising(members):
    yield from members
    raise KeyError
class Whole:
    __int__ = __trunc__ = lambda self: 2
    __abs__ = lambda self: 0.5
    __round__ = lambda self, digits=0: 0.67
class Series:
    pass
class Length:
    __len__ = lambda self: 2
def selfish():
    value = []
    value.append(value)
    return value
"""

CONDITIONS = """
f() == {} | f() != {} | {} == f() | f() is {} | f() is not {} | f() in [{}, 7] | f() not in ({},)
f() in {{1, 2, 'ab'}} | f() < {} | f() >= {} | 0 <= f() < {} | not f() == {} | (f() == {}) is True
(f() == {}) == True | (f() != {}) is False | abs(f() - {}) < 1e-6 | abs({} - f()) <= 0.5 | f() + {} == 4
f() * 2 == {} | 2 * f() == {} | f() ** 2 == {} | f() / 2 == {} | f() // 2 == {} | f() % 2 == {} | f() | {{1}} == {}
f() - {{1}} == {} | f() & {{1, 2}} == {} | -f() == {} | +f() == {} | isinstance(f(), int)
isinstance(f(), (float, complex)) | isinstance(f(), str) | isinstance(f(), (list, tuple))
isinstance(f(), (set, frozenset)) | isinstance(f(), dict) | isinstance(f(), bytes) | isinstance(f(), bool) | f()
not f() | bool(f()) | bool(f()) == {} | len(f()) == 2 | len(f()) == 1 | round(f(), 1) == {} | round(f()) == {}
int(f()) == {} | float(f()) == {} | abs(f()) == {} | math.isclose(f(), {}) | math.floor(f()) == {}
math.ceil(f()) == 1 | math.fabs(f()) == {} | list(f()) == {} | tuple(f()) == {} | set(f()) == {}
frozenset(f()) == {} | sorted(f()) == {} | sum(f()) == {} | max(f()) == {} | min(f()) == {} | any(f()) | all(f())
len(set(f())) == 1 | len(set(f())) == 2 | len(list(f())) == 2 | list(set(f())) == {} | sorted(set(f())) == {}
sorted(f(), reverse=True) == {} | set(f()) | {{7}} == {} | sum(set(f())) == {} | '%s' % f() == {} | f() == ...
f()[0] == {} | f()[1] == {} | f().real == {} | f().value == {} | f().keys() == {} | f() == {{**{{}}}}
f() == [*[1], 2] | f() is ()
""".replace("\n", " | ").strip(" |").split(" | ")  # fmt: skip

LITERALS = """
None True False 1 2 0.5 0.1 0.67 -0.0 'ab' 'a' b'ab' [] [1,2] [2,1] (1,2) {1,2} {1} {(1,2)} {1:2} {'a':1,'b':1} {}
2+0j float('nan') frozenset({1,2}) [[1],[1]] ['a','b'] set() list({1,2}) [1,2,3][:2] (None,) 10**30 255
dict([(1,2)])
""".split()  # fmt: skip


@cache
def split_conditions() -> list[tuple[Assert, CodeType, CodeType]]:
    """All conditions that are split, with the code of the question and of the whole."""
    found = []
    for condition in CONDITIONS:
        for literal in LITERALS if "{}" in condition else [""]:
            filled = condition.format(literal)
            split = parse(f"assert {filled}")
            if split is not None:
                question = compile(split.expression, filled, "eval")
                found.append((split, question, compile(f"True if {filled} else False", filled, "eval")))
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("result", RESULTS)
def test_a_value_behaves_in_a_condition_as_in_python(result: str) -> None:
    names: dict[str, object] = {"math": math}
    exec(PRELUDE, names)
    exec(f"def f(): return {result}", names)
    for split, question, whole in split_conditions():
        try:
            meant = bool(eval(whole, names))
        except Exception:
            meant = False
        try:
            held = split.holds(from_json(json.loads(json.dumps(data_of(eval(question, names))))))
        except Exception:
            held = False
        assert held == meant, whole.co_filename
