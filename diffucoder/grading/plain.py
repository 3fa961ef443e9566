"""Plain data: what comes back from a program, made and shown without waiting, whatever it is: JSON → values → text.

For: `grade` and `judge`. The program's side of it is `harness.plain`. A program chooses what it answers, so nothing
here may take longer than reading it: no fraction that takes long to reduce, no set of values that all have one hash.
"""

from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

from diffucoder.grading.harness import Digest

_DIGITS = 20_000  # hexadecimal ones, of a part of a fraction: reducing it takes milliseconds
_ALIKE = 16  # different values of one hash in a set; more are not there by chance


class Opaque:
    """Stands for a value that is no plain data; equals nothing but itself, and is as long as the value is."""

    def __init__(self, kind: str, length: int | None = None) -> None:
        self.kind, self.length = kind, length

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError(f"{self!r} has no length")
        return self.length

    def __bool__(self) -> bool:
        return self.length != 0

    def __repr__(self) -> str:
        return f"<{self.kind}>"


def from_data(data: Any) -> Any:
    """Plain data from what JSON holds of it (`harness.plain`). ValueError, TypeError and the like for other JSON."""
    if isinstance(data, list):
        return [from_data(each) for each in data]
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    makers: dict[str, Callable[[], Any]] = {
        "tuple": lambda: tuple(map(from_data, content)),
        "set": lambda: set_of(map(from_data, content)),
        "frozenset": lambda: frozenset(set_of(map(from_data, content))),
        "dict": lambda: _table([(from_data(key), from_data(value)) for key, value in content]),
        "bytes": lambda: bytes.fromhex(content),
        "complex": lambda: complex(*content),
        "int": lambda: int(content, 16),
        "ratio": lambda: Fraction(*(int(_short_enough(part), 16) for part in content)),
        "digest": lambda: Digest(str(content)),
        "object": lambda: Opaque(str(content[0]), content[1] if type(content[1]) is int else None),
    }
    return makers[kind]()


def set_of(members: Iterable[Any]) -> set[Any]:
    """`set(members)` in a time that grows as they do. ValueError for members that were chosen to have one hash."""
    by_hash: dict[int, list[Any]] = {}
    for member in members:
        alike = by_hash.setdefault(hash(member), [])
        if member not in alike:
            if len(alike) == _ALIKE:
                raise ValueError("a set of values that all have one hash takes forever")
            alike.append(member)
    return {member for alike in by_hash.values() for member in alike}


def _table(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    set_of(key for key, _ in pairs)
    return dict(pairs)


def _short_enough(part: str) -> str:
    if len(part) > _DIGITS:
        raise ValueError(f"a part of a fraction has {len(part)} digits, more than {_DIGITS}")
    return part


def short(value: Any) -> str:
    """What a value looks like, in a hundred characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer too long to print
        return "something too large to show"
    return readable(text, 100)


def readable(text: str, most: int = 300) -> str:
    """One line, not long, that can be printed and stored anywhere; a program's message may hold what cannot."""
    line = " ".join(text[: 10 * most].split())
    shown = "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in line[: most + 1])
    return shown if len(shown) <= most else shown[: most - 3] + "..."
