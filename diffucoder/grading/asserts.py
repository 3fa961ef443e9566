"""Split an assert into what the program is asked and what is made of its answer, so that the two never meet.

    assert f(2) == 4                         asks f(2), expects 4
    assert set(f(x)) == set((4, 5))          asks [*f(x)], makes a set of the list, expects {4, 5}
    assert abs(f(2) - 2.0 / 3.0) < 1e-6      asks f(2), does the rest with what it gives
    assert math.isclose(f(2), 0.5)           the same
    assert not f(2)                          asks not f(2), expects True

Only a *question* is evaluated where the program is: a call whose arguments are literals, so that nothing in there knows
what is expected, and what the answer tells of itself (an attribute, an item, a method without arguments). What is
around it (comparisons, arithmetic, built-ins) is done out here, by Python's own operators, with plain data: a program
may shadow `abs` and return objects that equal everything; they do not come along. An assert with anything else around
its question, or with two questions, is not split.
"""

import ast
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from numbers import Number
from typing import Any

from diffucoder.grading.plain import set_of

_Step = Callable[[Any], Any]  # from the program's answer to what the assert makes of it. Any: plain data

_COMPARED: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Is: lambda got, expected: got is expected,
    ast.IsNot: lambda got, expected: got is not expected,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda got, expected: got in expected,
    ast.NotIn: lambda got, expected: got not in expected,
}
_COMPUTED: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
_SIGNS: dict[type[ast.unaryop], _Step] = {ast.Not: operator.not_, ast.USub: operator.neg, ast.UAdd: operator.pos}
_LARGEST = 100_000  # of what a product or power gives: bits of a number, members of a sequence

# Containers and the like: they make literals of literals, and only hand on what they are given.
_MADE: dict[str, Callable[..., Any]] = {
    "set": lambda members=(): set_of(members),
    "frozenset": lambda members=(): frozenset(set_of(members)),
    "tuple": tuple,
    "list": list,
    "dict": dict,
    "float": float,
    "sorted": sorted,
}
# What is done with the members of an answer. The answer may be a generator, so its members are what is asked for.
_OF_MEMBERS: dict[str, Callable[..., Any]] = {
    **{name: _MADE[name] for name in ("set", "frozenset", "tuple", "list", "sorted")},
    "sum": lambda members: sum(map(_plain_number, members)),
    "min": min,
    "max": max,
    "any": any,
    "all": all,
}
# What is done with an answer, or with what was made of it, and literals behind it.
_OF_VALUES: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "bool": bool,
    "round": round,
    "int": int,
    "float": float,
    "len": len,
    "math.fabs": math.fabs,
    "math.floor": math.floor,
    "math.ceil": math.ceil,
}
_CLOSE = {"math.isclose", "isclose"}
_KINDS = {kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)}

# In arguments these names stand for what they always are; other names could be the program's, and so an answer.
_INERT = {*_KINDS, "bytearray", "range", "math", "string", "datetime", "date", "timedelta", "collections", "deque"}
_INERT |= {"Counter", "OrderedDict", "decimal", "Decimal", "fractions", "Fraction", "np", "numpy"}
_CODE = {"eval", "exec"}  # an argument of these is no literal
# Methods of plain data tell how an answer compares with their arguments; a lying answer has them too.
_OF_DATA = {name for kind in (str, tuple, frozenset, float, dict) for name in dir(kind)}


class _NotSplitError(Exception):
    """The expression is no literal, or not made of a question and literals."""


@dataclass(frozen=True)
class Assert:
    """A split assert: `expression` is for the program, `check` for its value."""

    expression: str
    check: _Step

    def holds(self, value: Any) -> bool:
        """Whether the program's value passes. A comparison that raises is a failure, as it would be in an assert."""
        try:
            return bool(self.check(value))
        except (TypeError, ValueError, ArithmeticError, RecursionError):
            return False


def parse(test: str) -> Assert | None:
    """The split assert, or None where the test has another form."""
    try:
        body = ast.parse(test.strip()).body
        if len(body) != 1 or not isinstance(body[0], ast.Assert):
            return None
        return _split(body[0].test)
    except (SyntaxError, ValueError, RecursionError, MemoryError, _NotSplitError):
        return None


def _split(condition: ast.expr) -> Assert:
    whole = ast.Call(ast.Name("bool"), [condition], []) if _is_question(condition) else condition
    return Assert(*_made_of(whole))


def _made_of(node: ast.expr) -> tuple[str, _Step]:
    """The question in an expression, and what the expression makes of its answer. Raises _NotSplitError."""
    if _is_question(node):
        return ast.unparse(node), lambda value: value
    match node:  # truth is asked for, since objects have one that are no plain data
        case ast.UnaryOp(ast.Not(), operand) if _is_question(operand):
            return f"not ({ast.unparse(operand)})", lambda value: value is True
        case ast.Call(ast.Name("bool"), [operand], []) if _is_question(operand):
            return f"not not ({ast.unparse(operand)})", lambda value: value is True
        case ast.UnaryOp(sign, operand) if type(sign) in _SIGNS:
            return _then(operand, _SIGNS[type(sign)])
        case ast.Compare(left, orders, others):
            return _comparison([left, *others], [type(order) for order in orders])
        case ast.BinOp(left, infix, right) if type(infix) in _COMPUTED:
            return _arithmetic(left, type(infix), right)
        case ast.Call(function, [first, *rest], keywords) if all(each.arg for each in keywords):
            return _call(ast.unparse(function), first, rest, {str(each.arg): each.value for each in keywords})
    raise _NotSplitError


def _then(node: ast.expr, last: _Step) -> tuple[str, _Step]:
    expression, step = _made_of(node)
    return expression, lambda value: last(step(value))


def _comparison(operands: list[ast.expr], orders: list[type[ast.cmpop]]) -> tuple[str, _Step]:
    """`a < b < c` with one question in it."""
    at, literals = _one_question(operands)
    if at > 0 and orders[at - 1] in (ast.In, ast.NotIn):
        raise _NotSplitError  # what an answer holds can be asked of objects that are no plain data

    def compared(value: Any) -> bool:
        values = [*literals[:at], value, *literals[at + 1 :]]
        return all(_COMPARED[order](*pair) for order, pair in zip(orders, pairwise(values), strict=True))

    return _then(operands[at], compared)


def _arithmetic(left: ast.expr, infix: type[ast.operator], right: ast.expr) -> tuple[str, _Step]:
    at, literals = _one_question([left, right])
    if at == 0:
        return _then(left, lambda value: _computed(infix, value, literals[1]))
    return _then(right, lambda value: _computed(infix, literals[0], value))


def _call(name: str, first: ast.expr, rest: list[ast.expr], keywords: dict[str, ast.expr]) -> tuple[str, _Step]:
    """A built-in around a question; by the name it is taken for Python's own."""
    if name in _CLOSE and len(rest) == 1:
        at, literals = _one_question([first, rest[0]])
        tolerances = {key: _literal(value) for key, value in keywords.items()}
        return _then((first, rest[0])[at], lambda value: math.isclose(value, literals[1 - at], **tolerances))
    if name == "isinstance" and len(rest) == 1 and not keywords:
        kinds = _kinds(rest[0])
        return _then(first, lambda value: isinstance(value, kinds))
    if name in _OF_MEMBERS and not rest and keywords.keys() <= {"reverse"}:
        made, options = _OF_MEMBERS[name], {key: _literal(value) for key, value in keywords.items()}
        if _is_question(first):
            return f"[*{ast.unparse(first)}]", lambda members: made(members, **options)
        return _then(first, lambda value: made(value, **options))
    if name in _OF_VALUES and not keywords:
        done, more = _OF_VALUES[name], [_literal(each) for each in rest]
        return _then(first, lambda value: done(value, *more))
    raise _NotSplitError


def _one_question(operands: list[ast.expr]) -> tuple[int, list[Any]]:
    """Which operand is no literal, and the values of the others. Of literals alone the first call is the question."""
    for at, each in enumerate(operands):
        if isinstance(each, ast.Constant):
            continue
        try:
            return at, [None if other is each else _literal(other) for other in operands]
        except _NotSplitError:
            continue
    raise _NotSplitError


def _kinds(node: ast.expr) -> tuple[type, ...]:
    names = node.elts if isinstance(node, ast.Tuple) else [node]
    try:
        return tuple(_KINDS[ast.unparse(name)] for name in names)
    except KeyError:
        raise _NotSplitError from None


def _plain_number(value: Any) -> int | float | complex:
    if isinstance(value, int | float | complex):
        return value
    raise TypeError("a sum of fractions may take forever")


# --- questions -------------------------------------------------------------------------------------------------------


def _is_question(node: ast.expr) -> bool:
    """Whether the answer meets nothing in there that could be what is expected of it."""
    match node:
        case ast.Name():
            return True
        case ast.Attribute(value):
            return _is_question(value)
        case ast.Subscript(value, index):
            return _is_question(value) and _is_inert(index)
        case ast.Call(ast.Attribute(value), [], []):
            return _is_question(value)
        case ast.Call(function, arguments, keywords):
            return _is_function(function) and all(map(_is_inert, [*arguments, *(each.value for each in keywords)]))
    return False


def _is_function(node: ast.expr) -> bool:
    """`f`, `module.f` or `Class().f`, but nothing that compares what is before the dot with its arguments."""
    match node:
        case ast.Name(name):
            return name not in _CODE
        case ast.Attribute(ast.Call(made, [], []), name):
            # what a class makes is no answer yet; what a function gives is, and would meet the arguments
            return _is_path(made) and ast.unparse(made).split(".")[-1][0].isupper() and name not in _OF_DATA
        case ast.Attribute(made, name):
            return _is_path(made) and name not in _OF_DATA | _CODE
    return False


def _is_path(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) or (isinstance(node, ast.Attribute) and _is_path(node.value))


def _is_inert(node: ast.expr) -> bool:
    """Whether an argument is made of literals alone: no name in it is one that a program could give a meaning."""
    names = [each for each in ast.walk(node) if isinstance(each, ast.Name)]
    own = {each.id for each in names if isinstance(each.ctx, ast.Store)}
    own |= {each.arg for each in ast.walk(node) if isinstance(each, ast.arg)}
    return {each.id for each in names} <= own | _INERT


# --- literals --------------------------------------------------------------------------------------------------------


def _literal(node: ast.expr) -> Any:
    """The value of a literal, or of what is made of literals by name or by arithmetic. Raises _NotSplitError."""
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        pass
    try:
        match node:
            case ast.Call(ast.Name(name), arguments, []) if name in _MADE and len(arguments) < 2:
                return _MADE[name](*map(_literal, arguments))
            case ast.List(items) | ast.Tuple(items) | ast.Set(items):
                kind = {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)]
                return kind(map(_literal, items))
            case ast.UnaryOp(sign, operand) if type(sign) in _SIGNS:
                return _SIGNS[type(sign)](_literal(operand))
            case ast.Dict(keys, values):
                return {_literal(key): _literal(value) for key, value in zip(keys, values, strict=True) if key}
            case ast.BinOp(left, infix, right) if type(infix) in _COMPUTED:
                return _computed(type(infix), _literal(left), _literal(right))
    except (TypeError, ValueError, ArithmeticError):
        raise _NotSplitError from None
    raise _NotSplitError


def _computed(infix: type[ast.operator], left: Any, right: Any) -> Any:
    """`left infix right`. Raises OverflowError where the result would be large: this is no place to wait for it."""
    if infix is ast.Mod and isinstance(left, str | bytes):
        raise TypeError("no number")  # a format, which may ask for any width
    if infix in (ast.Mult, ast.Pow) and _size(infix, left, right) > _LARGEST:
        raise OverflowError("too large a product")
    return _COMPUTED[infix](left, right)


def _size(infix: type[ast.operator], left: Any, right: Any) -> int:
    """Bits or members of a product or power, about; 0 for floats."""
    for one, other in ((left, right), (right, left)):
        if isinstance(one, str | bytes | list | tuple):
            return len(one) * int(other)
        if not isinstance(one, Number):
            raise TypeError("no number")
    bits, more = (_bits(left), _bits(right))
    return bits * int(abs(right)) if infix is ast.Pow and bits else bits + more


def _bits(number: Any) -> int:
    """Of an integer or fraction; 0 for floats, which are of one size."""
    return 0 if isinstance(number, float | complex) else number.numerator.bit_length() + number.denominator.bit_length()
