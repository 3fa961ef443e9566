"""The errors that the package raises on purpose. `serving.engine` has subclasses of its own.

A message is one line: the value, the rule it broke and a way out. The command line prints it and exits with 2.
"""

import unicodedata

# characters that show text in another order
_REORDERING = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def printable(text: str) -> str:
    r"""Return `text` with control characters, except tabs and line ends, as escapes such as \x1b.

    Text from files and models goes through this before a terminal shows it, because such characters control terminals.
    """
    if text.isprintable():
        return text
    shown: list[str] = []
    for character in text:
        commands = unicodedata.category(character) in ("Cc", "Cs") or character in _REORDERING
        shown.append(character.encode("unicode_escape").decode() if commands and character not in "\t\n" else character)
    return "".join(shown)


class DiffuCoderError(Exception):
    """Base of all errors that input or environment cause, and not a mistake of the package."""


class ConfigError(DiffuCoderError, ValueError):
    """A setting breaks its rule."""


class PromptError(DiffuCoderError, ValueError):
    """A prompt, canvas or hole cannot be decoded."""


class CheckpointError(DiffuCoderError, OSError):
    """A model cannot be found, read or understood."""


class SandboxError(DiffuCoderError, RuntimeError):
    """This machine cannot isolate generated programs."""


def install(extra: str) -> str:
    """How to install what an extra of the package brings."""
    return f"run pip install -e '.[{extra}]' in a clone of the repository"
