"""Find the program in a model's reply, or make one from its continuation of a prompt.

`replies` says how. Each function here runs in a process with limits (`reading`). A text that goes over them is returned
as it is, for the sandbox to judge. Not for: the strict check of the format in training rewards (`training.rewards`).
"""

from collections.abc import Iterable

from diffucoder.grading import replies, syntax
from diffucoder.grading.reading import read_limited


def program_from(reply: str, *, names: Iterable[str] = ()) -> str:
    """The program that a reply holds: the first blocks that define `names`, and the blocks that these need.

    Without `names` it is every block that defines something new, except tests. If no block defines anything, it is the
    first block of Python statements, else the first block. A draft in a thinking section is not an answer. Around code
    without a fence, prose is removed. The reply ends at the first terminator.
    """
    return read_limited(replies.program_from, reply, list(names), otherwise=reply)


def program_blocks(reply: str, *, names: Iterable[str] = ()) -> list[str]:
    """The blocks of a reply that `program_from` puts together."""
    return read_limited(replies.program_blocks, reply, list(names), otherwise=[reply])


def answered(prompt: str, reply: str, entry_point: str) -> str:
    """A whole program from an instruct model's reply, which has the requested function or only its body.

    The prompt's imports and helpers are added. Of what follows the function, only what it needs
    is kept, as in `completed`.
    """
    return read_limited(replies.answered, prompt, reply, entry_point, otherwise=reply)


def completed(prompt: str, completion: str, entry_point: str) -> str:
    """A whole program from a base model's continuation of `prompt`, cut after the requested function.

    Of what follows the function, only the helpers and imports that it needs are kept. A continuation that repeats the
    function from its head, or that answers in a fence, is accepted. Without the function everything is kept, for the
    tests to fail on.
    """
    return read_limited(replies.completed, prompt, completion, entry_point, otherwise=prompt + completion)


def program_key(reply: str) -> str:
    """A key for comparing the programs of replies: the dump of the syntax tree, or the text if it does not parse."""
    return read_limited(replies.program_key, reply, otherwise=reply.strip())


def called_names(tests: Iterable[str]) -> list[str]:
    """The names that tests look up, such as that of the function they call."""
    return read_limited(replies.called_names, list(tests), otherwise=[])


def future_first(program: str) -> str:
    """The program with its `from __future__` imports at its beginning, where alone Python allows them."""
    if "__future__" not in program:
        return program
    return read_limited(syntax.future_first, program, otherwise=program)
