"""Split an assert into a question for the program and a condition on its answer, so that the two never meet.

    assert f(2) == 4                       the program evaluates f(2); the condition is answer == 4
    assert abs(f(2) - 2 / 3) < 1e-6        f(2); abs(answer - 2 / 3) < 1e-6
    assert set(f(2)) == set((4, 5))        {*f(2)}; set(answer) == {4, 5}
    assert math.isclose(f(2), 0.5)         f(2); math.isclose(answer, 0.5)
    assert not f(2)                        not not (f(2)); not answer

The program evaluates only the question: a call with literal arguments, and perhaps an attribute, an item or a method
without arguments of its result. So it never learns what is expected. The condition is evaluated here, with plain data
and Python's own functions: a program may shadow `abs` and return objects that equal everything. An assert with two
questions, or of any other form, is not split.
"""

import ast
import math
import operator
import re
import sys
from collections import UserString
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any  # plain data

from diffucoder.grading.reading import read_limited
from diffucoder.grading.values import set_of

_LARGEST = 100_000  # items of a sequence or bits of a number that an operator may produce

_STAR = re.compile(r"%[-#0-9+. ]*\*")  # a width among the arguments of a format

# Calls of these with literals are literals themselves. Any other function may be one of the program's.
_LITERAL_FUNCTIONS = {"dict", "float", "frozenset", "list", "set", "sorted", "tuple"}
# Functions of all members of the answer. The program lists the members, because its answer may be a generator, or
# makes the set, because some members are equal and are not plain data.
_OF_MEMBERS = {"frozenset", "list", "max", "min", "set", "sorted", "sum", "tuple"}
# The truth of all or any members, found without a name that the program could give a meaning. Members may have no end.
_TRUTH_OF_MEMBERS = {
    "any": "not (True not in (not not member for member in {}))",
    "all": "not (False in (not not member for member in {}))",
}
_KEYWORDS = {"reverse", "rel_tol", "abs_tol"}

_TYPES = {kind.__name__: kind for kind in (bool, bytes, complex, dict, float, frozenset, int, list, set, str, tuple)}
# Names that an argument may use, since they always mean the same. Any other name may stand for an answer.
_FIXED_NAMES = {*_TYPES, "bytearray", "range", "math", "string", "datetime", "date", "timedelta", "collections"}
_FIXED_NAMES |= {"deque", "Counter", "OrderedDict", "decimal", "Decimal", "fractions", "Fraction", "np", "numpy"}
# `f`, `module.f` or `Class().f`. Left out are methods of plain data, which may compare an answer with their arguments,
# and functions whose argument is code.
_FUNCTION = re.compile(r"([^\W\d]\w*\.)*([A-Z]\w*\(\)\.)?[^\W\d]\w*")
_NO_FUNCTIONS = {"eval", "exec"}
_NO_METHODS = {*dir(str), *dir(tuple), *dir(frozenset), *dir(float), *dir(dict), *_NO_FUNCTIONS}


class _NotSplitError(ValueError):
    """The assert has a form that is not split."""


@dataclass(frozen=True)
class Assert:
    """A split assert: the program evaluates `expression`, and `holds` decides whether its value passes."""

    expression: str
    condition: ast.expr
    question: ast.expr  # the part of the condition that the program's value replaces

    def holds(self, value: Any) -> bool:
        """Whether the condition holds for the program's value. A condition that raises fails, as in an assert."""
        if self.expression.startswith("not ") and not isinstance(value, bool):
            return False  # a forged answer
        return self._holds(self.question, value)

    def holds_for_result(self, result: Any) -> bool:
        """Whether the condition holds if the function that the program is asked for returns `result`."""
        return self._holds(self.call, result)

    @property
    def call(self) -> ast.expr:
        """The question without what else the program does with the result, as in `not not (f(2))`."""
        part = self.question
        while not _is_question(part):
            part = part.operand if isinstance(part, ast.UnaryOp) else part.args[0]  # type: ignore[attr-defined] # a call
        return part

    def literals(self) -> Iterator[Any]:
        """The values that the condition names."""
        parts = [self.condition]
        while parts:
            part = parts.pop()
            if part is not self.question:
                if _is_literal(part):
                    yield _evaluate(part)
                else:
                    parts += [child for child in ast.iter_child_nodes(part) if isinstance(child, ast.expr)]

    def _holds(self, part: ast.expr, value: Any) -> bool:
        numpy = sys.modules.get("numpy")  # if the value brought it: no warnings of division by zero and the like
        try:
            with numpy.errstate(all="ignore") if numpy else nullcontext():
                return bool(_evaluate(self.condition, part, value))
        except (TypeError, ValueError, ArithmeticError, RecursionError):
            return False


def parse(test: str) -> Assert | None:
    """The split assert, or None if the test has another form."""
    return parse_all([test])[0]


def parse_all(tests: Sequence[str]) -> list[Assert | None]:
    """The split asserts, None for a test of another form. If reading them takes too long, none is split."""
    is_split = read_limited(_which_split, list(tests), otherwise=[False] * len(tests))
    return [parse_locally(test) if split else None for test, split in zip(tests, is_split, strict=True)]


def _which_split(tests: list[str]) -> list[bool]:
    return [parse_locally(test) is not None for test in tests]


def parse_locally(test: str) -> Assert | None:
    """As `parse`, without its limits."""
    try:
        body = ast.parse(test.strip()).body
        if len(body) != 1 or not isinstance(body[0], ast.Assert):
            return None
        condition = body[0].test
        if _is_question(condition):
            condition = ast.Call(ast.Name("bool"), [condition], [])
        question, expression = _find_question(condition)
    except (SyntaxError, ValueError, LookupError, RecursionError, MemoryError):
        return None
    return Assert(expression, condition, question)


# --- the question ----------------------------------------------------------------------------------------------------


def _find_question(node: ast.expr) -> tuple[ast.expr, str]:
    """The only part of a condition that is not literal, and what the program evaluates. Raises _NotSplitError."""
    if _is_question(node):
        return node, ast.unparse(node)
    match node:
        # The program is asked for the truth of its result, since that need not be plain data; in one way for both, or
        # it could read from the question which truth is expected.
        case ast.UnaryOp(ast.Not(), operand) | ast.Call(ast.Name("bool"), [operand], []) if _is_question(operand):
            return operand, f"not not ({ast.unparse(operand)})"
        case ast.Call(ast.Name("any" | "all" as name), [operand], []) if _is_question(operand):
            return node, _TRUTH_OF_MEMBERS[name].format(ast.unparse(operand))
        # Or for a number, since only the program can convert an object of a class of its own.
        case ast.Call(ast.Name("int" | "float" | "abs" | "round"), [operand, *others], []) if _is_question(
            operand
        ) and all(map(_is_literal, others)):
            return node, ast.unparse(node)
        case ast.Call(ast.Name(name), [operand]) if name in _OF_MEMBERS and _is_question(operand):
            _check_call(node)
            members = f"*{ast.unparse(operand)}"
            return operand, f"{{{members}}}" if name in ("set", "frozenset") else f"[{members}]"
        case ast.UnaryOp(sign, operand) if type(sign) in _OPERATORS:
            parts = [operand]
        case ast.BinOp(ast.Constant(str() | bytes()), ast.Mod(), _):
            raise _NotSplitError  # a stand-in for a value may print differently from the value
        case ast.BinOp(left, infix, right) if type(infix) in _OPERATORS:
            parts = [left, right]
        case ast.Compare(left, orders, others):
            parts = [left, *others]
            for order, (one, other) in zip(orders, pairwise(parts), strict=True):
                if isinstance(order, ast.In | ast.NotIn) and not _is_literal(other):
                    raise _NotSplitError  # an object can hold the expected value without being plain data
                if isinstance(order, ast.Is | ast.IsNot) and not (_is_singleton(one) or _is_singleton(other)):
                    raise _NotSplitError  # which equal strings and numbers are one object depends on the interpreter
        case ast.Call():
            parts = _check_call(node)
            if _orders_set(node):
                raise _NotSplitError
        case _:
            raise _NotSplitError
    unknown = [part for part in parts if not _is_literal(part)]
    if not unknown:  # the program may define a function called `list` or `sorted`
        unknown.extend([part for part in parts if isinstance(part, ast.Call)][:1])
    if len(unknown) != 1:
        raise _NotSplitError
    return _find_question(unknown[0])


def _check_call(call: ast.Call) -> list[ast.expr]:
    """The arguments that may hold the question, of a function that is taken for Python's own."""
    name = ast.unparse(call.func)
    first = call.args[:1]
    others = call.args[1:]
    for keyword in call.keywords:
        if keyword.arg not in _KEYWORDS or not _is_literal(keyword.value):
            raise _NotSplitError
    if name == "isinstance" and len(others) == 1 and not call.keywords:
        _types(others[0])  # raises KeyError for a class that is not one of plain data
        return first
    if name in ("isclose", "math.isclose"):
        return call.args
    is_known = name in _FUNCTIONS and name != "dict" and not (name in _OF_MEMBERS and others)
    if not is_known or not all(map(_is_literal, others)):
        raise _NotSplitError
    return first


def _is_literal(node: ast.expr) -> bool:
    """Whether an expression has a value without the program, and one that is not too large."""
    for part in ast.walk(node):
        if isinstance(part, ast.Call) and (
            part.keywords or ast.unparse(part.func) not in _LITERAL_FUNCTIONS or _orders_set(part)
        ):
            return False
    try:
        _evaluate(node)
    except (TypeError, ValueError, ArithmeticError, LookupError):
        return False
    return True


def _orders_set(call: ast.Call) -> bool:
    """Whether this is `list` or `tuple` of what may be a set: its order depends on the process."""
    match call:
        case ast.Call(ast.Name("list" | "tuple"), [argument]):
            ordered = ast.List | ast.Tuple | ast.Dict | ast.Constant
            is_call = isinstance(argument, ast.Call) and ast.unparse(argument.func) in ("list", "tuple", "sorted")
            return not is_call and not isinstance(argument, ordered)
    return False


def _is_singleton(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, bool))


def _is_question(node: ast.expr) -> bool:
    """Whether the program may evaluate this: its result meets nothing in there that could be what is expected."""
    match node:
        case ast.Name():
            return True
        case ast.Attribute(value) | ast.Call(ast.Attribute(value), [], []):
            return _is_question(value)
        case ast.Subscript(value, index):
            return _is_question(value) and _is_fixed(index)
        case ast.Call(function, arguments, keywords):
            values = [keyword.value for keyword in keywords]
            return _is_function(function) and all(map(_is_fixed, [*arguments, *values]))
    return False


def _is_function(node: ast.expr) -> bool:
    path = ast.unparse(node)
    owner, _, name = path.rpartition(".")
    return bool(_FUNCTION.fullmatch(path)) and name not in (_NO_METHODS if owner else _NO_FUNCTIONS)


def _is_fixed(node: ast.expr) -> bool:
    """Whether an argument uses no name to which a program could give a meaning."""
    used = set()
    bound = set(_FIXED_NAMES)
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            used.add(part.id)
            if isinstance(part.ctx, ast.Store):
                bound.add(part.id)
        elif isinstance(part, ast.arg):
            bound.add(part.arg)
    return used <= bound


# --- the condition ---------------------------------------------------------------------------------------------------


def _evaluate(node: ast.expr, question: ast.expr | None = None, answer: Any = None) -> Any:
    """The value of an expression in which `answer` replaces the part `question`. Raises what the expression raises."""

    def value_of(part: ast.expr) -> Any:
        return _evaluate(part, question, answer)

    if node is question:
        return answer
    match node:
        case ast.Constant(value) if value is not ...:
            return value
        case ast.List(items) | ast.Tuple(items) | ast.Set(items):
            kind = {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)]
            return kind(map(value_of, items))
        case ast.Dict(keys, values) if all(keys):  # a key is None where another dictionary is unpacked: {**other}
            return dict(zip(map(value_of, filter(None, keys)), map(value_of, values), strict=True))
        case ast.UnaryOp(sign, operand):
            return _OPERATORS[type(sign)](value_of(operand))
        case ast.BinOp(left, infix, right):
            return _operate(_OPERATORS[type(infix)], value_of(left), value_of(right))
        case ast.Compare(left, orders, others):
            values = list(map(value_of, [left, *others]))
            result = None
            for order, (one, other) in zip(orders, pairwise(values), strict=True):
                result = _OPERATORS[type(order)](one, other)
                if not result:
                    break
            return result
        case ast.Call(ast.Name("isinstance"), [operand, types], []):
            return isinstance(value_of(operand), _types(types))
        case ast.Call(function, arguments, keywords):
            options = {str(keyword.arg): value_of(keyword.value) for keyword in keywords}
            return _FUNCTIONS[ast.unparse(function)](*map(value_of, arguments), **options)
    raise _NotSplitError


def _operate(operate: Callable[..., Any], left: Any, right: Any) -> Any:
    """The result of an operator. Of an array of an object the object is the operand, to keep the operator's bounds."""
    array = None
    operands = []
    for operand in (left, right):
        if type(operand).__module__ == "numpy" and operand.dtype.hasobject:
            array = operand.copy()
            operand = operand.item()
        operands.append(operand)
    result = operate(*operands)
    if array is None:
        return result
    array[(0,) * array.ndim] = result
    return array


def _types(node: ast.expr) -> tuple[type, ...]:
    """The types that the second argument of `isinstance` names. Raises KeyError."""
    names = node.elts if isinstance(node, ast.Tuple) else [node]
    return tuple(_TYPES[ast.unparse(name)] for name in names)


def _multiply(left: Any, right: Any) -> Any:
    for sequence, count in ((left, right), (right, left)):
        is_sequence = isinstance(sequence, Sized) and type(sequence).__module__ != "numpy"
        if is_sequence and len(sequence) * int(count) > _LARGEST:
            raise OverflowError("the product is too large")
    return left * right


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, int | Fraction):
        bits = max(abs(base.numerator), base.denominator).bit_length()
        if bits * int(abs(exponent)) > _LARGEST:
            raise OverflowError("the power is too large")
    return base**exponent


def _modulo(left: Any, right: Any) -> Any:
    if isinstance(left, str | bytes | bytearray | UserString):
        text = left.decode("latin-1") if isinstance(left, bytes | bytearray) else str(left)
        if _STAR.search(text) or sum(map(int, re.findall("[0-9]+", text))) > _LARGEST:
            raise OverflowError("a width in the format is too large")
    return left % right


def _sum(members: Iterable[Any]) -> Any:
    total: Any = 0
    digits = 0
    for member in members:
        if isinstance(member, Fraction):
            digits += member.denominator.bit_length()
            if digits > _LARGEST // 10:
                raise OverflowError("a sum of many fractions takes very long")
        total += member
    return total


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs, "all": all, "any": any, "bool": bool, "dict": dict, "float": float, "int": int, "isclose": math.isclose,
    "len": len, "list": list, "math.ceil": math.ceil, "math.fabs": math.fabs, "math.floor": math.floor,
    "math.isclose": math.isclose, "max": max, "min": min, "round": round, "set": set_of, "sorted": sorted, "sum": _sum,
    "tuple": tuple, "frozenset": lambda members=(): frozenset(set_of(members)),
}  # fmt: skip
_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Not: operator.not_, ast.USub: operator.neg, ast.UAdd: operator.pos,
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: _multiply, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: _modulo, ast.Pow: _power,
    ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.BitXor: operator.xor,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.In: lambda member, container: member in container,
    ast.NotIn: lambda member, container: member not in container,
}  # fmt: skip
