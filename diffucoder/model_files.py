"""The text files of a model folder, read without trusting their author.

For: every file that describes a model or its tokenizer. A fault of a file is a CheckpointError of one line.
Not for: weights (`models.weights`), what the files mean.

A file has to be inside the folder: a link could bring a private file into a chat template, which is sent to whoever
chats. `files` refuses pipes and large files.
"""

import stat
from pathlib import Path

from diffucoder.errors import CheckpointError
from diffucoder.files import Json, decode_text, parse_object, read_bytes

_MAX_TEXT = 16 * 2**20  # bytes: the index of a model with 10,000 experts has 8 MiB
_MAX_VOCABULARY = 64 * 2**20  # of 250,000 tokens: 33 MiB
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt")
_MAX_DEPTH = 50  # brackets inside brackets


def read_json(path: Path) -> Json:
    """Return the object in a JSON file of a model, {} if there is none. Raises CheckpointError if it is damaged."""
    text = read_model_text(path)
    try:
        return {} if text is None else parse_object(text, deepest=_MAX_DEPTH)
    except ValueError as error:
        reason = f"cannot be read as JSON, or holds no JSON object ({one_line(error)})"
        raise CheckpointError(f"{path} {reason}; fetch it again") from error


def read_model_text(path: Path, *, folder: Path | None = None) -> str | None:
    """Return the text of a file of the model in `folder`, by default that of the file; None if there is none.

    CheckpointError if it is not a regular file, leads out of the folder, is too large or not UTF-8.
    """
    try:
        if not is_regular(path):
            return None
        if path.is_symlink() and not _is_inside(path.resolve(), (folder or path.parent).resolve()):
            raise CheckpointError(f"{path} is a link out of the model's folder; copy the file into it")
        return decode_text(read_bytes(path, most=_MAX_VOCABULARY if path.name in _VOCABULARIES else _MAX_TEXT))
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise CheckpointError(f"{path} cannot be read ({one_line(error)}); fetch it again") from error


def is_regular(path: Path) -> bool:
    """Return whether a file exists. Raises CheckpointError if its name is a folder, pipe, device or dead link.

    Raises OSError.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link to a file that is not there; fetch it again") from None
        return False
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is not a regular file but a folder, pipe, socket or device; fetch it again")
    return True


def one_line(error: object) -> str:
    """Return the text of an error on one printable line, or the name of its class if it has no text."""
    text = " ".join(str(error).split())[:200] or type(error).__name__
    return "".join(character if character.isprintable() else "?" for character in text)


def shown(value: object) -> str:
    """Return a value from a file for an error message, cut to a few words."""
    return one_line(repr(value))[:80]


def _is_inside(target: Path, folder: Path) -> bool:
    """Return whether a file belongs to a model folder. In the Hub's cache, files link to the `blobs` of their model."""
    if folder.parent.name == "snapshots" and target.is_relative_to(folder.parent.parent / "blobs"):
        return True
    return target.is_relative_to(folder)
