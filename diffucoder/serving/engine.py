"""Engine: one thread that owns the model, and requests that join and leave its batch between two steps.

For: a bounded queue, deadlines, cancelling, fair turns, a graceful end. Not for: text and HTTP (`app`), or what a step
does (`decoding.step`).

A request is one or several rows: samples, or lengths that a hole is tried at. At most `max_batch` rows share a forward
pass. They are chosen again for each pass (`jobs`), so that no request waits for the end of another.

Clients call from an event loop, and the engine's thread never waits for them. One lock guards all shared state.
"""

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count

import torch
from prometheus_client import Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from diffucoder.decoding.coder import DiffuCoder
from diffucoder.decoding.requests import Request
from diffucoder.decoding.step import Step, advance
from diffucoder.errors import ConfigError, DiffuCoderError
from diffucoder.serving.cost import Budget
from diffucoder.serving.jobs import (
    BusyError,
    ClosingError,
    Event,
    FailedError,
    Job,
    LateError,
    Row,
    ShortLane,
    least_computed,
    rows_of_next_pass,
)
from diffucoder.serving.settings import EngineSettings

__all__ = ["BusyError", "ClosingError", "Engine", "Event", "FailedError", "Job", "LateError", "load_in_own_thread"]

log = logging.getLogger(__name__)

STATS = {
    "waiting": "requests without a row in the pass",
    "running": "rows in the pass",
    "passes": "forward passes",
    "rows": "rows of all passes",
    "committed": "tokens committed",
    "finished": "requests answered",
    "failed": "requests that failed",
    "late": "requests past their deadline",
    "cancelled": "requests whose clients left",
    "refused": "requests rejected because the queue was full",
    "busy_seconds": "seconds spent in passes",
}
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # seconds, of the requests' latency
LONGEST_PASS = 30.0  # seconds; a pass that takes longer than this and the deadline hangs
QUIET_PASSES = 100  # passes without running out of memory, after which a halved batch is doubled again


def load_in_own_thread(load: Callable[[], DiffuCoder]) -> DiffuCoder:
    """Return `load()`, called on a thread that ends with it. Use it to load a model that an engine is to own.

    Each thread that has computed with torch keeps a team of OpenMP threads, and two teams compete for the cores.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(load).result()


_STAT_OF_END = {type(None): "cancelled", LateError: "late", FailedError: "failed"}


_MEMORY = re.compile("out of memory|can't allocate memory|ALLOC_FAILED")  # as torch reports it in other errors
_LOST = re.compile(  # errors after which every call to a GPU fails, until the process ends
    "device-side assert|illegal (memory access|address|instruction)|misaligned address|launch (failure|timed out)"
    "|hardware stack|unknown error|uncorrectable|ECC error|device (is )?lost|context is destroyed"
)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may help."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_MEMORY.search(str(error)))


def device_is_lost(error: BaseException, device: torch.device) -> bool:
    """Whether no later pass can succeed after this error of one."""
    if isinstance(error, RuntimeError) and _LOST.search(str(error)):
        return True
    try:
        torch.zeros(1, device=device).add(1).item()
    except RuntimeError as probe:
        return not ran_out_of_memory(probe)
    return False


class Engine:
    """Decodes the requests that are submitted, until it is closed."""

    def __init__(self, coder: DiffuCoder, settings: EngineSettings) -> None:
        """Start the thread. From now on it alone may use `coder`'s model."""
        self.coder = coder
        self.settings = settings
        self.budget = Budget(coder.model, settings)
        self.batch_limit = settings.max_batch  # rows of a pass; smaller after memory ran out
        self._stats: dict[str, float] = dict.fromkeys(STATS, 0)
        self._latency = Histogram(
            "diffucoder_request_seconds", "from acceptance to the last token", buckets=BUCKETS, registry=None
        )
        self._jobs: list[Job] = []  # accepted and not ended
        self._running: list[Row] = []  # those of the pass
        self._ended: list[Job] = []  # their cache rows are still to be released
        self._tickets = count()
        self._short_lane = ShortLane()
        self._clock = 0.0  # positions that a job has had that has had an equal share of all passes
        self._quiet_passes = 0  # since memory ran out
        self._pass_began: float | None = None  # the pass that runs now
        self._mean_seconds = 1.0  # of recent requests
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="diffucoder-engine", daemon=True)
        self._thread.start()

    # --- for clients, on any thread ---

    def submit(self, request: Request, *, watched: bool = True) -> Job:
        """Accept a request. Needs a running event loop. Raises BusyError, ClosingError, and ConfigError over a limit.

        Unless it is `watched` its steps make no events, which saves waking the event loop.
        """
        self.check_rows(len(request.canvas.tokens))
        cost = self.budget.cost_of(request)
        self.budget.check(cost, request.params)
        with self._changed:
            if not self.alive:
                raise ClosingError("the server is shutting down, or its engine has stopped or hangs; try again later")
            kept = cost.kept + sum(job.kept for job in self._jobs)
            full = len(self._jobs) >= self.settings.max_batch + self.settings.max_waiting
            if full or kept + cost.passing > self.budget.memory:
                waiting = self._count_waiting()
                self._stats["refused"] += 1
                raise BusyError(waiting, max(1.0, self._mean_seconds * (waiting + 1) / self.batch_limit))
            job = Job(self, request, watched, next(self._tickets))
            job.kept = cost.kept
            job.short = self._short_lane.admit(cost.computed)
            # not the least alone, or newcomers that need one pass each would always go first
            job.computed = max(least_computed(self._jobs), int(self._clock))
            self._jobs.append(job)
            self._changed.notify()
        return job

    def wake(self) -> None:
        """Look again for rows that can be computed: a client has read what its job was paused for."""
        with self._changed:
            self._changed.notify()

    def check_rows(self, rows: int) -> None:
        """Raise ConfigError for a request of too many rows."""
        limit = self.settings.max_rows
        if rows > limit:
            raise ConfigError(
                f"{rows} rows (prompts, times answers, times lengths tried) are over {limit}; ask for fewer"
            )

    def end(self, job: Job, error: DiffuCoderError | None = None) -> None:
        """End a job early, with what its client gets; None if no client waits. Does nothing to a job that has ended."""
        with self._changed:
            if job not in self._jobs:
                return
            stat = _STAT_OF_END.get(type(error))
            if stat is not None:
                self._stats[stat] += 1
            self._remove(job, error)

    def stats(self) -> dict[str, float]:
        """The counts of `STATS` as they are now."""
        with self._changed:
            return {**self._stats, "waiting": self._count_waiting(), "running": len(self._running)}

    def collect(self) -> Iterator[Metric]:
        """The same and the latency, for a registry of Prometheus."""
        for name, value in self.stats().items():
            family = GaugeMetricFamily if name in ("waiting", "running") else CounterMetricFamily
            yield family(f"diffucoder_{name}", STATS[name], value=value)
        yield from self._latency.collect()

    @property
    def alive(self) -> bool:
        """Whether requests are accepted."""
        if self._pass_began is not None and time.monotonic() - self._pass_began > max(
            self.settings.deadline, LONGEST_PASS
        ):
            return False  # the device hangs
        return self._thread.is_alive() and not self._closing

    def close(self, *, drain: bool = True) -> None:
        """Accept nothing new, finish what was accepted or (without `drain`) end it with an error, stop the thread."""
        with self._changed:
            self._closing = True
            if not drain:
                self._end_all(ClosingError("the server was shut down before the answer was finished"))
            self._changed.notify()
        self._thread.join(self.settings.deadline)  # not longer: a forward pass may hang

    # --- the queue; the caller holds the lock ---

    def _count_waiting(self) -> int:
        return len(self._jobs) - len({row.job for row in self._running})

    def _remove(self, job: Job, outcome: DiffuCoderError | None) -> None:
        """Take a job out of the queue and the batch, and send its client the outcome."""
        self._jobs.remove(job)
        self._running = [row for row in self._running if row.job is not job]
        self._ended.append(job)
        job.send(outcome)
        self._changed.notify()

    def _end_all(self, error: DiffuCoderError) -> None:
        for job in tuple(self._jobs):
            with suppress(Exception):  # what breaks for one must not keep the others waiting
                self.end(job, error)

    def _fill_slots(self) -> None:
        """Choose the rows of the next pass."""
        self._running = rows_of_next_pass(self._jobs, most_rows=self.batch_limit, most_positions=self.budget.positions)
        self._short_lane.passed(self._running)
        others = [job for job in self._jobs if job.is_read and not job.short]
        self._clock += sum(row.cost for row in self._running if not row.job.short) / max(1, len(others))

    # --- the thread ---

    def _work(self) -> None:
        """Run passes until the engine is closed and no job is left. However this ends, no client is left waiting."""
        try:
            while self._run_pass():
                pass
        except BaseException:
            self._closing = True
            log.exception("the engine stopped")
        finally:
            with self._changed:
                self._closing = True
                self._end_all(FailedError("this request failed: the engine stopped; the server's log has the reason"))

    def _run_pass(self) -> bool:
        """Wait for jobs, and run a forward pass; False once the engine is closed and no job is left."""
        with self._changed:
            self._changed.wait_for(self._has_work)
            for job in self._ended:  # only now, since a pass may use their cache rows
                for sequence in job.sequences:
                    sequence.release()
            self._ended.clear()
            self._fill_slots()
            rows = list(self._running)
            more = bool(self._jobs) or not self._closing
        if rows:
            self._pass_began = time.monotonic()
            self._advance(rows)
            self._pass_began = None
        return more

    def _has_work(self) -> bool:
        if self._ended or (self._closing and not self._jobs):
            return True
        return any(job.is_read for job in self._jobs)

    def _advance(self, rows: list[Row]) -> None:
        """Run one forward pass for `rows`. If it fails, run one for each row alone, or for fewer if memory ran out."""
        began = time.monotonic()
        passes_before = [row.sequence.forward_passes for row in rows]
        try:
            self._deliver(rows, advance(self.coder.model, [row.sequence for row in rows]), began)
            return
        except Exception as error:
            memory = ran_out_of_memory(error)
            if not memory:
                log.exception("a forward pass over %d rows failed", len(rows))
                if device_is_lost(error, self.coder.model.device):
                    raise
        # Not within the handler, since the error holds the tensors of the pass
        if len(rows) == 1:
            reason = "decoding it broke; the server's log has the reason"
            if memory:
                reason = "there is not enough memory for it; ask for fewer tokens"
            self._fail(rows[0].job, reason)
            return
        for row, passes in zip(rows, passes_before, strict=True):
            if row.sequence.forward_passes != passes:  # the sequence went on, but its step is lost
                self._fail(row.job, "decoding broke in its company; try again")
        if memory:
            self._halve_batch(len(rows))
            return
        for row in rows:
            if row.job in self._jobs:
                self._advance([row])

    def _deliver(self, rows: list[Row], steps: list[Step], began: float) -> None:
        """Count a pass, send its steps, and finish the jobs whose rows are all finished."""
        now = time.monotonic()
        with self._changed:
            self._stats["passes"] += 1
            self._stats["rows"] += len(rows)
            self._stats["busy_seconds"] += now - began
            self._quiet_passes += 1
            if self._quiet_passes % QUIET_PASSES == 0:
                self.batch_limit = min(2 * self.batch_limit, self.settings.max_batch)
            for row, step in zip(rows, steps, strict=True):
                self._stats["committed"] += int(step.committed.sum())
                job = row.job
                if job not in self._jobs:  # it was ended during the pass
                    continue
                if job.started is None:
                    job.started = began
                if not job.send_step(row, step):  # the client's event loop is closed
                    self.end(job)
                    continue
                row.passed(self.coder.model)
                if row.sequence.finish_reason is not None:
                    self._running.remove(row)
                    job.rows.remove(row)
                    if not job.rows:
                        job.seconds = now - job.started
                        self._stats["finished"] += 1
                        self._latency.observe(now - job.accepted)
                        self._mean_seconds = 0.9 * self._mean_seconds + 0.1 * (now - job.accepted)
                        self._remove(job, None)

    def _halve_batch(self, rows: int) -> None:
        """Run smaller batches after memory ran out in a pass over so many rows."""
        log.warning("out of memory with %d rows, going on with half of them", rows)
        with self._changed:
            self._quiet_passes = 0
            self.batch_limit = max(1, rows // 2)

    def _fail(self, job: Job, reason: str) -> None:
        self.end(job, FailedError(f"this request failed: {reason}"))
