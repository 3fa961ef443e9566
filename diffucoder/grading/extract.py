"""Find the program in a model's reply.

Models differ in how neatly they fence code, so this reads what a person would read as the program. The strict check of
the format that training rewards is another matter, and does not belong here.
"""

import re
import textwrap

_TERMINATORS = re.compile(r"<\|(?:im_end|endoftext|dlm_pad)\|>")
# The method's own prompt has a fence open at the end of a text line, so a ```python is one wherever it stands.
_PYTHON_FENCE = re.compile(r"```[ \t]*(?:python|py)[0-9.]*(?![\w.+-])[^\n`]*(?:\n|\Z)", re.IGNORECASE)
_ANY_FENCE = re.compile(r"^[ \t]*```[^\n`]*(?:\n|\Z)", re.MULTILINE)
# Backticks within a line are the program's own: x = "```".
_CLOSING_FENCE = re.compile(r"^[ \t]*```|```[ \t]*$", re.MULTILINE)


def program_from(reply: str) -> str:
    """The first ```python block, else the first fenced block, else the text itself; all up to the first terminator."""
    text = _TERMINATORS.split(reply, maxsplit=1)[0].replace("\r\n", "\n")
    opening = _PYTHON_FENCE.search(text) or _ANY_FENCE.search(text)
    if opening is None:
        return text.strip("\n")  # and no more: a completion's indentation is part of it
    return textwrap.dedent(_CLOSING_FENCE.split(text[opening.end() :], maxsplit=1)[0]).strip("\n")
