"""Plain data: the values that come back from a program. JSON to values, values to JSON, values to text.

The program's side is `runner.to_json`. A program chooses what it answers, so reading an answer never takes longer than
its length suggests: no fraction that is slow to reduce, no set of values that all have one hash.
"""

from collections import Counter, UserList, UserString
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import chain
from types import MappingProxyType
from typing import Any  # what `runner.CONTENTS` names, numbers of numpy, a Digest or an Opaque

from diffucoder.grading import runner

_MAX_DIGITS = 20_000  # hexadecimal digits of a part of a fraction, which is then reduced in milliseconds
_MAX_DEPTH = 10_000  # of containers in each other; hashing and printing them takes stack
_MAX_COLLISIONS = 16  # different members of a set with one hash; more do not happen by chance


@dataclass(frozen=True)
class Digest:
    """Stands for a list that is too large to send. It equals the digest of an equal list, without any tolerance."""

    sha256: str


_WITHOUT_TRUTH = {"numpy.ndarray", "pandas.DataFrame", "pandas.Series", "pandas.Index"}  # whose comparisons are arrays


@dataclass(frozen=True, eq=False)
class Opaque:
    """Stands for a value that is not plain data. It equals only itself, and has the length of the value."""

    kind: str
    length: int | None = None

    def __eq__(self, other: object) -> bool:
        if self.kind in _WITHOUT_TRUTH:
            raise ValueError(f"whether {self!r} equals something is not one answer")
        return self is other

    __hash__ = object.__hash__

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError(f"{self!r} has no length")
        return self.length

    def __bool__(self) -> bool:
        return self.length != 0

    def __repr__(self) -> str:
        return f"<{self.kind}>"


def to_json(value: Any) -> Any:
    """What `from_json` reads."""
    if isinstance(value, Digest):
        return {"digest": value.sha256}
    try:
        return runner.to_json(value)
    except RecursionError:
        return runner.deep_to_json(value)


def from_json(data: Any) -> Any:
    """Plain data from the JSON that `to_json` makes. Raises ValueError, TypeError or LookupError otherwise."""
    if isinstance(data, dict) and data.keys() == {"deep"}:  # not within data: hashing what is deeper ends the process
        return _deep(data["deep"])
    return _shallow(data)


def _shallow(data: Any) -> Any:
    if isinstance(data, list):
        return list(map(_shallow, data))
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    if kind in _MAPPINGS:
        return _container(kind, [(_shallow(key), _shallow(value)) for key, value in content])
    if kind in _SEQUENCES or kind in _SETS:
        return _container(kind, list(map(_shallow, content)))
    if kind in _BYTES:
        return _BYTES[kind](bytes.fromhex(content))
    match kind:
        case "UserString":
            return UserString(str(content))
        case "complex":
            return complex(*content)
        case "int":
            return int(content, 16)
        case "ratio" | "decimal":
            return _exact(content)
        case "subclass":
            return _container(kind, [_shallow(content)])
        case "digest":
            return Digest(str(content))
        case "object":
            kind, length = content
            return Opaque(str(kind), length if type(length) is int else None)
        case "array":
            return _array(*content)
    return _numpy(kind, content)


_SEQUENCES: dict[str, Callable[[Any], Any]] = {"list": list, "tuple": tuple, "UserList": UserList}
_SETS: dict[str, Callable[[Any], Any]] = {
    "set": set, "frozenset": frozenset, "keys": lambda members: dict.fromkeys(members).keys()
}  # fmt: skip
_MAPPINGS: dict[str, Callable[[Any], Any]] = {
    "dict": dict, "Counter": Counter, "mapping": MappingProxyType, "items": lambda pairs: pairs.items()
}  # fmt: skip
_BYTES: dict[str, Callable[[Any], Any]] = {"bytes": bytes, "bytearray": bytearray, "memoryview": memoryview}
_SUBCLASSES: dict[type, Any] = {base: type(base.__name__, (base,), {}) for base in runner.EXACT}


def _exact(content: str | list[str]) -> Fraction | Decimal:
    """A fraction or a decimal number. Raises ValueError for one that takes long to compute with."""
    if isinstance(content, str):
        number = Decimal(content)
        if number.is_finite() and (len(content) > _MAX_DIGITS or abs(number.adjusted()) > _MAX_DIGITS):
            raise ValueError(f"a decimal number has more than {_MAX_DIGITS} digits")
        return number
    if max(map(len, content)) > _MAX_DIGITS:
        raise ValueError(f"a part of a fraction has more than {_MAX_DIGITS} digits")
    numerator, denominator = content
    return Fraction(int(numerator, 16), int(denominator, 16))


def _numpy(character: str, content: Any) -> Any:
    """A number of the type of numpy that has this character. Raises ValueError for any other."""
    import numpy as np  # late: slow to import, and few programs answer with its numbers

    if len(character) != 1 or character not in "?bhilqpBHILQPefdgFDG":
        raise ValueError(f"{character!r} is not a kind of plain data")
    if character in "gG":
        return np.frombuffer(bytes.fromhex(content), character)[0]
    number = _shallow(content)
    if not isinstance(number, int | float | complex):  # a list would become an array
        raise ValueError(f"{number!r} is not a number")
    return np.dtype(character).type(number)


def _array(dimensions: int, kind: str, content: Any) -> Any:
    """An array of one number, string or object. Raises ValueError for more dimensions than numpy has."""
    import numpy as np  # late, as in `_numpy`

    item = _shallow(content)
    if kind == "O":
        array = np.array(None, object, ndmin=dimensions)
        array[(0,) * dimensions] = item
        return array
    if not isinstance(item, str | bytes | np.generic):  # a list would become an array
        raise ValueError(f"{item!r} is not a string or a number of numpy")
    return np.array(item, ndmin=dimensions)


def _deep(parts: list[tuple[str, Any]]) -> Any:
    """A value from what `runner.deep_to_json` makes."""
    values: list[Any] = []  # what is not yet a member, and how deep it is
    depths: list[int] = []
    for kind, content in parts:
        if kind == "data":
            values.append(_shallow(content))
            depths.append(0)
            continue
        start = len(values) - content
        if not 0 <= start <= len(values):
            raise ValueError(f"a {kind} of {content} members has only {len(values)}")
        depths[start:] = [1 + max(depths[start:], default=0)]
        if depths[start] > _MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {_MAX_DEPTH}")
        members = values[start:]
        if kind == "dict":  # its keys and values by turns
            members = list(zip(members[::2], members[1::2], strict=True))
        values[start:] = [_container(kind, members)]
    (value,) = values
    return value


def _container(kind: str, members: list[Any]) -> Any:
    """A container of these members, those of a mapping pairs. Raises ValueError for many with one hash."""
    if kind in _SETS:
        return _SETS[kind](set_of(members))
    if kind in _MAPPINGS:
        set_of(key for key, _ in members)
        return _MAPPINGS[kind](dict(members))
    if kind == "subclass":
        (base,) = members
        return _SUBCLASSES[type(base)](base)
    return _SEQUENCES[kind](members)


def set_of(members: Iterable[Any] = ()) -> set[Any]:
    """`set(members)` in linear time. Raises ValueError for members that were chosen to have the same hash."""
    by_hash: dict[int, list[Any]] = {}
    for member in members:
        same_hash = by_hash.setdefault(hash(member), [])
        if member not in same_hash:
            if len(same_hash) == _MAX_COLLISIONS:
                raise ValueError(f"more than {_MAX_COLLISIONS} members of a set have the same hash")
            same_hash.append(member)
    return set(chain.from_iterable(by_hash.values()))


def short(value: Any) -> str:
    """A value in at most a hundred characters."""
    try:
        return readable(repr(value), 100)
    except (ValueError, RecursionError):  # an integer with too many digits to print
        return "something too large to show"


def readable(text: str, limit: int = 300) -> str:
    """The text on one line of at most `limit` characters, each of which can be printed and stored."""
    line = " ".join(text[: 10 * limit].split())
    if len(line) > limit:
        line = line[: limit - 3] + "..."
    for character in set(line):
        if not character.isprintable():
            line = line.replace(character, "\N{REPLACEMENT CHARACTER}")
    return line
