"""Requests that ask for too much or mean harm: none stops the server, starves another or is answered with 5xx."""

import asyncio
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from routes import ROUTES

from diffucoder import DecodingParams, DiffuCoder
from diffucoder.decoding.diffs import unified_diff
from diffucoder.decoding.requests import SettledText, StopSearch, before_stops
from diffucoder.serving import jobs as jobs_module
from diffucoder.serving import protocol
from diffucoder.serving.app import create_app
from diffucoder.serving.cost import Budget, free_memory
from diffucoder.serving.engine import BusyError, Engine, Job
from diffucoder.serving.jobs import FILL, LEAD, SHORT, ShortLane
from diffucoder.serving.responses import CompletionAnswer
from diffucoder.serving.settings import EngineSettings, ServerSettings

Json = Any
PATIENCE = 300  # seconds for anything that only a fault or a very busy machine can hold up
PROMPT = "def f(x):\n"
CONTEXT = 512  # of the shipped model


@pytest.fixture(scope="module")
def coder() -> DiffuCoder:
    return DiffuCoder.load(dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def client(coder: DiffuCoder) -> Iterator[TestClient]:
    limits = EngineSettings(deadline=20)  # what a hostile request may take of these tests
    with TestClient(create_app(coder, ServerSettings(engine=limits)), raise_server_exceptions=False) as made:
        yield made


def cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


# --- what a request may cost -----------------------------------------------------------------------------------------

TOO_MUCH: dict[str, tuple[str, dict[str, Json]]] = {
    "steps": ("/v1/completions", {"decoding": {"preset": "reference", "steps": 10**9}}),
    "steps-within": ("/v1/completions", {"decoding": {"preset": "reference", "steps": 10**6}}),
    "n": ("/v1/completions", {"n": 10**9}),
    "best_of": ("/v1/completions", {"best_of": 10**9, "n": 1}),
    "max_tokens": ("/v1/completions", {"max_tokens": 10**5}),
    "tokens-64-bits": ("/v1/chat/completions", {"max_completion_tokens": 10**30, "max_tokens": None}),
    "rows": ("/v1/completions", {"prompt": [PROMPT] * 64, "n": 2}),
    "prompts": ("/v1/completions", {"prompt": [PROMPT] * 65}),
    "lengths": ("/v1/fill", {"text": "x = <|hole|>\n", "n": 64}),
    "holes": ("/v1/fill", {"text": "x" + "<|hole:1|>" * 90_000}),
    "open-holes": ("/v1/fill", {"text": "x" + "<|hole|>" * 90_000}),
    "hole": ("/v1/fill", {"text": "x<|hole:999999|>"}),
    "spans": ("/v1/edit", {"spans": [{"start": 0, "end": 0}] * 65}),
    "span": ("/v1/edit", {"spans": [{"start": 10**30, "end": 10**30}]}),
    "span-tokens": ("/v1/edit", {"spans": [{"start": 4, "end": 5, "tokens": 4096}]}),
    "n_predict": ("/completion", {"n_predict": 10**9}),
    "n_cmpl": ("/completion", {"n_cmpl": 65}),
    "stops": ("/v1/completions", {"stop": ["x"] * 17}),
    "stop": ("/v1/completions", {"stop": "x" * 1001}),
    "messages": ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}] * 20_000}),
    "extra": ("/infill", {"input_extra": [{"text": ""}] * 50_000}),
    "settings": ("/v1/completions", {"decoding": {f"x{number}": 1 for number in range(50_000)}}),
    "fields": ("/tokenize", {f"x{number}": 1 for number in range(50_000)}),
    "logit_bias": ("/v1/completions", {"logit_bias": {str(number): 1 for number in range(50_000)}}),
    "ids": ("/v1/completions", {"prompt": [1.5] * 200_000}),
    "ids-late": ("/v1/completions", {"prompt": [7] * 200_000 + ["x"]}),
    "ids-llama": ("/completion", {"prompt": [1.5] * 200_000}),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_what_asks_for_too_much_is_rejected_at_once(client: TestClient, name: str) -> None:
    path, more = TOO_MUCH[name]
    body = json.dumps({**ROUTES[path][1], **more})
    answers = []
    passes = client.app.state.server.engine.stats()["passes"]  # type: ignore[attr-defined]  # Starlette's
    seconds = cpu_seconds(lambda: answers.append(client.post(path, content=body)))
    assert answers[0].status_code == 400, answers[0].text[:300]
    assert len(answers[0].content) < 1000
    assert seconds < 5
    assert client.app.state.server.engine.stats()["passes"] == passes  # type: ignore[attr-defined]


def test_an_error_names_the_estimate_the_limit_and_the_way_out(coder: DiffuCoder) -> None:
    def rejected(params: DecodingParams, **limits: Any) -> str:
        budget = Budget(coder.model, EngineSettings(**limits))
        with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
            budget.check(budget.cost_of(coder.request(PROMPT, params, chat=False)), params)
        return str(error.value)

    reference = DecodingParams(preset="reference", steps=1000)
    assert (
        rejected(reference) == "it takes 1,000 passes, and the limit is the model's context, 512; ask for fewer steps"
    )
    assert rejected(DecodingParams(new_tokens=10, num_samples=2), max_computed=100) == (
        "2 rows of 14 positions in 10 passes compute up to 280 positions, and the limit is 100 (max_computed); "
        "ask for fewer answers, tokens or steps"
    )
    assert "take up to" in rejected(DecodingParams(), max_memory=1)
    assert "(max_memory); ask for fewer answers or tokens" in rejected(DecodingParams(), max_memory=1)


def test_everything_that_takes_memory_is_in_the_estimate(coder: DiffuCoder) -> None:
    budget = Budget(coder.model, EngineSettings())
    plain = budget.cost(1, 400, 300, DecodingParams())
    assert budget.cost(16, 400, 300, DecodingParams()).kept == 16 * plain.kept
    cached = budget.cost(1, 400, 300, DecodingParams(cache="delayed"))
    layers, key_heads, head_dim, number = 5, 2, 64, 4
    assert cached.kept - plain.kept == 2 * 400 * 2 * layers * key_heads * head_dim * number
    squared = budget.cost(1, 400, 300, DecodingParams(preset="reference")).passing - plain.passing
    assert squared == 8 * 400**2
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50
    assert budget.cost(1, 400, 300, DecodingParams(revoke=0.5)).kept < plain.kept + 300 * 500
    assert budget.cost(1, 400, 300, DecodingParams(revoke=1 - 1e-9)).kept > plain.kept + 300 * 300 * 99


def test_the_longest_request_that_other_limits_allow_is_within_the_default_budget(coder: DiffuCoder) -> None:
    limits = EngineSettings()
    budget = Budget(coder.model, limits)
    for params in (DecodingParams(), DecodingParams(preset="fast"), DecodingParams(preset="reference", steps=CONTEXT)):
        cost = budget.cost(limits.max_rows, CONTEXT, CONTEXT - 1, params)
        assert cost.computed <= budget.computed
        assert cost.memory < 2**30  # of 4 GiB that a small container has


def test_requests_that_together_would_fill_memory_wait_outside(coder: DiffuCoder) -> None:
    request = coder.request(PROMPT, DecodingParams(new_tokens=400), chat=False)
    cost = Budget(coder.model, EngineSettings()).cost_of(request)
    engine = Engine(coder, EngineSettings(max_memory=cost.passing + 3 * cost.kept))

    async def work() -> None:
        jobs = [engine.submit(request) for _ in range(3)]
        with pytest.raises(BusyError):
            engine.submit(request)
        engine.end(jobs[0])
        jobs.append(engine.submit(request))
        for job in jobs:
            engine.end(job)

    asyncio.run(work())
    engine.close()


# --- fair turns ------------------------------------------------------------------------------------------------------

BESIDE = {
    "64-answers": [(1, 64, 470)],
    "one-long": [(1, 1, 490)],
    "many-requests": [(60, 1, 200)],
    "many-of-many": [(5, 16, 300)],
    "long-prompt": [(1, 16, 4)],
}


@pytest.mark.parametrize("preset", ["exact", "fast"])
@pytest.mark.parametrize("beside", BESIDE)
def test_a_short_request_is_done_after_few_positions_in_small_passes_whatever_is_beside_it(
    coder: DiffuCoder, monkeypatch: pytest.MonkeyPatch, beside: str, preset: Any
) -> None:
    """What is computed until it is done counts: that is the time it takes, on any machine."""
    computed: list[int] = []
    score = coder.model.score

    def watched(tokens: torch.Tensor, *, feed: torch.Tensor, **more: Any) -> Any:
        computed.append(int(feed.sum()))
        return score(tokens, feed=feed, **more)

    monkeypatch.setattr(coder.model, "score", watched)
    prompt = "x = 1\n" * 90 if beside == "long-prompt" else PROMPT
    engine = Engine(coder, EngineSettings())

    async def work() -> None:
        others: list[Job] = []
        for count, rows, tokens in BESIDE[beside]:
            params = DecodingParams(new_tokens=tokens, num_samples=rows, temperature=1.5, preset=preset)
            others += [engine.submit(coder.request(prompt, params, chat=False), watched=False) for _ in range(count)]
        while not computed:
            await asyncio.sleep(0.01)
        passes = len(computed)
        short = coder.request(PROMPT, DecodingParams(new_tokens=8), chat=False)
        [answer] = await engine.submit(short, watched=False).results()
        own = 8 * short.canvas.tokens.shape[1]
        turns = len(others) * (LEAD + 500)  # each of the others may go ahead by so much
        assert sum(computed[passes:]) <= 1024 + own + turns + 2 * LEAD
        # of the others, one pass may have been running when it was accepted, and one may have begun after its answer
        own_passes = sorted(computed[passes:])[: answer.forward_passes]
        assert max(own_passes) <= engine.budget.positions // FILL
        assert any(job.rows for job in others)
        for job in others:
            engine.end(job)

    asyncio.run(asyncio.wait_for(work(), PATIENCE))
    engine.close()


def test_a_flood_of_short_requests_leaves_others_half_of_an_equal_share(coder: DiffuCoder) -> None:
    engine = Engine(coder, EngineSettings())

    async def work() -> None:
        short = coder.request("Write a function that sorts the numbers.", DecodingParams(new_tokens=16))
        done = 0

        async def again_and_again() -> None:
            nonlocal done
            while True:
                [answer] = await engine.submit(short, watched=False).results()
                done += answer.forward_passes * short.canvas.tokens.shape[1]

        params = DecodingParams(new_tokens=400, num_samples=8, temperature=1.5)
        long = engine.submit(coder.request(PROMPT, params, chat=False), watched=False)
        flood = [asyncio.create_task(again_and_again()) for _ in range(8)]
        while done < 20 * SHORT:
            await asyncio.sleep(0.01)
        assert long.computed >= (done - 8 * SHORT) / 18  # half of a ninth, which would be an equal share
        for task in flood:
            task.cancel()
        engine.end(long)

    asyncio.run(asyncio.wait_for(work(), PATIENCE))
    engine.close()


def test_short_requests_take_what_the_others_leave() -> None:
    lane = ShortLane()
    assert not lane.admit(SHORT + 1)
    for _ in range(8):
        assert lane.admit(SHORT)
    assert not lane.admit(1)
    row: Any = SimpleNamespace(cost=100, job=SimpleNamespace(short=False))
    short: Any = SimpleNamespace(cost=100, job=SimpleNamespace(short=True))
    lane.passed([row, short])
    assert lane.admit(100)
    assert not lane.admit(1)
    lane.passed([row] * 10**4)
    assert lane.credit == 8 * SHORT


def test_requests_of_equal_size_get_equal_shares(coder: DiffuCoder) -> None:
    engine = Engine(coder, EngineSettings(max_batch=4))

    async def work() -> None:
        sizes = [(64, 100), (1, 100), (8, 100)]
        jobs = []
        for rows, tokens in sizes:
            params = DecodingParams(new_tokens=tokens, num_samples=rows, temperature=1.5)
            jobs.append(engine.submit(coder.request(PROMPT, params, chat=False), watched=False))
        while all(job.rows for job in jobs):
            shares = [job.computed for job in jobs]
            assert max(shares) - min(shares) <= LEAD + 110
            await asyncio.sleep(0.002)
        for job in jobs:
            engine.end(job)

    asyncio.run(asyncio.wait_for(work(), PATIENCE))
    engine.close()


def test_a_newcomer_and_who_pauses_save_nothing_up(coder: DiffuCoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "UNREAD", 16 * 45)
    engine = Engine(coder, EngineSettings())

    async def work() -> None:
        params = DecodingParams(new_tokens=40, num_samples=8)
        request = coder.request(PROMPT, params, chat=False)
        unread = engine.submit(request)  # its client does not read
        first = engine.submit(request, watched=False)
        await first.results()
        assert unread.rows
        assert not unread.is_read
        sent = unread._sent
        assert sent <= 16 + 8  # what was on the way when the limit was reached
        second = engine.submit(request, watched=False)
        assert second.computed >= LEAD
        await second.results()
        assert unread._sent == sent
        assert unread.computed >= second.computed - LEAD - 8 * 45
        events = [event async for event in unread.events()]  # reads now, and is finished
        for row, sequence in enumerate(unread.sequences):
            steps = [event.step.index for event in events if event.row == row]
            assert steps == list(range(sequence.forward_passes))

    asyncio.run(asyncio.wait_for(work(), PATIENCE))
    engine.close()


def test_requests_of_one_pass_each_do_not_keep_others_out(coder: DiffuCoder) -> None:
    engine = Engine(coder, EngineSettings(max_positions=128))

    async def work() -> None:
        one_pass = coder.request("x = 1\n" * 20, DecodingParams(new_tokens=1), chat=False)

        async def again_and_again() -> None:
            while True:
                await engine.submit(one_pass, watched=False).results()

        others = [asyncio.create_task(again_and_again()) for _ in range(4)]
        while engine.stats()["finished"] < 8:
            await asyncio.sleep(0.01)
        short = coder.request(PROMPT, DecodingParams(new_tokens=16), chat=False)
        before = engine.stats()["passes"]
        answered = asyncio.create_task(engine.submit(short, watched=False).results())
        while not answered.done():
            assert engine.stats()["passes"] - before < 120
            await asyncio.sleep(0.01)
        for task in others:
            task.cancel()

    asyncio.run(asyncio.wait_for(work(), PATIENCE))
    engine.close()


def test_a_slow_reader_of_the_first_chunks_gets_the_whole_stream(
    coder: DiffuCoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_module, "UNCLAIMED", 0.1)
    engine = Engine(coder, EngineSettings())
    request = coder.request(PROMPT, DecodingParams(new_tokens=200), chat=False)
    body = protocol.CompletionRequest(prompt=PROMPT, stream=True, stream_options=protocol.StreamOptions(denoise=True))

    async def work() -> None:
        chunks: list[str] = []
        async for chunk in CompletionAnswer(coder, request, body).events(engine.submit(request)):
            if not chunks:
                await asyncio.sleep(0.3)
            chunks.append(chunk)
        whole = (await engine.submit(request).results())[0]
        ends = [json.loads(chunk[6:])["choices"] for chunk in chunks[:-1] if '"finish_reason": null' not in chunk]
        assert [end[0]["trace"]["tokens"] for end in ends if end] == [list(whole.trace.tokens)]
        leaving: Any = CompletionAnswer(coder, request, body).events(engine.submit(request))
        await anext(leaving)
        await leaving.aclose()  # within the first chunks
        assert not engine._jobs

    asyncio.run(asyncio.wait_for(work(), PATIENCE))
    engine.close()


def test_a_request_whose_client_left_before_it_waited_is_dropped(
    coder: DiffuCoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_module, "UNCLAIMED", 0.1)
    engine = Engine(coder, EngineSettings())

    async def work() -> None:
        request = coder.request(PROMPT, DecodingParams(new_tokens=400, num_samples=64), chat=False)
        claimed = engine.submit(coder.request(PROMPT, DecodingParams(new_tokens=8), chat=False))
        waiting = asyncio.create_task(claimed.results())
        for _ in range(3):
            engine.submit(request)
        asyncio.create_task(engine.submit(request).results()).cancel()  # it never begins
        while engine._jobs:
            await asyncio.sleep(0.01)
        assert engine.stats()["cancelled"] == 4
        assert len(await waiting) == 1

    asyncio.run(asyncio.wait_for(work(), PATIENCE))
    engine.close()


def test_memory_of_a_request_that_nobody_reads_is_bounded(coder: DiffuCoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "UNREAD", 2**13)
    engine = Engine(coder, EngineSettings())

    async def work() -> None:
        request = coder.request(PROMPT, DecodingParams(new_tokens=100, num_samples=64), chat=False)
        job = engine.submit(request)
        while job.is_read and job.rows:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        size = sum(event.step.canvas.numel() for event in list(job._events._queue))  # type: ignore[attr-defined]
        assert 2**13 - 104 <= size <= 2**13 + 16 * 104
        assert len(job.rows) == 64
        engine.end(job)

    asyncio.run(asyncio.wait_for(work(), PATIENCE))
    engine.close()


# --- text that grows -------------------------------------------------------------------------------------------------


class Counting:
    """A tokenizer that counts the ids that it decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special_ids = tokenizer.special_ids
        self.decoded = 0

    def decode(self, ids: list[int]) -> str:
        self.decoded += len(ids)
        return str(self.tokenizer.decode(ids))


TEXTS = [
    "def f(x):\n    return 'é日本🙂' + x\n\n\nclass A:\n    pass\n",
    "aaab" * 30 + "aaaab",
    "🙂" * 20 + "é" * 20 + "\ufffd" * 5 + "x",
    "  <|im_start|> x  \n" * 10,
]


@pytest.mark.parametrize("stops", [(), ("\n\n",), ("aaaab", "\nclass"), ("🙂é",), ("zz", "x", "本")])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("width", [1, 2, 3, 7])
def test_text_that_comes_in_pieces_is_that_of_the_whole(
    coder: DiffuCoder, text: str, stops: tuple[str, ...], width: int
) -> None:
    ids = coder.tokenizer.encode(text) + coder.tokenizer.encode("<|im_start|>é", special=True)
    whole = before_stops(coder.tokenizer.decode(ids), stops)
    settled = SettledText(coder.tokenizer, stops)
    has_stop = StopSearch(coder.tokenizer, stops) if stops else None
    sent = ""
    for start in range(0, len(ids), width):
        sent += settled.add(ids[start : start + width])
        assert whole.startswith(sent)
        assert settled.length == len(sent)
        if has_stop is not None:
            known = coder.tokenizer.decode(ids[: start + width])
            found = has_stop(torch.tensor(ids[: start + width]))
            assert found == (before_stops(known, stops) != known)
            has_stop = None if found else has_stop
    if not stops:
        assert sent == whole


def test_text_that_grows_is_decoded_in_linear_time(coder: DiffuCoder) -> None:
    ids = coder.tokenizer.encode("x = [1, 2]\n" * 2000)
    for stops in ((), ("\n\n\n", "class")):
        tokenizer: Any = Counting(coder.tokenizer)
        settled = SettledText(tokenizer, stops)
        for id_ in ids:
            settled.add([id_])
        assert tokenizer.decoded < 20 * len(ids)
    tokenizer = Counting(coder.tokenizer)
    has_stop = StopSearch(tokenizer, ("\n\n\n", "class"))
    for end in range(1, len(ids), 7):
        assert not has_stop(torch.tensor(ids[:end]))
    assert tokenizer.decoded < 20 * len(ids)


def test_another_beginning_is_searched_again(coder: DiffuCoder) -> None:
    has_stop = StopSearch(coder.tokenizer, ("x",))
    assert not has_stop(torch.tensor(coder.tokenizer.encode("a b c d")))
    assert has_stop(torch.tensor(coder.tokenizer.encode("x b c d e")))
    assert not has_stop(torch.tensor(coder.tokenizer.encode("a b")))


@pytest.mark.parametrize("stop", ["a" * 1000, "ab" * 500, "a" * 999 + "b"])
def test_a_stop_string_that_nearly_fits_costs_little(coder: DiffuCoder, stop: str) -> None:
    settled = SettledText(coder.tokenizer, tuple(stop[number:] for number in range(16)))
    ids = coder.tokenizer.encode(stop[:-1] * 3)
    assert cpu_seconds(lambda: [settled.add([id_]) for id_ in ids]) < 30


# --- diffs -----------------------------------------------------------------------------------------------------------

HOSTILE = {
    "alike": ("a\n" * 40_000, "a\n" * 39_999),
    "numbers": ("".join(f"{n}\n" for n in range(30_000)), "".join(f"{n}\n" for n in range(0, 60_000, 2))),
    "turned": ("".join(f"{n % 300}\n" for n in range(30_000)), "".join(f"{-n % 300}\n" for n in range(30_000))),
    "two": ("a\nb\n" * 15_000, "b\nc\na\n" * 10_000),
    "ends": ("x\n" + "a\n" * 30_000 + "y", "z\n" + "a\n" * 30_000 + "y\n"),
    "new": ("", "a\n" * 30_000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_the_diff_of_any_texts_is_made_in_linear_time_and_applies(tmp_path: Path, name: str) -> None:
    before, after = HOSTILE[name]
    diffs = []
    assert cpu_seconds(lambda: diffs.append(unified_diff(before, after))) < 10
    (tmp_path / "after").write_bytes(before.encode())
    command = ["git", "apply", "-p0", "--whitespace=nowarn", "-"]
    done = subprocess.run(command, input=diffs[0].encode(), cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "after").read_bytes() == after.encode()


def test_a_diff_of_two_changes_shows_them_with_three_lines_around(coder: DiffuCoder) -> None:
    before = [f"{n}\n" for n in range(100)]
    after = list(before)
    after[20] = "x\n"
    del after[70]
    assert unified_diff("".join(before), "".join(after)).splitlines() == [
        *("--- before", "+++ after"),
        *("@@ -18,7 +18,7 @@", " 17", " 18", " 19", "-20", "+x", " 21", " 22", " 23"),
        *("@@ -68,7 +68,6 @@", " 67", " 68", " 69", "-70", " 71", " 72", " 73"),
    ]


# --- a client's mistakes ---------------------------------------------------------------------------------------------

NUMBERS = ["1e400", "-1e400", "NaN", "Infinity", "-Infinity", "-0", "-0.0", "1e-400", "1e308", "5e-324", "true"]
NUMBERS += ["1" * 400, "9223372036854775808", "18446744073709551616", "-9223372036854775809", "0.5", "1" * 5000]
OTHERS = ['"\\ud800"', '"\\u0000"', "[" * 5000 + "]" * 5000, '{"a":' * 900 + "1" + "}" * 900, "[[]]", "{}", '""']
OTHERS += ['["\\udfff"]', '{"\\ud800": 1}', '[{"\\ud800": {}}]', '"' + "x" * 100_000 + '"']


def bodies(path: str) -> Iterator[str]:
    """Each field, and each setting of decoding, with each value that breaks something somewhere."""
    kind, body = ROUTES[path]
    names = [*kind.model_fields, "x" * 1000, "\\ud800", "\\u0000", "logit_bias", "tools", "top_logprobs", "n", "seed"]
    for value in NUMBERS + OTHERS:
        for name in names:
            rest = {key: own for key, own in body.items() if key != name}
            yield json.dumps(rest)[:-1] + (", " if rest else "") + f'"{name}": {value}}}'
        if "decoding" in kind.model_fields:
            rest = json.dumps(body)[:-1]
            for name in DecodingParams.model_fields:
                yield f'{rest}, "decoding": {{"{name}": {value}}}}}'
    yield from NUMBERS + OTHERS


@pytest.mark.parametrize("path", ROUTES)
def test_no_value_of_any_field_is_answered_with_5xx(client: TestClient, path: str) -> None:
    for body in bodies(path):
        answer = client.post(path, content=body)
        assert answer.status_code in (200, 400, 404, 408), (body[:300], answer.text[:300])
        assert len(answer.content) < 200_000, body[:300]


def test_impossible_numbers_are_no_settings(client: TestClient) -> None:
    body = json.dumps(ROUTES["/v1/completions"][1])[:-1]
    for name in ("entropy_bound", "factor", "temperature", "policy_temperature", "threshold", "top_p", "revoke", "eps"):
        for value in ("Infinity", "NaN", "1e999"):
            answer = client.post("/v1/completions", content=f'{body}, "decoding": {{"{name}": {value}}}}}')
            assert answer.status_code == 400, (name, value)


json_values = st.recursive(
    st.one_of(
        *(st.none(), st.booleans(), st.integers(-(10**40), 10**40), st.floats(), st.text(max_size=8)),
        st.sampled_from(["\ud800", "<|hole|>", "<|mask|>", 2**63, 2**31, -1, 0, 1, 1e308]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("path", ROUTES)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_request_is_answered_with_5xx(client: TestClient, path: str, data: st.DataObject) -> None:
    kind, body = ROUTES[path]
    names = st.sampled_from([*kind.model_fields, *sorted(protocol.OFF)])
    body = {**body, **data.draw(st.dictionaries(names, json_values, max_size=3))}
    if "decoding" in kind.model_fields and "decoding" not in body:
        settings_ = st.sampled_from(sorted(DecodingParams.model_fields))
        body["decoding"] = data.draw(st.dictionaries(settings_, json_values, max_size=3))
    answer = client.post(path, content=json.dumps(body))
    assert answer.status_code in (200, 400, 404, 408), (body, answer.text[:300])


# --- as llama.cpp's clients send it ----------------------------------------------------------------------------------


def test_prompts_of_ids_and_text_and_objects_are_read(client: TestClient, coder: DiffuCoder) -> None:
    def content(prompt: Json) -> Json:
        answer = client.post("/completion", json={"prompt": prompt, "n_predict": 3})
        assert answer.status_code == 200, answer.text
        answered = answer.json()
        return [each["content"] for each in answered] if isinstance(answered, list) else answered["content"]

    text = "def double(n):\n    return"
    start, end = "def double(n):", "\n    return"
    ids = coder.tokenizer.encode(start)
    assert content([*ids, end]) == content([start, *coder.tokenizer.encode(end)]) == content(text)
    assert content({"prompt_string": text}) == content(text)
    assert content([text, {"prompt_string": text}, [*ids, end]]) == [content(text)] * 3
    assert content([text, text]) == [content(text)] * 2
    answer = client.post("/completion", json={"prompt": {"prompt_string": "x", "multimodal_data": ["x"]}})
    assert answer.status_code == 400
    assert client.post("/completion", json={"prompt": [7, "x", 10**9]}).status_code == 400


def test_what_asks_for_nothing_there_is_as_if_left_out(client: TestClient) -> None:
    body = {"prompt": PROMPT, "n_predict": 3}
    plain = client.post("/completion", json=body).json()["content"]
    for more in ({"n": 1}, {"stop": ""}, {"stop": [""]}, {"stop": ["", "zz"]}, {"n_cmpl": 1}):
        answer = client.post("/completion", json={**body, **more})
        assert (answer.status_code, answer.json().get("content")) == (200, plain), more
    assert len(client.post("/completion", json={**body, "n": 2}).json()) == 2
    whole = client.post("/infill", json={"input_prefix": "x = 1", "input_suffix": "", "n_predict": 2})
    null = client.post("/infill", json={"input_prefix": "x = 1", "input_suffix": None, "n_predict": 2})
    assert null.json()["content"] == whole.json()["content"]
    assert client.post("/infill", json={"input_prefix": None, "input_suffix": "x", "n_predict": 2}).status_code == 200
    assert client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 2, "stop": ""}).status_code == 200
