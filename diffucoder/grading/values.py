"""Plain data: the values that come back from a program. JSON to values, values to JSON, values to text.

The program's side is `runner.to_json`. A program chooses what it answers, so reading an answer never takes longer than
its length suggests: no fraction that is slow to reduce, no set of values that all have one hash.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import Any  # None, bool, numbers, str, bytes, list, tuple, set, frozenset, dict, Digest or Opaque

from diffucoder.grading import runner

_MAX_DIGITS = 20_000  # hexadecimal digits of a part of a fraction, which is then reduced in milliseconds
_MAX_COLLISIONS = 16  # different members of a set with one hash; more do not happen by chance


@dataclass(frozen=True)
class Digest:
    """Stands for a list that is too large to send. It equals the digest of an equal list, without any tolerance."""

    sha256: str


@dataclass(frozen=True, eq=False)
class Opaque:
    """Stands for a value that is not plain data. It equals only itself, and has the length of the value."""

    kind: str
    length: int | None = None

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
    return {"digest": value.sha256} if isinstance(value, Digest) else runner.to_json(value)


def from_json(data: Any) -> Any:
    """Plain data from the JSON that `runner.to_json` makes. Raises ValueError, TypeError or LookupError otherwise."""
    if isinstance(data, list):
        return list(map(from_json, data))
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    match kind:
        case "tuple":
            return tuple(map(from_json, content))
        case "set":
            return set_of(map(from_json, content))
        case "frozenset":
            return frozenset(set_of(map(from_json, content)))
        case "dict":
            pairs = [(from_json(key), from_json(value)) for key, value in content]
            set_of(key for key, _ in pairs)  # raises ValueError for keys of one hash
            return dict(pairs)
        case "bytes":
            return bytes.fromhex(content)
        case "complex":
            return complex(*content)
        case "int":
            return int(content, 16)
        case "ratio":
            if max(map(len, content)) > _MAX_DIGITS:
                raise ValueError(f"a part of a fraction has more than {_MAX_DIGITS} digits")
            numerator, denominator = content
            return Fraction(int(numerator, 16), int(denominator, 16))
        case "digest":
            return Digest(str(content))
        case "object":
            kind, length = content
            return Opaque(str(kind), length if type(length) is int else None)
    raise ValueError(f"{kind!r} is not a kind of plain data")


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
