"""Jobs: the requests that an engine has accepted, and which of their rows the next forward pass computes.

For: what the client of a request reads, and fair turns. Not for: running passes (`engine`).

Requests share the engine by what they cost: positions that passes computed for them. A pass takes rows of the request
that has had least, then of the next one. While others are there, no request is computed more than `LEAD` positions (and
a row) further than the one that has had least.

Short requests go before all others, in small passes: their passes are hardly slower than alone. `ShortLane` admits
only so many that the others get at least half of the positions computed.
"""

import asyncio
import heapq
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from diffucoder.decoding.requests import Generation, Request
from diffucoder.decoding.step import Sequence as DecodingSequence
from diffucoder.decoding.step import Step
from diffucoder.errors import DiffuCoderError
from diffucoder.models.denoiser import Denoiser

if TYPE_CHECKING:
    from diffucoder.serving.engine import Engine

LEAD = 256  # positions that a request may be computed further than the one that has had least
SHORT = 2048  # positions that all passes of a short request compute at most
FILL = 16  # a pass for short requests is filled with rows of others up to 1/16 of the usual positions
LONG = 2**13  # positions, whose answers take some milliseconds to make
UNCLAIMED = 30.0  # seconds until a job ends whose client has not begun to wait for it: it left before
UNREAD = 2**17  # positions in the steps that a client has not read yet, after which its request pauses


class BusyError(DiffuCoderError):
    """The queue is full; `retry_after` is an estimate in seconds."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} requests wait already; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class ClosingError(DiffuCoderError):
    """The engine accepts nothing new: it is stopping, or it has stopped."""

    retry_after = 5.0  # seconds


class LateError(DiffuCoderError):
    """The deadline passed before the request was finished."""


class FailedError(DiffuCoderError):
    """Decoding this request failed."""


class Event(NamedTuple):
    """A step of one row of a request."""

    row: int
    step: Step  # of (1, length of the row)
    settled: list[int]  # the ids that the step adds to the answer's beginning that no later step can change


@dataclass(eq=False)
class Row:
    """A sequence of a job that is not finished."""

    job: "Job"
    number: int
    sequence: DecodingSequence
    settled: int = 0  # how many ids the client knows from the events

    def __post_init__(self) -> None:
        self.cost = len(self.sequence.tokens)  # positions that its next pass is fed

    def passed(self, model: Denoiser) -> None:
        """Note that a pass has computed it: with a cache, the next one is fed less."""
        self.cost = len(self.sequence.tokens)
        if self.sequence.cache_plan.uses_cache:
            self.cost = int(self.sequence.cache_plan.feed(self.sequence, model).sum())


class Job:
    """A request that the engine has accepted. Its client reads the events, then the results."""

    def __init__(self, engine: "Engine", request: Request, watched: bool, ticket: int) -> None:
        """Made by `Engine.submit` in the client's event loop, whose timer ends the job at its deadline."""
        self.request = request
        self.sequences = request.sequences()
        self.watched = watched  # whether each step becomes an event
        self.accepted = time.monotonic()
        self.seconds = 0.0  # from its first forward pass to its last
        self._engine = engine
        self._events: asyncio.Queue[Event | DiffuCoderError | None] = asyncio.Queue()
        self._sent = 0  # events, from the engine's thread
        self._read = 0  # events, in the client's loop
        self._most_unread = max(16, UNREAD // request.canvas.tokens.shape[1])
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(engine.settings.deadline, self._time_out, engine.settings.deadline)
        self._unclaimed = self._loop.call_later(UNCLAIMED, self.leave)
        # State of the queue: the engine changes it under its lock.
        self.ticket = ticket  # of two jobs that have had as much, the smaller goes first
        self.rows = [Row(self, number, sequence) for number, sequence in enumerate(self.sequences)]  # to be finished
        self.kept = 0  # bytes that it may keep until its end
        self.computed = 0  # positions that passes computed for it; a newcomer begins with what the others have had
        self.short = False  # whether it goes before the others
        self.started: float | None = None  # when its first forward pass began

    @property
    def unfinished(self) -> int:
        """Rows to be finished."""
        return len(self.rows)

    @property
    def is_read(self) -> bool:
        """Whether its client keeps up with the events. If not, the job pauses, so that they do not fill memory."""
        return self._sent - self._read < self._most_unread

    async def events(self) -> AsyncIterator[Event]:
        """Yield each step of each row, if watched. Raises LateError or FailedError. Leaving early cancels the job."""
        self.claim()
        try:
            while (event := await self._events.get()) is not None:
                if isinstance(event, DiffuCoderError):
                    raise event
                paused = not self.is_read
                self._read += 1
                if paused:
                    self._engine.wake()
                yield event
        finally:
            self.leave()

    def claim(self) -> None:
        """Note that a client waits for the job; it has to `leave` it."""
        self._unclaimed.cancel()

    def leave(self) -> None:
        """Note that no client waits for the job."""
        self._timer.cancel()
        self._engine.end(self)

    def _time_out(self, deadline: float) -> None:
        late = LateError(f"not finished after {deadline:.0f} s; ask for fewer tokens or samples")
        self._events.put_nowait(late)  # first, whatever has become of the engine
        self._engine.end(self, late)

    async def results(self) -> list[Generation]:
        """Wait for the answers. Raises LateError or FailedError. Cancelling this cancels the job."""
        async for _ in self.events():
            pass
        return await self.made_results()

    async def made_results(self) -> list[Generation]:
        """`results_now`, on a thread if that takes long."""
        if self.request.canvas.tokens.numel() <= LONG:
            return self.results_now()
        return await asyncio.to_thread(self.results_now)

    def results_now(self) -> list[Generation]:
        """The answers, once `events` has ended."""
        return self.request.results(self.sequences, self.seconds)

    def send_step(self, row: Row, step: Step) -> bool:
        """Pass a step to a client that watches, as `send` does."""
        if not self.watched:
            return True
        settled = self.request.settled_ids(row.sequence, start=row.settled)
        row.settled += len(settled)
        self._sent += 1
        return self.send(Event(row.number, step, settled))

    def send(self, event: Event | DiffuCoderError | None) -> bool:
        """Pass an event, an error or the end (None) to the client, from any thread; False if its loop is closed."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:
            return False
        return True


class ShortLane:
    """Admits short requests, as long as the others get at least half of the positions computed."""

    def __init__(self) -> None:
        self.credit = 8 * SHORT  # positions that short requests may still take

    def admit(self, positions: int) -> bool:
        """Whether a request goes before the others, of which all passes compute at most so many positions."""
        if positions > min(SHORT, self.credit):
            return False
        self.credit -= positions
        return True

    def passed(self, rows: Sequence[Row]) -> None:
        """Note the rows of a pass: what it computes for the others may be given to short requests."""
        others = sum(row.cost for row in rows if not row.job.short)
        self.credit = min(self.credit + others, 8 * SHORT)


def least_computed(jobs: Sequence[Job]) -> int:
    """What the job has had that has had least, of those that do not pause and are not short."""
    most = max((job.computed for job in jobs), default=0)
    return min((job.computed for job in jobs if job.is_read and not job.short), default=most)


def rows_of_next_pass(jobs: Sequence[Job], *, most_rows: int, most_positions: int) -> list[Row]:
    """The rows that the next pass computes, charged to their jobs.

    The rows, all as long as the longest, have `most_positions`; a longer row goes alone. If there are short jobs, rows
    of others are added to theirs up to a part of that.
    """
    least = least_computed(jobs)
    queue: list[tuple[bool, int, int, int, Job]] = []
    for job in jobs:
        if job.is_read:
            queue.append((not job.short, job.computed, job.ticket, 0, job))
        job.computed = max(job.computed, least)  # whoever pauses saves nothing up
    ahead = least + LEAD if len(queue) > 1 else float("inf")
    most_beside = most_positions
    if any(job.short for *_, job in queue):
        most_beside = most_positions // FILL
    heapq.heapify(queue)
    chosen: list[Row] = []
    longest = 0
    while queue and len(chosen) < most_rows:
        beside, computed, ticket, number, job = heapq.heappop(queue)
        if beside and computed > ahead:
            break
        row = job.rows[number]
        length = max(longest, len(row.sequence.tokens))
        if chosen and length * (len(chosen) + 1) > (most_beside if beside else most_positions):
            continue  # its job has had least, so it comes first in a later pass
        chosen.append(row)
        longest = length
        job.computed = computed + row.cost
        if number + 1 < len(job.rows):
            heapq.heappush(queue, (beside, job.computed, ticket, number + 1, job))
    return chosen
