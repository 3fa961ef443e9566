"""Two replicas under one address, and what happens when one dies: real processes, a real kill."""

import importlib.util
import re
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any, NamedTuple

import httpx
import openai
import psutil
import pytest
from commands import Run, assert_refused, process
from serving import PATIENCE, serving, wait

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is missing; run pip install -e '.[scale]'"
)
# a hole: it has no early end
BODY: dict[str, Any] = {
    "prompt": "def f(x):\n    ",
    "suffix": "\n    return x\n",
    "temperature": 0.9,
    "decoding": {"block": 8},
}


class Service(NamedTuple):
    url: str
    root: psutil.Process

    def replicas(self) -> list[psutil.Process]:
        """The processes of the replicas."""
        processes = self.root.children(recursive=True)
        return [each for each in processes if each.cmdline() and "ServeReplica" in each.cmdline()[0]]

    def figures(self, name: str) -> dict[str, float]:
        """What each replica counts under `name`. One of them answers at a time, so it is asked often."""
        figures: dict[str, float] = {}
        for _ in range(40):
            text = httpx.get(f"{self.url}/metrics", timeout=PATIENCE).text
            replica = re.search(r'diffucoder_replica_info\{id="(\w+)"\}', text)
            value = re.search(rf"^diffucoder_{name} (\S+)$", text, re.MULTILINE)
            assert replica is not None
            assert value is not None
            figures[replica[1]] = float(value[1])
        return figures


class Outcome(NamedTuple):
    """How a request ended: its whole text, or an error."""

    text: str
    error: Exception | None


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving("--ray", "--replicas", "2", "--dtype", "float32") as (url, started):
        root = psutil.Process(started.pid)
        yield Service(url, root)
        descendants = root.children(recursive=True)
        started.send_signal(signal.SIGTERM)
        assert started.wait(PATIENCE) == 0
        assert not psutil.wait_procs(descendants, PATIENCE)[1]


def ask(url: str, seed: int, *, stream: bool, tokens: int = 96) -> Outcome:
    """One request by the openai package, which sends a request again that failed, unless its stream has begun."""
    more = {name: BODY[name] for name in ("prompt", "suffix", "temperature")}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=PATIENCE) as client:
        try:
            answer: Any = client.completions.create(
                model="tiny",
                seed=seed,
                max_tokens=tokens,
                stream=stream,
                extra_body={"decoding": BODY["decoding"]},
                **more,
            )
            chunks = answer if stream else [answer]
            return Outcome("".join(choice.text for chunk in chunks for choice in chunk.choices), None)
        except (openai.APIError, httpx.HTTPError) as error:
            return Outcome("", error)


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
    url = f"{service.url}/v1/completions"
    body = {**BODY, "max_tokens": 400, "stream": stream}
    if stream:
        with httpx.stream("POST", url, json=body, timeout=PATIENCE):
            pass  # the answer has begun
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, timeout=0.3)
    wait(lambda: sum(service.figures("cancelled_total").values()) == before + 1)
    wait(lambda: sum(service.figures("running").values()) == 0)


def test_a_killed_replica_loses_no_request_but_the_streams_on_it(service: Service) -> None:
    alone = [ask(service.url, seed, stream=False) for seed in range(4)]
    assert all(outcome.error is None for outcome in alone)
    stop = Event()
    before = service.replicas()
    assert len(before) == 2

    def keep_asking(number: int) -> list[tuple[int, Outcome]]:
        outcomes: list[tuple[int, Outcome]] = []
        while not stop.is_set():
            seed = len(outcomes) % 4
            outcomes.append((seed, ask(service.url, seed, stream=number % 2 == 1)))
        return outcomes

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(keep_asking, number) for number in range(4)]
        try:
            wait(lambda: min(service.figures("running").values()) >= 1)
            before[0].kill()
            assert ask(service.url, 0, stream=False, tokens=4).error is None
            wait(lambda: len(service.figures("finished_total")) == 2)
            assert before[0] not in service.replicas()
            wait(lambda: min(service.figures("finished_total").values()) >= 1)
        finally:
            stop.set()
    whole = [each for client in clients[::2] for each in client.result()]
    streamed = [each for client in clients[1::2] for each in client.result()]
    assert all(outcome == alone[seed] for seed, outcome in whole)
    assert all(outcome == alone[seed] for seed, outcome in streamed if outcome.error is None)
    assert sum(outcome.error is not None for _, outcome in streamed) <= 2  # those that had begun on it, at most
    assert [ask(service.url, seed, stream=True) for seed in range(4)] == alone


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--ray", "--replicas", "0"), ("replicas='0'", "MIN:MAX")),
        (("--ray", "--replicas", "3:2"), ("replicas='3:2'",)),
        (("--ray", "--dtype", "float7"), ("dtype='float7'",)),
        (("--replicas", "2"), ("add --ray",)),
        (("--ray",), ("replicas need ray", "pip install -e '.[scale]'")),
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
