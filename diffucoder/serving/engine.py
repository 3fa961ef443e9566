"""Engine: one thread that owns the model, and requests that join and leave its batch between two steps.

For: many requests at once, of any lengths, ages and parameters, through the project's own `advance`: a bounded queue,
deadlines, cancelling, fair turns, draining. Not for: texts and protocols (`app`), or what a step does (`denoise`).

A request is one or several rows (samples, or lengths that a hole is tried at). Rows take turns in at most `max_batch`
places: the next place goes to the request that has fewest of them, of equals to the first in the line, and who has had
a place for `turn` steps while others wait gives it up and stands at the line's end. A row's result is that of decoding
it alone, up to the rounding of matrix products, because a `DecodeState` owns all that decides it: unless `reuse` has it
begin with keys and values of an earlier request.

Everything that is shared is changed under one lock. Events go to the asker's event loop, which is never waited for.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from typing import NamedTuple, Self, TypeVar

import torch

from diffucoder.decoding.denoise import DecodeState, Step, advance
from diffucoder.decoding.generate import DiffuCoder, Generation, Request
from diffucoder.decoding.state import Slot
from diffucoder.decoding.trace import Trace, record
from diffucoder.errors import DiffuCoderError
from diffucoder.serving.settings import EngineSettings

log = logging.getLogger(__name__)


Made = TypeVar("Made")


def apart(work: Callable[[], Made]) -> Made:
    """What `work` gives, on a thread that ends with it: so is a model loaded that an engine is to own.

    Whoever computes in parallel leaves a team of threads behind, one a core. Where two teams are more than the cores,
    both sleep between loops where one would wait, and a small model's pass takes half as long again.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


class BusyError(DiffuCoderError):
    """The queue is full; `retry_after` is a guess in seconds."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} requests wait already; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class ClosingError(DiffuCoderError):
    """The engine takes nothing new: it is about to stop."""


class LateError(DiffuCoderError):
    """The deadline passed before the request was finished."""


class FailedError(DiffuCoderError):
    """Decoding this request broke; the others went on."""


class Event(NamedTuple):
    """A step of one row of a request."""

    row: int
    step: Step  # of (1, own length)


@dataclass(eq=False)
class _Row:
    job: "Job"
    number: int
    state: DecodeState
    steps: list[Step] = field(default_factory=list)
    turn: int = 0  # steps since it got its place


class Job:
    """A request that an engine has accepted: its Events, as they happen, and then what they come to."""

    def __init__(self, engine: "Engine", request: Request, deadline: float, watched: bool) -> None:
        """Made by `Engine.submit`."""
        self.request, self.watched = request, watched
        self.rows: list[_Row] = []  # made by `begin`
        self.traces: list[Trace] = []  # of the rows, once they are finished
        self.todo = deque[_Row]()  # those without a place
        self.places = 0  # rows that have one
        self.line = 0  # who has the smaller number is before others
        self.left = len(request.canvas.tokens)  # rows that are not finished
        self.began, self.deadline = time.monotonic(), time.monotonic() + deadline
        self.cancelled = False
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | DiffuCoderError | None] = asyncio.Queue()
        self._seconds = 0.0

    def begin(self) -> None:
        """Make the rows, on the thread that owns the model: what the preset `fast` stands for may have to be timed."""
        request = self.request = self.request.tuned(self._engine.coder.model)
        numbers = range(len(request.canvas.tokens))
        states = [DecodeState(request.canvas, request.params, row=n, until=request.until) for n in numbers]
        for state in states:
            if request.params.cache == "delayed":
                state.begin_from(self._engine.kept)
        self.rows = [_Row(self, number, state) for number, state in enumerate(states)]
        self.todo.extend(self.rows)

    async def events(self) -> AsyncIterator[Event]:
        """Every step of every row, if watched; raises LateError or FailedError. Leaving early cancels the request."""
        try:
            while (event := await self._events.get()) is not None:
                if isinstance(event, DiffuCoderError):
                    raise event
                yield event
        finally:
            self.cancel()

    async def results(self) -> list[Generation]:
        """Wait to the end: what was asked for. Raises LateError or FailedError; being cancelled cancels the request."""
        async for _ in self.events():
            pass
        return self.results_now()

    def results_now(self) -> list[Generation]:
        """What was asked for, once `events` has come to its end."""
        self.traces = [self._trace(row) for row in self.rows]
        return self.request.finish(self.traces, self._seconds)

    def cancel(self) -> None:
        """Give the request up: before the next step its rows are gone. Does nothing to a finished one."""
        self._engine._cancel(self)

    def _trace(self, row: _Row) -> Trace:
        canvas, number = self.request.canvas, row.number
        tokens = canvas.tokens[number][canvas.valid[number]][None]  # (1, own length), as its steps are
        canvas = replace(
            canvas,
            tokens=tokens,
            valid=torch.ones_like(tokens, dtype=torch.bool),
            sample=canvas.sample[number : number + 1],
        )
        return record(row.steps, canvas, params=self.request.params, model=self._engine.coder.name)[0]

    def _tell(self, event: Event | DiffuCoderError | None) -> None:
        """Hand an event to whoever waits, from any thread."""
        self._seconds = time.monotonic() - self.began
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the asker's loop is gone, and with it everybody who could want it
            self.cancelled = True


@dataclass
class Figures:
    """What the engine has done and is doing; a snapshot."""

    waiting: int = 0  # requests without any place
    running: int = 0  # rows with a place
    passes: int = 0
    rows: int = 0  # of all passes
    committed: int = 0  # tokens
    finished: int = 0  # requests
    failed: int = 0
    late: int = 0
    cancelled: int = 0
    refused: int = 0
    busy_seconds: float = 0.0


class Engine:
    """Decodes what is submitted, until it is closed."""

    def __init__(self, coder: DiffuCoder, settings: EngineSettings | None = None) -> None:
        """Start the thread that owns `coder`'s model from now on."""
        self.coder, self.settings = coder, settings or EngineSettings()
        self.most = self.settings.max_batch  # rows of a pass; halved where memory does not hold them
        self.kept = deque[Slot](maxlen=self.settings.reuse)  # of finished rows; the thread's
        self._figures = Figures()
        self._jobs: list[Job] = []  # accepted and unfinished, the oldest first
        self._places: list[_Row] = []
        self._line = count()
        self._closing = False
        self._mean = 1.0  # seconds that recent requests took
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="diffucoder-engine", daemon=True)
        self._thread.start()

    # --- for those who ask, on any thread with a running loop ---

    def submit(self, request: Request, *, deadline: float | None = None, watched: bool = True) -> Job:
        """Accept a request. Raises BusyError where too many wait, ClosingError after `close`.

        Unless it is `watched` its steps make no events: telling another thread takes longer than many a step.
        """
        job = Job(self, request, min(deadline or self.settings.deadline, self.settings.deadline), watched)
        with self._changed:
            if self._closing:
                raise ClosingError("the server is shutting down; try another, or again in a moment")
            waiting = sum(not job.places for job in self._jobs)
            free = max(0, self.most - len(self._places))  # what came during a pass has no place yet
            if waiting >= self.settings.max_waiting + free:
                self._figures.refused += 1
                raise BusyError(waiting, self._wait(waiting))
            job.line = next(self._line)
            self._jobs.append(job)
            self._changed.notify()
        return job

    def figures(self) -> Figures:
        """A copy of the counts as they are now."""
        with self._changed:
            waiting = sum(not job.places for job in self._jobs)
            return Figures(**{**vars(self._figures), "waiting": waiting, "running": len(self._places)})

    @property
    def alive(self) -> bool:
        """Whether requests are being worked on, or would be."""
        return self._thread.is_alive() and not self._closing

    def close(self, *, drain: bool = True, seconds: float | None = None) -> None:
        """Accept nothing more; finish what was accepted, or without `drain` give it up; then stop the thread."""
        with self._changed:
            self._closing = True
            for job in () if drain else tuple(self._jobs):
                self._end(job, ClosingError("the server was shut down before the answer was finished"))
            self._changed.notify()
        self._thread.join(seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(drain=False)

    def _cancel(self, job: Job) -> None:
        with self._changed:
            if job in self._jobs:
                job.cancelled = True
                self._changed.notify()

    def _wait(self, waiting: int) -> float:
        return max(1.0, self._mean * (waiting + 1) / self.most)

    # --- the thread ---

    def _work(self) -> None:
        while True:
            self._begin()
            if rows := self._next():
                self._advance(rows)
            elif self._closing and not self._jobs:
                return
            del rows  # while it waits for more, it holds on to none

    def _begin(self) -> None:
        """Wait for work, and make the rows of requests that have none yet, outside of the lock."""
        with self._changed:
            while not self._jobs and not self._closing:
                self._changed.wait()
            new = [job for job in self._jobs if not job.rows]
        for job in new:
            try:
                job.begin()
            except Exception:
                log.exception("a request could not begin")
                self._fail([job], "it could not be begun; the server's log has the reason")

    def _next(self) -> list[_Row]:
        """The rows of the next pass; none when it is time to stop."""
        with self._changed:
            self._drop()
            self._place()
            return self._places[: self.most]

    def _drop(self) -> None:
        """End what nobody waits for any more."""
        now = time.monotonic()
        for job in tuple(self._jobs):
            if job.cancelled:
                self._figures.cancelled += 1
                self._free(job)
                self._end(job, None)
            elif now > job.deadline:
                self._figures.late += 1
                self._free(job)
                self._end(
                    job, LateError(f"not finished after {now - job.began:.0f} s; ask for fewer tokens or samples")
                )

    def _place(self) -> None:
        """Give free places away, and take them from rows whose turn is over where others wait."""
        if any(job.todo for job in self._jobs):
            for row in [row for row in self._places if row.turn >= self.settings.turn]:
                self._leave(row)
                row.job.todo.append(row)
                row.job.line = next(self._line)
        while len(self._places) < self.most:
            asking = [job for job in self._jobs if job.todo]
            if not asking:
                return
            job = min(asking, key=lambda job: (job.places, job.line))
            row = job.todo.popleft()
            row.turn = 0
            job.places += 1
            self._places.append(row)

    def _leave(self, row: _Row) -> None:
        self._places.remove(row)
        row.job.places -= 1

    def _free(self, job: Job) -> None:
        """Give up the places of its keys and values. For the thread, between passes."""
        for row in job.rows:
            row.state.slot = None

    def _end(self, job: Job, why: DiffuCoderError | None) -> None:
        """Forget a job, and say so to whoever waits for it."""
        self._jobs.remove(job)
        for row in [row for row in self._places if row.job is job]:
            self._leave(row)
        job.todo.clear()
        job._tell(why)

    def _advance(self, rows: list[_Row]) -> None:
        """One pass for `rows`; where it breaks, for each of them alone."""
        before, began = [row.state.forward_passes for row in rows], time.monotonic()
        try:
            steps = advance(self.coder.model, [row.state for row in rows])
        except (torch.OutOfMemoryError, MemoryError) as error:
            if len(rows) > 1:  # the next pass has half as many
                log.warning("out of memory with %d rows, going on with half of them: %s", len(rows), error)
                with self._changed:
                    self.most = max(1, len(rows) // 2)
                    for row in self._places[self.most :]:
                        self._leave(row)
                        row.job.todo.appendleft(row)
            else:
                self._fail([rows[0].job], "there is not enough memory for it; ask for fewer tokens")
        except Exception:
            if len(rows) == 1:
                log.exception("a request failed")
                self._fail([rows[0].job], "decoding it broke; the server's log has the reason")
            else:
                for row, passes in zip(rows, before, strict=True):
                    if row.state.forward_passes == passes:
                        self._advance([row])
                    else:  # it got on, and its step is lost
                        self._fail([row.job], "decoding broke in its company; try again")
        else:
            self._deliver(zip(rows, steps, strict=True), time.monotonic() - began)

    def _keep(self, state: DecodeState) -> None:
        """Keep a finished row's keys and values, alone: not those of the rows that shared its passes."""
        if self.kept.maxlen and state.slot is not None and state.params.cache == "delayed":
            place, *_, tokens = state.slot
            self.kept.append(Slot(place.alone(len(tokens), len(tokens)), 0, 0, tokens))

    def _fail(self, jobs: Iterable[Job], why: str) -> None:
        with self._changed:
            for job in jobs:
                if job in self._jobs:
                    self._figures.failed += 1
                    self._free(job)
                    self._end(job, FailedError(f"this request failed: {why}"))

    def _deliver(self, made: Iterable[tuple[_Row, Step]], seconds: float) -> None:
        with self._changed:
            self._figures.passes += 1
            self._figures.busy_seconds += seconds
            for row, step in made:
                self._figures.rows += 1
                self._figures.committed += int(step.committed.sum())
                row.steps.append(step)
                row.turn += 1
                job = row.job
                if job not in self._jobs:  # closed without draining while the pass was under way
                    continue
                if job.watched:
                    job._tell(Event(row.number, step))
                if row.state.finish_reason is not None:
                    self._leave(row)
                    self._keep(row.state)
                    row.state.slot = None  # its place is free now, however long somebody holds the request
                    job.left -= 1
                    if not job.left:
                        self._figures.finished += 1
                        self._mean = 0.9 * self._mean + 0.1 * (time.monotonic() - job.began)
                        self._end(job, None)
