"""Threads for what would keep the event loop for more than a few milliseconds: tokenizing, templates, printing.

While it ran on the loop, every stream and `/health` would wait. Short work has a thread of its own, so that it does not
wait for long work.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_SHORT = 2**16  # bytes of text or positions of a canvas: some hundredths of a second

T = TypeVar("T")


class Threads:
    """Runs functions in order, for coroutines that wait for them."""

    def __init__(self) -> None:
        self.pending = 0  # functions that somebody waits for
        self._for_short = ThreadPoolExecutor(1, "diffucoder-short")
        self._for_long = ThreadPoolExecutor(1, "diffucoder-long")

    async def run(self, work: Callable[[], T], *, size: int) -> T:
        """Return `work()`, which reads or prints about `size` bytes. Cancelling this takes it out of the queue."""
        pool = self._for_short if size <= _SHORT else self._for_long
        self.pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, work)
        finally:
            self.pending -= 1

    def close(self) -> None:
        """Drop what has not begun."""
        for pool in (self._for_short, self._for_long):
            pool.shutdown(wait=False, cancel_futures=True)
