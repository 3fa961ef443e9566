"""Checkers: does a text keep a rule, and if not, where does it break it?

A checker is any function from a text to its first flaw, or None. `witness` decodes so that a text keeps one. To add a
setting: an entry in `CHECKERS` and a name in `params`.
"""

import ast
import builtins
import codeop
import re
import symtable
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from diffucoder.grading.syntax import quietly

_TELL_INCOMPLETE: int = codeop.PyCF_ALLOW_INCOMPLETE_INPUT  # type: ignore[attr-defined]  # not in the stubs
_LINE_END = re.compile(r"\r\n|\r|\n")
_MODULE_NAMES = frozenset(dir(builtins)) | {"__name__", "__file__", "__doc__", "__annotations__", "__spec__"}


@dataclass(frozen=True)
class Flaw:
    """Why a text does not keep a rule."""

    at: int  # the first character that is wrong
    message: str
    incomplete: bool = False  # whether more text at the end could mend it


Checker = Callable[[str], Flaw | None]


def python_flaw(text: str) -> Flaw | None:
    """Where CPython's parser stops; None if the text parses."""
    return _flaw_of(text, ast.PyCF_ONLY_AST)


def compile_flaw(text: str) -> Flaw | None:
    """As `python_flaw`, and also what only the compiler finds, such as a `return` outside a function."""
    return _flaw_of(text, 0)


def names_flaw(text: str) -> Flaw | None:
    """As `compile_flaw`, and also the first name that the text looks up and defines nowhere."""
    flaw = compile_flaw(text)
    if flaw is not None:
        return flaw
    tables = [symtable.symtable(text, "<text>", "exec")]
    defined = set(_MODULE_NAMES)
    looked_up: set[str] = set()
    for table in tables:  # which grows
        tables += table.get_children()
        for symbol in table.get_symbols():
            if symbol.is_global() or table.get_type() == "module":
                bound = symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()
                (defined if bound else looked_up).add(symbol.get_name())
    unknown = looked_up - defined
    for found in re.finditer(r"[^\W\d]\w*", text):
        if found[0] in unknown:
            return Flaw(found.start(), f"name {found[0]!r} is not defined")
    return None


CHECKERS: Mapping[str, Checker] = {"python": python_flaw, "compile": compile_flaw, "names": names_flaw}


def _flaw_of(text: str, flags: int) -> Flaw | None:
    if "\0" in text:
        return Flaw(text.index("\0"), "a null character")
    try:
        with quietly():
            compile(text, "<text>", "exec", flags | _TELL_INCOMPLETE, dont_inherit=True)
    except SyntaxError as error:
        at = _offset(text, error)
        rest = text[at:].strip()
        is_last = at >= len(text.rstrip()) or (error.msg.startswith("unterminated string") and "\n" not in rest)
        return Flaw(at, error.msg, incomplete=is_last or error.msg == "incomplete input")
    except (RecursionError, MemoryError):
        return Flaw(0, "nested too deeply")
    except ValueError as error:  # half of a character
        return Flaw(0, str(error))
    return None


def _offset(text: str, error: SyntaxError) -> int:
    """The character that a SyntaxError is about."""
    begins = [0, *(end.end() for end in _LINE_END.finditer(text))]
    line = min(max(error.lineno or 1, 1), len(begins))
    return min(begins[line - 1] + max((error.offset or 1) - 1, 0), len(text))
