"""The engine: results independent of company, and nobody waits for, pays for or falls with a stranger."""

import asyncio
import gc
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffucoder import Canvas, DecodingParams, DiffuCoder
from diffucoder.decoding.requests import Generation, Request
from diffucoder.decoding.step import Sequence, advance
from diffucoder.serving import engine as engine_module
from diffucoder.serving.engine import (
    BusyError,
    ClosingError,
    Engine,
    FailedError,
    Job,
    LateError,
    load_in_own_thread,
)
from diffucoder.serving.settings import EngineSettings

MASK = 9
POISON = 7
PATIENCE = 120  # seconds for anything that only a fault or a very busy machine can hold up


class Slow:
    """Looks like a Denoiser: proposes 3 everywhere, takes `seconds` a pass, notes how many rows it was fed."""

    first_scorable = 1
    max_length = 10**6
    dtype = torch.float32
    vocab_size = 12
    chunk_elements = 1000
    config = SimpleNamespace(hidden_size=8, intermediate_size=8)
    cache = SimpleNamespace(keys=[])

    def __init__(
        self, seconds: float = 0.0, break_on: Callable[[Tensor], BaseException | None] = lambda _: None
    ) -> None:
        self.seconds = seconds
        self.break_on = break_on
        self.device = torch.device("cpu")
        self.mask_id = MASK
        self.fed: list[int] = []
        self.passes: threading.Semaphore | None = None  # how many passes may run, if a test decides it

    def needed_for(self, positions: Tensor) -> Tensor:
        return torch.nn.functional.pad(positions[..., 1:], (0, 1))

    def scorable(self, fed: Tensor) -> Tensor:
        return fed & torch.nn.functional.pad(fed[..., :-1], (1, 0))

    def score(self, tokens: Tensor, *, wanted: Tensor, reduce: Any, **_: Any) -> Any:
        if self.passes is not None:
            self.passes.acquire()
        self.fed.append(len(tokens))
        if error := self.break_on(tokens):
            raise error
        time.sleep(self.seconds)
        return reduce(torch.nn.functional.one_hot(torch.full((len(wanted),), 3), 12) * 5.0, slice(0, len(wanted)))


def gated() -> tuple[Slow, threading.Semaphore]:
    """A model, and the semaphore whose releases let it run passes."""
    model = Slow()
    model.passes = threading.Semaphore(0)
    return model, model.passes


class Tokens(Request):
    """A request whose results are the tokens of its rows."""

    def results(self, sequences: Any, seconds: float) -> Any:
        return [sequence.tokens.tolist() for sequence in sequences]


def request(new_tokens: int, first: int = 1, rows: int = 1, kind: type[Request] = Tokens) -> Request:
    """Rows of a prompt token and masks."""
    canvas = Canvas.from_prompts(torch.full((rows, 1), first), new_tokens=new_tokens, mask_id=MASK)
    tokenizer: Any = None
    return kind(canvas=canvas, params=DecodingParams(), tokenizer=tokenizer, model_name="stand-in")


@pytest.fixture
def engine() -> Iterator[Callable[..., Engine]]:
    """Start engines on stand-ins, or on a DiffuCoder."""
    started: list[Engine] = []

    def start(model: Any, **settings: Any) -> Engine:
        coder: Any = model if isinstance(model, DiffuCoder) else SimpleNamespace(model=model, name="stand-in")
        started.append(Engine(coder, EngineSettings(**settings)))
        return started[-1]

    yield start
    for each in started:
        each.close(drain=False)
        assert not each._thread.is_alive()


PROMPTS = [
    "Given a number, double the number.",
    "Write a function that takes a string and removes the vowels.",
    "Write a function filter_numbers(nums) that keeps only the even numbers, then sums the numbers.",
    "Given a list of numbers, return the largest number.",
    "Write a function that reverses the string.",
    "Given a string, count the words.",
    "Given a list of words, join the words.",
    "Write a function that sorts the numbers.",
    "Given a number, return whether the number is even.",
    "Given a list of numbers, square each number.",
    "Write a function that takes a string and makes it upper case.",
    "Given two numbers, add the numbers.",
]


async def outcome(job: Job) -> Any:
    try:
        return await job.results()
    except (LateError, FailedError, ClosingError) as error:
        return error


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)


def run(work: Awaitable[Any]) -> Any:
    async def main() -> Any:
        return await asyncio.wait_for(work, PATIENCE)

    return asyncio.run(main())


# --- results ---------------------------------------------------------------------------------------------------------


def test_an_answer_is_the_same_alone_and_among_strangers(engine: Callable[..., Engine]) -> None:
    coder = DiffuCoder.load(dtype=torch.float32)
    requests = [
        coder.request(PROMPTS[0], DecodingParams(temperature=0.8, seed=5, new_tokens=40)),
        coder.request(PROMPTS[1], DecodingParams(entropy_bound=0.05, num_samples=2, temperature=0.4)),
        coder.request(PROMPTS[2], DecodingParams(block=16, cache="dual", threshold=0.9, new_tokens=48)),
        coder.request(PROMPTS[3], DecodingParams(steps=8, policy="margin")),
        coder.fill_request("def f(xs):\n    return <|hole|>\n", DecodingParams(threshold=0.9)),
        coder.request(PROMPTS[4], DecodingParams(stop=("return",), new_tokens=32)),
    ]

    async def all_at_once() -> list[list[Generation]]:
        busy = engine(coder, max_batch=5, max_positions=300)
        jobs = [busy.submit(each) for each in requests]
        results = list(await asyncio.gather(*(job.results() for job in jobs)))
        await asyncio.to_thread(busy.close)  # the model is ours again
        return results

    together = run(all_at_once())
    for request, results in zip(requests, together, strict=True):
        alone = coder.run([request])[0]
        assert [result.index for result in results] == list(range(len(alone)))
        assert [result.text for result in results] == [result.text for result in alone]
        assert [result.tokens for result in results] == [result.tokens for result in alone]
        assert [result.trace.steps for result in results] == [result.trace.steps for result in alone]
        for one, other in zip(results, alone, strict=True):
            assert one.trace.log_probs == pytest.approx(other.trace.log_probs, abs=1e-3)


def test_a_batch_of_mixed_ages_is_one_call_that_feeds_what_each_row_needs() -> None:
    """With a delayed cache a new row feeds its whole canvas, an old one its masks, and none its padding."""
    coder = DiffuCoder.load(dtype=torch.float32)
    params = DecodingParams(cache="delayed", new_tokens=24)
    calls: list[list[int]] = []
    score = coder.model.score

    def watched(tokens: Tensor, *, feed: Tensor, **more: Any) -> Any:
        calls.append(feed.sum(-1).tolist())
        return score(tokens, feed=feed, **more)

    coder.model.score = watched  # type: ignore[method-assign]
    sequences = [Sequence(coder.request(prompt, params).canvas, params) for prompt in PROMPTS[:3]]
    advance(coder.model, sequences[:2])
    fed = [int(sequence.cache_plan.feed(sequence, coder.model).sum()) for sequence in sequences[:2]]
    advance(coder.model, [sequences[2], sequences[1], sequences[0]])
    lengths = [len(sequence.tokens) for sequence in sequences]
    assert calls == [lengths[:2], [lengths[2], fed[1], fed[0]]]
    assert max(fed) <= 25 < min(lengths)
    assert coder.model.cache.in_use == 3
    sequences.pop(1).release()
    sequences.append(Sequence(coder.request(PROMPTS[1], params).canvas, params))
    advance(coder.model, sequences)
    assert coder.model.cache.in_use == 3
    assert coder.model.cache.rows == 4  # two rows, then four: the new row has the place of the one that left
    for sequence in sequences:
        sequence.release()


def test_cache_rows_are_released_even_while_a_client_holds_the_request(engine: Callable[..., Engine]) -> None:
    coder = DiffuCoder.load(dtype=torch.float32)
    params = DecodingParams(cache="delayed", entropy_bound=0.5, new_tokens=24)
    held: list[Job] = []
    in_use: set[int] = set()
    score = coder.model.score

    def watched(tokens: Tensor, **more: Any) -> Any:
        in_use.add(coder.model.cache.in_use)
        return score(tokens, **more)

    coder.model.score = watched  # type: ignore[method-assign]

    async def work() -> None:
        busy = engine(coder, max_batch=2)
        held.extend(busy.submit(coder.request(prompt, params)) for prompt in PROMPTS)
        busy.end(held[-1])
        await asyncio.gather(*(job.results() for job in held[:-1]))
        late = busy.submit(coder.request(PROMPTS[0], params.replace(entropy_bound=None)))
        await until(lambda: late.sequences[0].forward_passes >= 2)
        busy.end(late)
        await until(lambda: coder.model.cache.in_use == 0)

    run(work())
    assert max(in_use) < len(PROMPTS)  # not that of the one that left


def test_a_thousand_requests_leave_no_cache_row_in_use(engine: Callable[..., Engine]) -> None:
    """Finished, cancelled while they run, cancelled while they wait, broken."""
    coder = DiffuCoder.load(dtype=torch.float32)
    params = DecodingParams(cache="delayed", entropy_bound=2.0, new_tokens=8)
    score = coder.model.score
    calls = 0

    def fragile(tokens: Tensor, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 97 == 0:
            raise ValueError("a pass that breaks")
        return score(tokens, **more)

    coder.model.score = fragile  # type: ignore[method-assign]

    async def work() -> None:
        busy = engine(coder, max_batch=16, max_waiting=64)
        request = coder.request("def f(x):\n", params, chat=False)
        for round_ in range(20):
            jobs = [busy.submit(request) for _ in range(50)]
            for job in jobs[round_ % 5 :: 5]:
                busy.end(job)
            await asyncio.gather(*map(outcome, jobs))
        await until(lambda: coder.model.cache.in_use == 0)
        assert sum(busy.stats()[name] for name in ("finished", "cancelled", "failed")) == 1000

    run(work())


def test_a_model_is_loaded_by_a_thread_that_ends() -> None:
    before = threading.active_count()
    assert load_in_own_thread(threading.get_ident) != threading.get_ident()
    assert threading.active_count() == before
    with pytest.raises(ZeroDivisionError):
        load_in_own_thread(lambda: 1 / 0)


def test_steps_that_nobody_watches_make_no_events(engine: Callable[..., Engine]) -> None:
    async def work() -> None:
        job = engine(Slow()).submit(request(3, rows=2), watched=False)
        assert [event async for event in job.events()] == []
        assert job.results_now() == [[1, 3, 3, 3], [1, 3, 3, 3]]

    run(work())


def test_events_are_the_steps_of_each_row(engine: Callable[..., Engine]) -> None:
    async def work() -> None:
        job = engine(Slow()).submit(request(3, rows=2))
        seen = [event async for event in job.events()]
        assert sorted((event.row, event.step.index) for event in seen) == [(r, i) for r in (0, 1) for i in range(3)]
        last = {event.row: event.step.canvas.tolist() for event in seen}
        assert last == {0: [[1, 3, 3, 3]], 1: [[1, 3, 3, 3]]}

    run(work())


# --- company ---------------------------------------------------------------------------------------------------------


def test_requests_join_and_leave_between_steps(engine: Callable[..., Engine]) -> None:
    model, passes = gated()

    async def work() -> None:
        busy = engine(model, max_batch=8)
        long = busy.submit(request(12, first=1))
        passes.release(2)
        await until(lambda: len(model.fed) == 2)
        short = busy.submit(request(3, first=2))
        passes.release(5)  # two of them may have begun without the short request
        assert await outcome(short) == [[2, 3, 3, 3]]
        assert long.sequences[0].finish_reason is None
        passes.release(100)
        assert await outcome(long) == [[1, *[3] * 12]]
        assert len(model.fed) == 12  # the short one cost no pass of its own
        assert sum(model.fed) == 15
        assert busy.stats()["finished"] == 2

    run(work())


def test_a_long_request_gives_way_to_those_who_wait(engine: Callable[..., Engine]) -> None:
    model, passes = gated()

    async def work() -> None:
        one = engine(model, max_batch=1)
        long = one.submit(request(200))
        shorts = [one.submit(request(4, first=2)) for _ in range(3)]
        passes.release(40)
        await asyncio.gather(*(each.results() for each in shorts))
        assert long.sequences[0].finish_reason is None
        one.end(long)
        passes.release(200)

    run(work())


def test_a_request_of_many_rows_leaves_slots_to_others(engine: Callable[..., Engine]) -> None:
    model, passes = gated()

    async def work() -> None:
        two = engine(model, max_batch=2)
        many = two.submit(request(8, rows=20))
        small = two.submit(request(8, first=2))
        passes.release(24)
        await small.results()
        assert many.unfinished > 10
        passes.release(200)
        assert len(await many.results()) == 20

    run(work())


def test_a_full_queue_refuses_and_says_when_to_come_again(engine: Callable[..., Engine]) -> None:
    model, passes = gated()

    async def work() -> None:
        small = engine(model, max_batch=1, max_waiting=2)
        jobs = [small.submit(request(40))]
        await until(lambda: small.stats()["running"] == 1)
        jobs += [small.submit(request(40)) for _ in range(2)]
        with pytest.raises(BusyError, match="2 requests wait already; try again in") as refused:
            small.submit(request(40))
        assert refused.value.retry_after >= 1
        stats = small.stats()
        assert (stats["waiting"], stats["running"], stats["refused"]) == (2, 1, 1)
        for job in jobs:
            small.end(job)
        assert small.stats()["running"] == 0
        passes.release(100)
        assert await small.submit(request(2)).results() == [[1, 3, 3]]

    run(work())


def test_a_rush_on_an_idle_engine_is_bounded_too(engine: Callable[..., Engine]) -> None:
    model, passes = gated()

    async def work() -> None:
        small = engine(model, max_batch=1, max_waiting=2)
        jobs = [small.submit(request(200)) for _ in range(3)]  # one for the free slot, two to wait
        with pytest.raises(BusyError):
            small.submit(request(200))
        for job in jobs:
            small.end(job)
        passes.release(1)

    run(work())


def test_seconds_are_those_of_decoding_without_the_time_in_the_queue(engine: Callable[..., Engine]) -> None:
    model, passes = gated()

    async def work() -> None:
        one = engine(model, max_batch=1)
        first, second = one.submit(request(3)), one.submit(request(300))
        await asyncio.sleep(0.2)  # the first pass is held up
        passes.release(1)
        await until(lambda: second.started is not None or not passes.release())
        waited = time.monotonic() - second.accepted
        passes.release(1000)
        await asyncio.gather(first.results(), second.results())
        assert first.seconds > 0.1
        assert 0 < second.seconds <= time.monotonic() - second.accepted - waited + 0.1

    run(work())


# --- going away ------------------------------------------------------------------------------------------------------


def test_who_leaves_is_forgotten_before_the_next_step(engine: Callable[..., Engine]) -> None:
    model = Slow(0.02)

    async def work() -> None:
        busy = engine(model)
        events = busy.submit(request(50_000)).events()
        await anext(events)
        await events.aclose()
        seen = len(model.fed)
        await until(lambda: busy.stats()["cancelled"] == 1)
        assert len(model.fed) <= seen + 1
        assert busy.stats()["running"] == 0

    run(work())


def test_a_cancelled_task_cancels_its_request(engine: Callable[..., Engine]) -> None:
    async def work() -> None:
        busy = engine(Slow(0.02))
        task = asyncio.create_task(busy.submit(request(50_000)).results())
        await until(lambda: busy.stats()["running"] == 1)
        task.cancel()
        await until(lambda: busy.stats()["running"] == 0)
        assert busy.stats()["cancelled"] == 1

    run(work())


def test_the_deadline_ends_a_request_running_or_waiting(engine: Callable[..., Engine]) -> None:
    async def work() -> None:
        busy = engine(Slow(0.02), max_batch=1, deadline=0.2)
        jobs = [busy.submit(request(50_000)) for _ in range(2)]
        for error in await asyncio.gather(*map(outcome, jobs)):
            assert isinstance(error, LateError)
            assert "ask for fewer tokens" in str(error)
        assert busy.stats()["late"] == 2
        assert busy.stats()["running"] == 0

    run(work())


def test_the_deadline_holds_while_a_forward_pass_hangs(engine: Callable[..., Engine]) -> None:
    model, passes = gated()

    async def work() -> None:
        busy = engine(model, deadline=0.2)
        assert isinstance(await outcome(busy.submit(request(3))), LateError)
        assert busy.stats()["late"] == 1
        passes.release(100)
        busy.settings = EngineSettings()
        assert await busy.submit(request(3)).results() == [[1, 3, 3, 3]]

    run(work())


def test_a_loop_that_is_gone_takes_its_requests_along(engine: Callable[..., Engine]) -> None:
    busy = engine(Slow(0.01))

    async def leave() -> None:
        busy.submit(request(50_000))
        await until(lambda: busy.stats()["running"] == 1)

    run(leave())
    began = time.monotonic()
    while busy.stats()["running"]:
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.01)
    assert busy.stats()["cancelled"] == 1


def test_nothing_stays_of_finished_requests(engine: Callable[..., Engine]) -> None:
    def jobs() -> int:
        return sum(type(each) is Job for each in gc.get_objects())

    before = jobs()  # log records of other tests may hold some

    async def work() -> None:
        busy = engine(Slow())
        for _ in range(20):
            await busy.submit(request(4)).results()
        assert not busy._jobs
        assert not busy._running

    run(work())
    began = time.monotonic()
    while jobs() > before:  # the thread may still hold the last one
        assert time.monotonic() - began < PATIENCE
        gc.collect()
    assert sum(thread.name == "diffucoder-engine" for thread in threading.enumerate()) <= 1


# --- what breaks -----------------------------------------------------------------------------------------------------


def test_a_request_that_breaks_takes_nobody_along(engine: Callable[..., Engine]) -> None:
    model = Slow(0.005, lambda tokens: ValueError("poison") if (tokens == POISON).any() else None)

    async def work() -> None:
        busy = engine(model)
        jobs = [busy.submit(request(6, first=first)) for first in (1, POISON, 2)]
        outcomes = await asyncio.gather(*map(outcome, jobs))
        assert outcomes[0] == [[1, *[3] * 6]]
        assert isinstance(outcomes[1], FailedError)
        assert "the server's log has the reason" in str(outcomes[1])
        assert outcomes[2] == [[2, *[3] * 6]]
        assert busy.stats()["failed"] == 1
        assert busy.alive

    run(work())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), MemoryError()])
def test_too_little_memory_makes_batches_smaller(engine: Callable[..., Engine], error: Exception) -> None:
    model = Slow(0.0, lambda tokens: error if len(tokens) > 2 else None)

    async def work() -> None:
        busy = engine(model, max_batch=8)
        jobs = [busy.submit(request(5, first=first)) for first in range(1, 7)]
        outcomes = await asyncio.gather(*map(outcome, jobs))
        assert outcomes == [[[first, *[3] * 5]] for first in range(1, 7)]
        assert busy.batch_limit <= 2

    run(work())


def test_a_row_that_no_memory_holds_fails_alone(engine: Callable[..., Engine]) -> None:
    model = Slow(0.0, lambda tokens: MemoryError() if (tokens == POISON).any() else None)

    async def work() -> None:
        busy = engine(model)
        outcomes = await asyncio.gather(*(outcome(busy.submit(request(3, first=first))) for first in (1, POISON)))
        assert outcomes[0] == [[1, 3, 3, 3]]
        assert isinstance(outcomes[1], FailedError)
        assert "not enough memory" in str(outcomes[1])

    run(work())


def test_rows_that_went_on_when_memory_ran_out_fail_and_the_others_go_on(
    engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out between two rows: the step of the first one is lost, so its answer would have a gap."""
    errors = [MemoryError()]  # only once
    apply = Sequence.apply

    def applied(sequence: Sequence, *given: Any) -> Any:
        if errors and sequence.tokens[0] == 2:
            raise errors.pop()
        return apply(sequence, *given)

    monkeypatch.setattr(Sequence, "apply", applied)
    model, passes = gated()

    async def work() -> None:
        busy = engine(model, max_batch=4)
        jobs = [busy.submit(request(5, first=first)) for first in (1, 2, 3)]
        await until(lambda: busy.stats()["running"] == 3 or not passes.release())
        passes.release(100)
        outcomes = await asyncio.gather(*map(outcome, jobs))
        assert not errors
        assert outcomes[1:] == [[[first, *[3] * 5]] for first in (2, 3)]
        assert busy.alive

    run(work())


def test_an_engine_whose_pass_hangs_accepts_nothing_until_it_ends(
    engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "LONGEST_PASS", 0.1)
    model, passes = gated()

    async def work() -> None:
        busy = engine(model, deadline=0.2)
        assert isinstance(await outcome(busy.submit(request(3))), LateError)
        await until(lambda: not busy.alive)
        with pytest.raises(ClosingError, match="or hangs"):
            busy.submit(request(3))
        passes.release(100)
        await until(lambda: busy.alive)
        busy.settings = EngineSettings()
        assert await busy.submit(request(3)).results() == [[1, 3, 3, 3]]

    run(work())


def test_batches_grow_again_after_a_while_without_running_out_of_memory(
    engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "QUIET_PASSES", 10)
    errors = [MemoryError()]  # only once
    model = Slow(0.0, lambda tokens: errors.pop() if errors and len(tokens) == 8 else None)

    async def work() -> None:
        busy = engine(model, max_batch=8)
        jobs = [busy.submit(request(30, rows=8)), busy.submit(request(30, rows=8))]
        assert await asyncio.gather(*map(outcome, jobs)) == [[[1, *[3] * 30]] * 8] * 2
        assert not errors
        assert 4 in model.fed
        assert busy.batch_limit == 8

    run(work())


def test_a_request_that_cannot_begin_fails_alone(engine: Callable[..., Engine]) -> None:
    class Broken(Tokens):
        def sequences(self, *, entropies: int = 0) -> list[Sequence]:
            raise ValueError("it cannot begin")

    async def work() -> None:
        busy = engine(Slow())
        with pytest.raises(ValueError, match="it cannot begin"):
            busy.submit(request(3, kind=Broken))
        assert await busy.submit(request(3)).results() == [[1, 3, 3, 3]]

    run(work())


def test_an_error_while_steps_are_delivered_fails_only_the_requests_of_the_pass(engine: Callable[..., Engine]) -> None:
    class Unsettled(Tokens):
        def settled_ids(self, sequence: Sequence) -> list[int]:
            raise ValueError("it cannot be told")

    async def work() -> None:
        busy = engine(Slow())
        assert isinstance(await outcome(busy.submit(request(3, kind=Unsettled))), FailedError)
        assert busy.alive
        assert await busy.submit(request(3)).results() == [[1, 3, 3, 3]]

    run(work())


def test_if_the_thread_ends_every_client_is_told(engine: Callable[..., Engine]) -> None:
    model, passes = gated()
    model.break_on = lambda tokens: SystemExit() if (tokens == POISON).any() else None

    async def work() -> None:
        busy = engine(model, max_batch=1)
        jobs = [busy.submit(request(3, first=first)) for first in (POISON, 1, 2)]
        passes.release(100)
        for error in await asyncio.gather(*map(outcome, jobs)):
            assert isinstance(error, FailedError)
            assert "the engine stopped" in str(error)
        assert not busy.alive
        with pytest.raises(ClosingError, match="its engine has stopped"):
            busy.submit(request(3))

    run(work())


# --- the end ---------------------------------------------------------------------------------------------------------


def test_closing_finishes_what_was_accepted(engine: Callable[..., Engine]) -> None:
    async def work() -> None:
        busy = engine(Slow(0.005), max_batch=2)
        jobs = [busy.submit(request(10)) for _ in range(5)]
        closing = asyncio.create_task(asyncio.to_thread(busy.close))
        await until(lambda: not busy.alive)
        with pytest.raises(ClosingError, match="shutting down"):
            busy.submit(request(1))
        assert await asyncio.gather(*map(outcome, jobs)) == [[[1, *[3] * 10]]] * 5
        await closing

    run(work())


def test_closing_at_once_says_so_to_those_who_wait(engine: Callable[..., Engine]) -> None:
    async def work() -> None:
        busy = engine(Slow(0.02))
        job = busy.submit(request(50_000))
        await until(lambda: busy.stats()["running"] == 1)
        busy.close(drain=False)
        assert isinstance(await outcome(job), ClosingError)

    run(work())
