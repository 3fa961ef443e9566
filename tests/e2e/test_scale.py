"""Two replicas behind one address, and the life and death of them: real processes, a real kill."""

import importlib.util
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import NamedTuple

import httpx
import openai
import psutil
import pytest
from commands import Run, assert_refused, process
from serving import serving

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is missing; install it: pip install 'diffucoder[scale]'"
)
# a hole: it has no early end
ASKED = {"prompt": "def f(x):\n    ", "suffix": "\n    return x\n", "temperature": 0.9, "decoding": {"block": 8}}


class Service(NamedTuple):
    url: str
    root: psutil.Process

    def replicas(self) -> list[psutil.Process]:
        """The processes of the replicas."""
        return [each for each in self.root.children(recursive=True) if "ServeReplica" in each.cmdline()[0]]

    def figures(self, name: str) -> dict[str, float]:
        """What each replica counts under `name`."""
        told = [line.split() for line in httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()]
        heading = f'diffucoder_{name}{{replica="'
        return {first[len(heading) : -2]: float(value) for first, value, *_ in told if first.startswith(heading)}


class Told(NamedTuple):
    """How a request ended: its whole text, or an error in OpenAI's shape."""

    text: str
    error: str | None


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving("--ray", "--replicas", "2", "--dtype", "float32") as (url, started):
        whole = psutil.Process(started.pid)
        yield Service(url, whole)
        everybody = whole.children(recursive=True)
        started.send_signal(signal.SIGTERM)
        assert started.wait(60) == 0
        assert not psutil.wait_procs(everybody, 10)[1]


def ask(url: str, seed: int, *, stream: bool, tokens: int = 96) -> Told:
    asked = {**ASKED, "seed": seed, "max_tokens": tokens, "stream": stream}
    with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=120) as answer:
        said = answer.read().decode()
    if not stream or answer.status_code != 200:
        content = json.loads(said)
        assert ("error" in content) == (answer.status_code != 200)
        return (
            Told("", content["error"]["message"]) if "error" in content else Told(content["choices"][0]["text"], None)
        )
    events = said.strip().split("\n\n")
    assert events.pop() == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    error = next((chunk["error"]["message"] for chunk in chunks if "error" in chunk), None)
    return Told("".join(choice["text"] for chunk in chunks for choice in chunk.get("choices", ())), error)


def wait(condition: Callable[[], bool], seconds: float) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.1)


def test_streams_and_refusals_pass_through(service: Service) -> None:
    assert ask(service.url, 3, stream=True) == ask(service.url, 3, stream=False)
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        chat = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Given a number, double the number."}], stream=True
        )
        assert "def solve" in "".join(chunk.choices[0].delta.content or "" for chunk in chat)
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.completions.create(model="tiny", prompt="x", temperature=7)
    assert httpx.post(f"{service.url}/v1/completions", content=b"x" * 2**21).status_code == 413
    assert "Not Found" in httpx.get(f"{service.url}/v1/embeddings").json()["error"]["message"]
    assert httpx.get(f"{service.url}/health").json() == {"status": "ok"}
    assert httpx.get(service.url).headers["content-type"].startswith("text/html")


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_is_forgotten_by_the_replica(service: Service, stream: bool) -> None:
    before = sum(service.figures("cancelled_total").values())
    url, asked = f"{service.url}/v1/completions", {**ASKED, "max_tokens": 400, "stream": stream}
    if stream:
        with httpx.stream("POST", url, json=asked, timeout=60):
            pass  # the answer has begun
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=asked, timeout=0.3)
    wait(lambda: sum(service.figures("cancelled_total").values()) == before + 1, 20)
    wait(lambda: sum(service.figures("running").values()) == 0, 20)


def test_a_killed_replica_loses_no_request(service: Service) -> None:
    alone = [ask(service.url, seed, stream=False) for seed in range(4)]
    stop, before = Event(), service.replicas()
    assert len(before) == 2

    def keep_asking(number: int) -> list[tuple[int, Told]]:
        told = []
        while not stop.is_set():
            seed = len(told) % 4
            told.append((seed, ask(service.url, seed, stream=number % 2 == 1)))
        return told

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(keep_asking, number) for number in range(4)]
        try:
            wait(lambda: min(service.figures("running").values()) >= 1, 60)
            before[0].kill()
            began = time.monotonic()
            assert ask(service.url, 0, stream=False, tokens=4).error is None
            assert time.monotonic() - began < 10
            wait(lambda: len(service.figures("finished_total")) == 2, 120)
            assert before[0] not in service.replicas()
            wait(lambda: min(service.figures("finished_total").values()) >= 1, 120)
        finally:
            stop.set()
    told = [each for work in asking for each in work.result()]
    errors = [each.error for _, each in told if each.error is not None]
    assert len(errors) <= 3  # of streams that had begun on it, at most
    assert set(errors) <= {"the replica that worked on it died; ask again"}
    assert all(each == alone[seed] for seed, each in told if each.error is None)
    assert [ask(service.url, seed, stream=True) for seed in range(4)] == alone


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--ray", "--replicas", "0"), ("replicas='0'", "MIN:MAX")),
        (("--ray", "--replicas", "3:2"), ("replicas='3:2'",)),
        (("--ray", "--dtype", "float7"), ("dtype='float7'",)),
        (("--replicas", "2"), ("add --ray",)),
        (("--ray",), ("replicas need ray", 'pip install "diffucoder[scale]"')),
    ],
    ids=str,
)
def test_what_cannot_be_is_said(
    cli: Run, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    assert_refused(cli("serve", *options), *parts)


def test_a_model_that_is_not_there_is_said_before_ray_starts() -> None:
    assert_refused(process("serve", "--ray", "--model", "nowhere"), "'nowhere' is not a folder")
