"""Read what models and strangers wrote in a process that is killed when reading takes too long, or crashes it.

Python's own parser needs this: a few lines keep it busy for minutes, and deep nesting can end the process. Each thread
that reads has a process of its own, so that one text does not stop the grading of others.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from diffucoder.limited import Limited, LimitError

Result = TypeVar("Result")

# Of a processor, and of address space. Real replies take milliseconds
_limited = Limited(seconds=2, memory=1 << 30)


def read_limited(function: Callable[..., Result], *args: Any, otherwise: Result) -> Result:
    """`function(*args)`, or `otherwise` if that takes over two seconds of a processor or 1 GiB, or crashes.

    Arguments and result are plain data.
    """
    try:
        result: Result = _limited(function, *args)
        return result
    except LimitError:
        return otherwise
