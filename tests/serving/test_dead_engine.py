"""Whatever ends the engine: every client gets an answer, an error or its deadline, and `/ready` says no."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch

from diffucoder import DiffuCoder
from diffucoder.decoding.requests import Request
from diffucoder.decoding.sequence import Sequence
from diffucoder.serving import engine as engine_module
from diffucoder.serving.app import create_app
from diffucoder.serving.engine import Engine, Job
from diffucoder.serving.settings import EngineSettings, ServerSettings

PATIENCE = 120  # seconds for anything that only a fault or a very busy machine can hold up
Patch = Callable[[Any, str, Any], None]


@pytest.fixture(scope="module")
def coder() -> DiffuCoder:
    return DiffuCoder.load(dtype=torch.float32, device="cpu")


def raising(error: BaseException) -> Callable[..., Any]:
    def broken(*_: Any, **__: Any) -> Any:
        raise type(error)(*error.args)  # a new one, since an error holds the frames that it went through

    return broken


def _step(error: BaseException) -> Callable[[Patch], None]:
    """The decoding step itself raises `error`."""
    return lambda patch: patch(engine_module, "advance", raising(error))


def _at(owner: Any, name: str, error: BaseException, step: BaseException | None = None) -> Callable[[Patch], None]:
    """A function of the engine raises `error`, and the decoding step `step`, if that is what leads there."""

    def break_it(patch: Patch) -> None:
        patch(owner, name, raising(error))
        if step is not None:
            patch(engine_module, "advance", raising(step))

    return break_it


BROKEN = RuntimeError("broken by a test")
PLACES = {
    "step": _step(SystemExit()),
    "device": _step(RuntimeError("CUDA error: device-side assert triggered")),
    "pass": _at(Engine, "_run_pass", BROKEN),
    "slots": _at(Engine, "_fill_slots", BROKEN),
    "advance": _at(Engine, "_advance", MemoryError()),
    "deliver": _at(Engine, "_deliver", KeyboardInterrupt()),
    "settled": _at(Request, "settled_ids", SystemExit()),
    "release": _at(Sequence, "release", BROKEN),
    "halve": _at(Engine, "_halve_batch", BROKEN, step=MemoryError()),
    "fail": _at(Engine, "_fail", BROKEN, step=ValueError()),
    "remove": _at(Engine, "_remove", BROKEN),
    "send": _at(Job, "send", BROKEN),
    "log": _at(engine_module.log, "exception", BROKEN, step=SystemExit()),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of `log`
@pytest.mark.parametrize("place", PLACES)
def test_no_client_waits_for_an_engine_that_has_died(
    coder: DiffuCoder, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    app = create_app(coder, ServerSettings(engine=EngineSettings(max_batch=2, deadline=2)))
    engine: Engine = app.state.server.engine
    bodies: list[dict[str, Any]] = [{"prompt": "def f(x):\n", "max_tokens": 6, "n": 1 + number} for number in range(3)]
    bodies += [{**body, "stream": True} for body in bodies]

    async def work() -> None:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=PATIENCE) as client:
            PLACES[place](monkeypatch.setattr)
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
            for body, answer in zip(bodies, answers, strict=True):
                if "stream" not in body:
                    assert answer.status_code in (200, 408, 500, 503), answer.text
                elif answer.status_code == 200:
                    *events, done = [line for line in answer.text.splitlines() if line]
                    assert done == "data: [DONE]"
                    last = json.loads(events[-1].removeprefix("data: "))
                    assert "error" in last or last["choices"][0]["finish_reason"]
            await asyncio.to_thread(engine._thread.join, PATIENCE)
            ready = await client.get("/ready")
            late = await client.post("/v1/completions", json=bodies[0])
            assert (ready.status_code, late.status_code) == (503, 503)
            assert "its engine has stopped" in late.json()["error"]["message"]
            assert late.headers["retry-after"]
            assert (await client.get("/health")).status_code == 200
            assert "diffucoder_failed_total" in (await client.get("/metrics")).text

    asyncio.run(asyncio.wait_for(work(), PATIENCE))
    assert not engine._thread.is_alive()


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: unspecified launch failure"),
        RuntimeError("HIP error: device lost"),
    ],
    ids=str,
)
def test_an_error_that_a_device_does_not_get_over_is_known(error: Exception) -> None:
    assert engine_module.device_is_lost(error, torch.device("cpu"))
    assert not engine_module.ran_out_of_memory(error)


def test_a_device_that_answers_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = RuntimeError("nobody knows this error")
    assert not engine_module.device_is_lost(unknown, torch.device("cpu"))
    monkeypatch.setattr(torch, "zeros", raising(RuntimeError("CUDA error: out of memory")))
    assert not engine_module.device_is_lost(unknown, torch.device("cpu"))
    monkeypatch.setattr(torch, "zeros", raising(RuntimeError("nothing works any more")))
    assert engine_module.device_is_lost(unknown, torch.device("cpu"))


def test_memory_that_ran_out_is_known_by_what_torch_raises() -> None:
    with pytest.raises(RuntimeError) as on_the_cpu:
        torch.empty(2**62, dtype=torch.uint8)
    for error in (on_the_cpu.value, torch.OutOfMemoryError("no room"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")):
        assert engine_module.ran_out_of_memory(error)
    assert not engine_module.ran_out_of_memory(ValueError("out of memory"))
