"""Split an assert into what the program is asked and what is expected, so that the two never meet: str → Assert.

    assert f(2) == 4                         asks f(2), expects 4
    assert set(f(x)) == set((4, 5))          asks set(f(x)), expects {4, 5}
    assert abs(f(2) - 0.5) < 1e-6            asks f(2), expects something that near to 0.5
    assert math.isclose(f(2), 0.5)           the same by math.isclose
    assert not f(2)                          asks for the truth of f(2), expects False

An expected value is a literal, or a container made of literals by name. Whatever is not of these forms is not split.
"""

import ast
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_ORDERS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
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
_TURNED = {ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE, ast.Eq: ast.Eq, ast.NotEq: ast.NotEq}
_MADE = {"set": set, "frozenset": frozenset, "tuple": tuple, "list": list, "dict": dict, "float": float}
_CLOSE = {"math.isclose", "isclose"}


class _NotLiteralError(Exception):
    """The expression is no literal."""


@dataclass(frozen=True)
class Assert:
    """A split assert: `expression` is for the program, `check` for its value."""

    expression: str
    check: Callable[[Any], Any]

    def holds(self, value: Any) -> bool:
        """Whether the program's value passes. A comparison that raises is a failure, as it would be in an assert."""
        try:
            return bool(self.check(value))
        except (TypeError, ValueError, OverflowError, RecursionError, ZeroDivisionError):
            return False


def parse(test: str) -> Assert | None:
    """The split assert, or None where the test has another form."""
    try:
        body = ast.parse(test.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if len(body) != 1 or not isinstance(body[0], ast.Assert):
        return None
    return _split(body[0].test)


def _split(condition: ast.expr) -> Assert | None:
    if isinstance(condition, ast.Compare):
        return _comparison(condition) if len(condition.ops) == 1 else None
    if isinstance(condition, ast.UnaryOp) and isinstance(condition.op, ast.Not):
        return Assert(f"not ({ast.unparse(condition.operand)})", lambda value: value is True)
    if isinstance(condition, ast.Call) and ast.unparse(condition.func) in _CLOSE:
        return _closeness(condition)
    if isinstance(condition, (ast.Call, ast.Name, ast.Attribute, ast.Subscript)):
        return Assert(f"not not ({ast.unparse(condition)})", lambda value: value is True)
    return None


def _comparison(condition: ast.Compare) -> Assert | None:
    left, right, order = condition.left, condition.comparators[0], type(condition.ops[0])
    try:
        expected = _literal(right)
    except _NotLiteralError:
        try:
            expected, left, order = _literal(left), right, _TURNED[order]
        except (_NotLiteralError, KeyError):
            return None
    near = _difference(left) if order in (ast.Lt, ast.LtE) else None
    compare = _ORDERS[order]
    if near is not None:
        asked, centre = near
        return Assert(ast.unparse(asked), lambda value: compare(abs(value - centre), expected))
    return Assert(ast.unparse(left), lambda value: compare(value, expected))


def _difference(expression: ast.expr) -> tuple[ast.expr, Any] | None:
    """(a, 0.5) of abs(a - 0.5) or abs(0.5 - a)."""
    match expression:
        case ast.Call(ast.Name("abs"), [ast.BinOp(left, ast.Sub(), right)], []):
            for asked, centre in ((left, right), (right, left)):
                try:
                    return asked, _literal(centre)
                except _NotLiteralError:
                    continue
    return None


def _closeness(condition: ast.Call) -> Assert | None:
    if len(condition.args) != 2 or any(each.arg is None for each in condition.keywords):
        return None
    asked, expected = condition.args
    try:
        try:
            centre = _literal(expected)
        except _NotLiteralError:
            asked, centre = expected, _literal(asked)
        tolerances = {str(each.arg): _literal(each.value) for each in condition.keywords}
    except _NotLiteralError:
        return None
    return Assert(ast.unparse(asked), lambda value: math.isclose(value, centre, **tolerances))


def _literal(node: ast.expr) -> Any:
    """The value of a literal, or of a container made of one by name. Raises _NotLiteralError."""
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        pass
    match node:
        case ast.Call(ast.Name(name), arguments, []) if name in _MADE and len(arguments) < 2:
            try:
                return _MADE[name](*map(_literal, arguments))
            except (ValueError, TypeError):
                raise _NotLiteralError from None
    raise _NotLiteralError
