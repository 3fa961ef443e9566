"""The engine: results independent of company, and nobody waits for, pays for or falls with a stranger."""

import asyncio
import gc
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffucoder import Canvas, DecodingParams, DiffuCoder
from diffucoder.decoding import tuning
from diffucoder.decoding.denoise import DecodeState, advance
from diffucoder.decoding.generate import Generation, Request
from diffucoder.serving.engine import (
    BusyError,
    ClosingError,
    Engine,
    FailedError,
    Job,
    LateError,
    apart,
)
from diffucoder.serving.settings import EngineSettings
from recipes.tiny.problems import problems

MASK, POISON = 9, 7


class Slow:
    """Looks like a Denoiser: proposes 3 everywhere, takes `seconds` a pass, notes how many rows it was fed."""

    def __init__(self, seconds: float = 0.0, break_on: Callable[[Tensor], Exception | None] = lambda _: None) -> None:
        self.seconds, self.break_on = seconds, break_on
        self.device, self.mask_id, self.proposable, self.compiled = torch.device("cpu"), MASK, 12, False
        self.fed: list[int] = []

    def __call__(self, tokens: Tensor, *, rows: Tensor, reduce: Any, **_: Any) -> Any:
        self.fed.append(len(tokens))
        if error := self.break_on(tokens):
            raise error
        time.sleep(self.seconds)
        return reduce(torch.nn.functional.one_hot(torch.full((len(rows),), 3), 12) * 5.0, slice(0, len(rows)))


def request(new_tokens: int, first: int = 1, rows: int = 1) -> Request:
    """Rows of a prompt token and masks; its results are their tokens."""
    canvas = Canvas.from_prompts(torch.full((rows, 1), first), new_tokens=new_tokens, mask_id=MASK)
    # distinct rows of a batch, or they would be fed once
    canvas.tokens[:, 0] = first
    finish: Any = lambda traces, seconds: [trace.tokens for trace in traces]  # noqa: E731
    return Request(canvas, DecodingParams(), None, finish)


@pytest.fixture
def engine() -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def make(model: Any, **settings: Any) -> Engine:
        coder: Any = SimpleNamespace(model=model, name="stand-in")
        made.append(Engine(coder, EngineSettings(**settings)))
        return made[-1]

    yield make
    for each in made:
        each.close(drain=False, seconds=10)
        assert not each._thread.is_alive()


async def outcome(job: Job) -> Any:
    try:
        return await job.results()
    except (LateError, FailedError, ClosingError) as error:
        return error


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came to that")


def run(work: Awaitable[Any]) -> Any:
    async def main() -> Any:
        return await asyncio.wait_for(work, 60)

    return asyncio.run(main())


# --- results ---------------------------------------------------------------------------------------------------------


def test_an_answer_is_the_same_alone_and_among_strangers() -> None:
    coder = DiffuCoder.load(dtype=torch.float32)
    prompts = [problem.prompt for problem in problems("dev", 6, seed=3)]
    asked = [
        coder.request(prompts[0], DecodingParams(temperature=0.8, seed=5, new_tokens=40)),
        coder.request(prompts[1], DecodingParams(entropy_bound=0.05, num_samples=2, temperature=0.4)),
        coder.request(prompts[2], DecodingParams(block=16, cache="dual", threshold=0.9, new_tokens=48)),
        coder.request(prompts[3], DecodingParams(steps=8, policy="margin")),
        coder.fill_request("def f(xs):\n    return <|hole|>\n", DecodingParams(threshold=0.9)),
        coder.request(prompts[4], DecodingParams(stop=("return",), new_tokens=32)),
    ]

    async def all_at_once() -> list[list[Generation]]:
        with Engine(coder, EngineSettings(max_batch=5, turn=3)) as engine:
            jobs = [engine.submit(each) for each in asked]
            return list(await asyncio.gather(*(job.results() for job in jobs)))

    together = run(all_at_once())
    for each, found in zip(asked, together, strict=True):
        alone = coder._run(each)
        assert [result.text for result in found] == [result.text for result in alone]
        assert [result.tokens for result in found] == [result.tokens for result in alone]
        assert [result.trace.steps for result in found] == [result.trace.steps for result in alone]
        for one, other in zip(found, alone, strict=True):
            assert one.trace.log_probs == pytest.approx(other.trace.log_probs, abs=1e-3)


def test_requests_that_begin_alike_share_keys_and_values_where_that_is_asked_for() -> None:
    coder = DiffuCoder.load(dtype=torch.float32)
    delayed = DecodingParams(cache="delayed", entropy_bound=0.05, new_tokens=24)
    prefix = "def double(n):\n    return n * 2\n\n\ndef halve(n):\n    return n // 2\n\n\n"
    asked = [coder.request(prefix + end, delayed, chat=False) for end in ("def triple(n):\n", "def square(n):\n")]
    fed = list[int]()
    forward = coder.model.forward

    def watched(tokens: Tensor, **more: Any) -> Any:
        fed.append(tokens.shape[1])
        return forward(tokens, **more)

    coder.model.forward = watched  # type: ignore[method-assign]

    async def one_by_one(reuse: int) -> list[list[int]]:
        found = []
        with Engine(coder, EngineSettings(reuse=reuse)) as engine:
            for each in (asked[0], asked[1], asked[1]):
                fed.clear()
                await engine.submit(each).results()
                found.append(list(fed))
        return found

    alone, shared = run(one_by_one(0)), run(one_by_one(2))
    whole = [len(each.canvas.tokens[0]) for each in asked]
    begin = int((asked[0].canvas.tokens[0][:50] != asked[1].canvas.tokens[0][:50]).nonzero()[0])  # where they part
    assert [first for first, *_ in alone] == [whole[0], whole[1], whole[1]]
    # what follows the common beginning; then, of the same prompt again, the masks and the position before them
    assert [first for first, *_ in shared] == [whole[0], whole[1] - begin, 24 + 1]


def test_a_batch_of_mixed_ages_is_one_call_that_feeds_what_each_row_needs() -> None:
    """Requests with a delayed cache: who is new feeds a whole canvas, who is not its masks, and nobody the padding."""
    coder = DiffuCoder.load(dtype=torch.float32)
    params = DecodingParams(cache="delayed", new_tokens=24)
    prompts = [problem.prompt for problem in problems("dev", 3, seed=3)]
    calls = list[list[int]]()
    forward = coder.model.forward

    def watched(tokens: Tensor, *, valid: Tensor, **more: Any) -> Any:
        calls.append(valid.sum(-1).tolist())
        return forward(tokens, valid=valid, **more)

    coder.model.forward = watched  # type: ignore[method-assign]
    states = [DecodeState(coder.request(prompt, params).canvas, params) for prompt in prompts]
    advance(coder.model, states[:2])
    masks = [int(state.unkept(state.tokens).sum()) for state in states[:2]]
    advance(coder.model, [states[2], states[1], states[0]])
    caches = {state.slot.place.cache for state in states if state.slot is not None}
    lengths = [len(state.tokens) for state in states]
    assert calls == [lengths[:2], [lengths[2], masks[1], masks[0]]]
    assert max(masks) <= 25 < min(lengths)
    assert len(caches) == 1
    del states[1]
    states.append(DecodeState(coder.request(prompts[1], params).canvas, params))
    advance(coder.model, states)
    assert len(caches.pop()) == 4  # two rows, then four: who left makes room for who comes


def test_who_is_finished_makes_room_even_while_somebody_holds_the_request() -> None:
    coder = DiffuCoder.load(dtype=torch.float32)
    params = DecodingParams(cache="delayed", entropy_bound=0.5, new_tokens=24)
    prompts = [problem.prompt for problem in problems("dev", 12, seed=3)]
    sizes, held = set[int](), list[Job]()
    forward = coder.model.forward

    def watched(tokens: Tensor, *, cache: Any, **more: Any) -> Any:
        sizes.add(len(cache))
        return forward(tokens, cache=cache, **more)

    coder.model.forward = watched  # type: ignore[method-assign]

    async def work() -> None:
        with Engine(coder, EngineSettings(max_batch=2)) as engine:
            held.extend(engine.submit(coder.request(prompt, params)) for prompt in prompts)
            held[-1].cancel()
            await asyncio.gather(*(job.results() for job in held[:-1]))

    run(work())
    assert max(sizes) <= 2


def test_what_is_loaded_apart_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    assert apart(threading.get_ident) != threading.get_ident()
    assert threading.active_count() == before
    with pytest.raises(ZeroDivisionError):
        apart(lambda: 1 / 0)


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


def test_what_fast_stands_for_is_settled_on_the_thread_that_owns_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured, real = list[str](), tuning.measure

    def noted(*given: Any) -> dict[str, float]:
        measured.append(threading.current_thread().name)
        return real(*given)

    monkeypatch.setattr(tuning, "measure", noted)

    async def work() -> None:
        coder = DiffuCoder.load()
        with Engine(coder) as busy:
            prompt = "Given a number, double the number."
            result = (await busy.submit(coder.request(prompt, DecodingParams(preset="fast"))).results())[0]
        assert result.trace.params["preset"] == "exact"
        assert result.trace.params["entropy_bound"] == tuning.ENTROPY_BOUND

    run(work())
    assert measured == ["diffucoder-engine"]


# --- company ---------------------------------------------------------------------------------------------------------


def test_requests_join_and_leave_between_steps(engine: Callable[..., Engine]) -> None:
    model = Slow(0.02)

    async def work() -> None:
        busy = engine(model, max_batch=8)
        long = busy.submit(request(12, first=1))
        await until(lambda: len(model.fed) >= 2)
        short = busy.submit(request(3, first=2))
        assert await outcome(short) == [[2, 3, 3, 3]]
        assert not long.rows[0].state.finish_reason
        assert await outcome(long) == [[1, *[3] * 12]]
        assert len(model.fed) == 12  # the short one cost no pass of its own
        assert sum(model.fed) == 15
        assert busy.figures().finished == 2

    run(work())


def test_a_long_request_gives_way_to_those_who_wait(engine: Callable[..., Engine]) -> None:
    async def work() -> None:
        one = engine(Slow(0.002), max_batch=1, turn=4)
        long = one.submit(request(200))
        shorts = [one.submit(request(4, first=2)) for _ in range(3)]
        await asyncio.gather(*(each.results() for each in shorts))
        assert not long.rows[0].state.finish_reason
        long.cancel()

    run(work())


def test_a_request_of_many_rows_leaves_places_to_others(engine: Callable[..., Engine]) -> None:
    async def work() -> None:
        two = engine(Slow(0.002), max_batch=2, turn=1000)
        many = two.submit(request(8, rows=20))
        small = two.submit(request(8, first=2))
        await small.results()
        assert many.left > 10
        assert len(await many.results()) == 20

    run(work())


def test_a_full_queue_refuses_and_says_when_to_come_again(engine: Callable[..., Engine]) -> None:
    async def work() -> None:
        small = engine(Slow(0.01), max_batch=1, max_waiting=2)
        jobs = [small.submit(request(40)) for _ in range(1)]
        await until(lambda: small.figures().running == 1)
        jobs += [small.submit(request(40)) for _ in range(2)]
        with pytest.raises(BusyError, match="2 requests wait already; try again in") as refused:
            small.submit(request(40))
        assert refused.value.retry_after >= 1
        figures = small.figures()
        assert (figures.waiting, figures.running, figures.refused) == (2, 1, 1)
        for job in jobs:
            job.cancel()
        await until(lambda: small.figures().running == 0)
        assert await small.submit(request(2)).results() == [[1, 3, 3]]

    run(work())


def test_a_rush_on_an_idle_engine_is_bounded_too(engine: Callable[..., Engine]) -> None:
    async def work() -> None:
        small = engine(Slow(0.01), max_batch=1, max_waiting=2)
        jobs = [small.submit(request(200)) for _ in range(3)]  # one for the free place, two to wait
        with pytest.raises(BusyError):
            small.submit(request(200))
        for job in jobs:
            job.cancel()

    run(work())


# --- going away ------------------------------------------------------------------------------------------------------


def test_who_leaves_is_forgotten_before_the_next_step(engine: Callable[..., Engine]) -> None:
    model = Slow(0.02)

    async def work() -> None:
        busy = engine(model)
        events = busy.submit(request(500)).events()
        await anext(events)
        await events.aclose()
        seen = len(model.fed)
        await until(lambda: busy.figures().cancelled == 1)
        assert len(model.fed) <= seen + 1
        assert busy.figures().running == 0

    run(work())


def test_a_cancelled_task_cancels_its_request(engine: Callable[..., Engine]) -> None:
    async def work() -> None:
        busy = engine(Slow(0.02))
        task = asyncio.create_task(busy.submit(request(500)).results())
        await until(lambda: busy.figures().running == 1)
        task.cancel()
        await until(lambda: busy.figures().running == 0)
        assert busy.figures().cancelled == 1

    run(work())


def test_the_deadline_ends_a_request_running_or_waiting(engine: Callable[..., Engine]) -> None:
    async def work() -> None:
        busy = engine(Slow(0.02), max_batch=1, turn=1000)
        running, waiting = busy.submit(request(500), deadline=0.2), busy.submit(request(500), deadline=0.1)
        for found in await asyncio.gather(outcome(running), outcome(waiting)):
            assert isinstance(found, LateError)
            assert "ask for fewer tokens" in str(found)
        assert busy.figures().late == 2
        assert busy.figures().running == 0

    run(work())


def test_a_loop_that_is_gone_takes_its_requests_along(engine: Callable[..., Engine]) -> None:
    busy = engine(Slow(0.01))

    async def leave() -> None:
        busy.submit(request(500))
        await until(lambda: busy.figures().running == 1)

    run(leave())
    for _ in range(500):
        if not busy.figures().running:
            break
        time.sleep(0.01)
    assert busy.figures().cancelled == 1


def test_nothing_stays_of_finished_requests(engine: Callable[..., Engine]) -> None:
    async def work() -> None:
        busy = engine(Slow())
        for _ in range(20):
            await busy.submit(request(4)).results()
        assert not busy._jobs
        assert not busy._places

    run(work())
    gc.collect()
    assert not [each for each in gc.get_objects() if type(each) is Job]
    assert sum(thread.name == "diffucoder-engine" for thread in threading.enumerate()) <= 1


# --- what breaks -----------------------------------------------------------------------------------------------------


def test_a_request_that_breaks_takes_nobody_along(engine: Callable[..., Engine]) -> None:
    model = Slow(0.005, lambda tokens: ValueError("poison") if (tokens == POISON).any() else None)

    async def work() -> None:
        busy = engine(model)
        jobs = [busy.submit(request(6, first=first)) for first in (1, POISON, 2)]
        found = await asyncio.gather(*map(outcome, jobs))
        assert found[0] == [[1, *[3] * 6]]
        assert isinstance(found[1], FailedError)
        assert "the server's log has the reason" in str(found[1])
        assert found[2] == [[2, *[3] * 6]]
        assert busy.figures().failed == 1
        assert busy.alive

    run(work())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), MemoryError()])
def test_too_little_memory_makes_batches_smaller(engine: Callable[..., Engine], error: Exception) -> None:
    model = Slow(0.0, lambda tokens: error if len(tokens) > 2 else None)

    async def work() -> None:
        busy = engine(model, max_batch=8)
        jobs = [busy.submit(request(5, first=first)) for first in range(1, 7)]
        found = await asyncio.gather(*map(outcome, jobs))
        assert found == [[[first, *[3] * 5]] for first in range(1, 7)]
        assert busy.most <= 2

    run(work())


def test_a_row_that_no_memory_holds_fails_alone(engine: Callable[..., Engine]) -> None:
    model = Slow(0.0, lambda tokens: MemoryError() if (tokens == POISON).any() else None)

    async def work() -> None:
        busy = engine(model)
        found = await asyncio.gather(*(outcome(busy.submit(request(3, first=first))) for first in (1, POISON)))
        assert found[0] == [[1, 3, 3, 3]]
        assert isinstance(found[1], FailedError)
        assert "not enough memory" in str(found[1])

    run(work())


def test_a_request_that_cannot_begin_fails_alone(engine: Callable[..., Engine]) -> None:
    async def work() -> None:
        busy = engine(Slow())
        broken = request(3)
        broken = Request(
            broken.canvas, DecodingParams(preset="fast"), None, broken.finish
        )  # which Slow cannot be timed for
        found = await asyncio.gather(outcome(busy.submit(broken)), outcome(busy.submit(request(3))))
        assert isinstance(found[0], FailedError)
        assert found[1] == [[1, 3, 3, 3]]

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
        job = busy.submit(request(500))
        await until(lambda: busy.figures().running == 1)
        busy.close(drain=False)
        assert isinstance(await outcome(job), ClosingError)

    run(work())
