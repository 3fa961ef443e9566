"""Keep a real server busy for ten minutes with everything at once, and check what it promises.

    make soak                               ten minutes
    python tools/soak.py --seconds 60       one

Clients send short and long requests to every route, invalid ones, halves of bodies and heads; they disconnect in the
middle and read slowly. Workers are killed, and a process takes memory and gives it back. At the end the script prints
what came of each kind of request, the latency of short requests, and the server's memory, descriptors and threads. The
exit code is 1 if a promise is broken:

* every request gets an answer, none of them a 5xx, by its deadline
* a short request takes at most five times what it takes alone (99th percentile against the median)
* descriptors and threads do not grow, and memory does not in a run of two minutes or more
* a killed worker never changes a verdict
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from diffucoder.errors import SandboxError
from diffucoder.grading.sandbox import Sandbox

GRACE = 15  # seconds that an answer may come later on a busy machine
STEADY_AFTER = 120  # seconds: in a shorter run memory still grows towards its level, so growth says nothing
CODE = "def f(x):\n"
SHORT = {"prompt": CODE, "max_tokens": 16}


@dataclass
class Server:
    """A server process."""

    process: "subprocess.Popen[bytes]"
    address: tuple[str, int]
    log: Path

    @property
    def url(self) -> str:
        """Its address."""
        return "http://{}:{}".format(*self.address)

    def printed(self) -> str:
        """What it has printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def usage(self) -> dict[str, int]:
        """Its resident memory in MiB, its descriptors and its threads."""
        proc = Path("/proc", str(self.process.pid))
        pages = int((proc / "statm").read_text().split()[1])
        counts = {
            name: len(list((proc / folder).iterdir())) for name, folder in (("descriptors", "fd"), ("threads", "task"))
        }
        return {"memory": pages * os.sysconf("SC_PAGE_SIZE") >> 20, **counts}


@contextmanager
def serving(*options: str) -> Iterator[Server]:
    """Start `diffucoder serve`; end it afterwards."""
    command = [sys.executable, "-m", "diffucoder.cli", "serve", "--port", "0", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log, env=environment)
        try:
            server = Server(process, ("", 0), Path(log.name))
            while not (found := re.search(r"listening on http://(\S+):(\d+),", server.printed())):
                if process.poll() is not None:
                    raise SystemExit(f"the server did not start: {server.printed()}")
                time.sleep(0.1)
            server.address = (found[1], int(found[2]))
            yield server
        finally:
            process.kill()
            process.wait()


@dataclass
class Soak:
    """Clients of a server, and what came of their requests."""

    server: Server
    dice: random.Random
    deadline: float  # seconds of each request
    ends: float = 0.0  # of the clock: no request is sent later
    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    latencies: list[float] = field(default_factory=list)  # seconds of short requests
    slowest: float = 0.0  # seconds of any request
    broken: list[str] = field(default_factory=list)  # promises

    def breaks(self, what: str) -> None:
        """Note a broken promise, and print it."""
        self.broken.append(what)
        if len(self.broken) < 20:
            print(f"BROKEN: {what}", flush=True)

    async def post(self, client: httpx.AsyncClient, route: str, body: Any, expected: tuple[int, ...]) -> str:
        """Send a request and read all of its answer. Return its status, and check it."""
        answer = await client.post(route, json=body)
        text = answer.text
        if answer.status_code not in (*expected, 429):
            self.breaks(f"{route} {json.dumps(body)[:100]}: status {answer.status_code}, {text[:200]}")
        if answer.headers["content-type"].startswith("text/event-stream") and route.startswith("/v1/"):
            if not text.endswith("data: [DONE]\n\n"):
                self.breaks(f"{route}: a stream without end")
            if "server_error" in text:
                self.breaks(f"{route}: {text[-300:]}")
        return str(answer.status_code)

    # --- kinds of requests ---

    async def short(self, client: httpx.AsyncClient) -> str:
        """A completion of 16 tokens."""
        return await self.post(client, "/v1/completions", SHORT, (200,))

    async def long(self, client: httpx.AsyncClient) -> str:
        """A completion as long as the model can."""
        tokens = self.dice.randint(100, 480)
        body = {"prompt": CODE, "max_tokens": tokens, "temperature": self.dice.choice([0, 1.2])}
        return await self.post(client, "/v1/completions", body, (200, 408))

    async def many(self, client: httpx.AsyncClient) -> str:
        """64 answers."""
        body = {"prompt": CODE, "max_tokens": self.dice.choice([8, 100]), "n": 64, "temperature": 1.0}
        return await self.post(client, "/v1/completions", body, (200, 408))

    async def chat(self, client: httpx.AsyncClient) -> str:
        """A chat, as a stream or whole."""
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "Double the number."}], "max_tokens": 48}
        if self.dice.random() < 0.5:
            body |= {"stream": True, "stream_options": {"include_usage": True, "denoise": True}}
        return await self.post(client, "/v1/chat/completions", body, (200, 408))

    async def holes(self, client: httpx.AsyncClient) -> str:
        """Filling and editing."""
        text = "def add(a, b):\n    return a + b\n"
        route, body = self.dice.choice(
            [
                ("/v1/fill", {"text": "def add(a, b):\n    <|hole:6|>\n    return <|hole|>\n"}),
                ("/v1/edit", {"text": text, "spans": [{"start": 26, "end": 31}]}),
                ("/v1/edit", {"text": text, "instruction": "Add three numbers.", "max_tokens": 32}),
                ("/infill", {"input_prefix": "def f(x):\n    return ", "input_suffix": "\n", "n_predict": 8}),
                ("/completion", {"prompt": [CODE, CODE], "n_predict": 8, "stream": True}),
                ("/tokenize", {"content": "x = 1\n" * self.dice.choice([1, 100_000])}),
            ]
        )
        return await self.post(client, route, body, (200, 408))

    async def invalid(self, client: httpx.AsyncClient) -> str:
        """A request that must be rejected."""
        route, body = self.dice.choice(
            [
                ("/v1/completions", {"prompt": CODE, "max_tokens": 10**30}),
                ("/v1/completions", {"prompt": CODE, "n": 65}),
                ("/v1/completions", {"prompt": [[5, -1]]}),
                ("/v1/chat/completions", {"messages": []}),
                ("/v1/fill", {"text": "<|hole:0|>"}),
                ("/v1/edit", {"text": "x", "spans": [{"start": 5, "end": 2}]}),
                ("/v1/nothing", {}),
                ("/v1/completions", {"prompt": "a" * (2 << 20)}),
            ]
        )
        return await self.post(client, route, body, (400, 404, 413))

    async def reads(self, client: httpx.AsyncClient) -> str:
        """The server's state."""
        answer = await client.get(self.dice.choice(["/health", "/ready", "/metrics", "/v1/models", "/"]))
        if answer.status_code != 200:
            self.breaks(f"{answer.url}: status {answer.status_code}")
        return str(answer.status_code)

    async def leaves(self, client: httpx.AsyncClient) -> str:
        """A client that disconnects: before its answer, or in the middle of a stream."""
        body: dict[str, Any] = {"prompt": CODE, "max_tokens": 300, "n": 4, "temperature": 1.0}
        if self.dice.random() < 0.5:
            with suppress(httpx.TimeoutException):
                await client.post("/v1/completions", json=body, timeout=self.dice.uniform(0.05, 2))
            return "left"
        async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            async for _ in answer.aiter_bytes():
                break
        return "left a stream"

    async def reads_slowly(self, client: httpx.AsyncClient) -> str:
        """A client that reads a stream in small pieces, with pauses."""
        reader, writer = await asyncio.open_connection(*self.server.address, limit=1024)
        body = json.dumps({"prompt": CODE, "max_tokens": 64, "stream": True, "stream_options": {"denoise": True}})
        writer.write(self._head("/v1/completions", len(body)) + body.encode())
        with suppress(OSError, asyncio.IncompleteReadError):
            while piece := await reader.read(256):
                await asyncio.sleep(0.02)
                if piece.endswith(b"0\r\n\r\n"):
                    break
        writer.close()
        return "read slowly"

    async def sends_half(self, client: httpx.AsyncClient) -> str:
        """A client that sends a part of a head or of a body and waits."""
        _, writer = await asyncio.open_connection(*self.server.address)
        body = json.dumps(SHORT).encode()
        message = self._head("/v1/completions", len(body)) + body
        writer.write(message[: self.dice.randrange(1, len(message))])
        await asyncio.sleep(self.dice.uniform(0.1, 3))
        writer.close()
        return "sent half"

    def _head(self, route: str, length: int) -> bytes:
        host = "{}:{}".format(*self.server.address)
        head = f"POST {route} HTTP/1.1\r\nHost: {host}\r\n"
        return f"{head}Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n".encode()

    # --- clients ---

    async def measured(self, kind: Callable[[httpx.AsyncClient], Awaitable[str]], client: httpx.AsyncClient) -> float:
        """Send a request of a kind. Return its seconds; note an outcome that must not be."""
        began = time.monotonic()
        name = kind.__name__
        try:
            outcome = await asyncio.wait_for(kind(client), self.deadline + GRACE)
        except TimeoutError:
            outcome = "past its deadline"
            self.breaks(f"{name}: no answer after {self.deadline + GRACE} s")
        except (httpx.HTTPError, OSError) as error:
            outcome = "lost"
            self.breaks(f"{name}: {error!r}")
        self.outcomes[name][outcome] += 1
        seconds = time.monotonic() - began
        self.slowest = max(self.slowest, seconds)
        return seconds

    async def mixed_client(self) -> None:
        """Send requests of all kinds, one after the other."""
        kinds = [
            self.short,
            self.short,
            self.long,
            self.many,
            self.chat,
            self.chat,
            self.holes,
            self.holes,
            self.invalid,
        ]
        kinds += [self.reads, self.leaves, self.leaves, self.reads_slowly, self.sends_half]
        while time.monotonic() < self.ends:
            async with self.client() as client:  # of a few requests each
                for _ in range(self.dice.randrange(1, 6)):
                    if time.monotonic() < self.ends:
                        await self.measured(self.dice.choice(kinds), client)

    async def short_client(self) -> None:
        """Send a short request every half a second, and keep its latency."""
        async with self.client() as client:
            while time.monotonic() < self.ends:
                self.latencies.append(await self.measured(self.short, client))
                await asyncio.sleep(0.5)

    async def alone(self, count: int = 20) -> list[float]:
        """The latencies of short requests while there are no others."""
        async with self.client() as client:
            return [await self.measured(self.short, client) for _ in range(count)]

    def client(self) -> httpx.AsyncClient:
        """A client of the server."""
        return httpx.AsyncClient(base_url=self.server.url, timeout=self.deadline + 2 * GRACE)


# --- beside the clients ----------------------------------------------------------------------------------------------


def children_of(process: int) -> list[int]:
    """The processes that a process has started."""
    found: list[int] = []
    for task in Path("/proc", str(process), "task").iterdir():
        with suppress(OSError):
            found += map(int, (task / "children").read_text().split())
    return found


def kill_workers(soak: Soak, stopped: threading.Event) -> None:
    """Every few seconds kill a worker of the server, and one of the sandbox here."""
    while not stopped.wait(soak.dice.uniform(1, 4)):
        own = [child for child in children_of(os.getpid()) if child not in (soak.server.process.pid, *_PRESSERS)]
        for children in (own, children_of(soak.server.process.pid)):
            if children:
                with suppress(ProcessLookupError):
                    os.kill(soak.dice.choice(children), signal.SIGKILL)
                soak.outcomes["kill"]["worker of the server" if children is not own else "worker of the sandbox"] += 1


def grade(soak: Soak, stopped: threading.Event) -> None:
    """Run a right program in a sandbox whose workers are killed: it may have to run again, but never fails."""
    try:
        sandbox = Sandbox(1)
    except SandboxError as error:
        print(f"no programs are run here: {error}")
        return
    with sandbox:
        while not stopped.wait(0.2):
            try:
                result = sandbox.run("print(sum(range(10)))")
            except SandboxError:
                soak.outcomes["grade"]["infrastructure failed"] += 1
                continue
            soak.outcomes["grade"][result.status] += 1
            if result.status != "ok":
                soak.breaks(f"a right program is {result.status}: {result.stderr[-200:]}")


_PRESSERS: list[int] = []


def press(soak: Soak, stopped: threading.Event, share: float) -> None:
    """Take a share of the memory that is free, for a few seconds, again and again."""
    while share and not stopped.wait(soak.dice.uniform(1, 5)):
        free = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
        size = int(int(free[1] if free else 0) * 1024 * share)
        code = f"import time; memory = bytearray({size}); memory[::4096] = b'x' * len(memory[::4096]); time.sleep(3)"
        presser = subprocess.Popen([sys.executable, "-c", code])
        _PRESSERS.append(presser.pid)
        presser.wait()
        _PRESSERS.remove(presser.pid)
        soak.outcomes["memory"]["taken and given back"] += 1


async def watch(soak: Soak, quarters: list[dict[str, float]], seconds: float) -> None:
    """Measure the server in each quarter of the time, and print what it uses."""
    samples: list[dict[str, int]] = []
    began = time.monotonic()
    while time.monotonic() < soak.ends:
        await asyncio.sleep(min(2.0, seconds / 40))
        samples.append(soak.server.usage())
        if time.monotonic() - began > seconds * (len(quarters) + 1) / 4 or time.monotonic() >= soak.ends:
            quarters.append({name: statistics.mean(sample[name] for sample in samples) for name in samples[0]})
            samples.clear()
            answered = sum(sum(counts.values()) for counts in soak.outcomes.values())
            used = ", ".join(f"{name} {value:.0f}" for name, value in quarters[-1].items())
            print(f"{time.monotonic() - began:5.0f} s  {answered:,} answered; {used}", flush=True)


async def soak_all(
    soak: Soak, seconds: float, clients: int
) -> tuple[list[float], list[dict[str, float]], dict[str, int]]:
    """Run all clients. Return the latencies alone, before and after, the usage of the quarters, and that afterwards."""
    await soak.alone(5)  # warm-up
    alone = await soak.alone()
    quarters: list[dict[str, float]] = []
    soak.ends = time.monotonic() + seconds
    work = [soak.mixed_client() for _ in range(clients)]
    await asyncio.gather(soak.short_client(), watch(soak, quarters, seconds), *work)
    async with soak.client() as client:
        while "diffucoder_running 0.0" not in (figures := (await client.get("/metrics")).text):
            if time.monotonic() > soak.ends + soak.deadline + GRACE:
                soak.breaks(f"the server works for nobody: {re.findall('diffucoder_running .*', figures)}")
                break
            await asyncio.sleep(0.1)
    alone += await soak.alone()
    await asyncio.sleep(1)
    return alone, quarters, soak.server.usage()


def judge(
    soak: Soak,
    alone: list[float],
    quarters: list[dict[str, float]],
    after: dict[str, int],
    seconds: float,
    times_alone: float,
) -> None:
    """Print what was measured, and note broken promises."""
    for name, counts in sorted(soak.outcomes.items()):
        print(f"{name:14} " + ", ".join(f"{outcome}: {count}" for outcome, count in counts.most_common()))
    median = statistics.median(alone)
    beside = sorted(soak.latencies)
    late = beside[min(len(beside) - 1, int(0.99 * len(beside)))]
    print(f"short request  alone {median:.3f} s (worst {max(alone):.3f}); beside {statistics.median(beside):.3f},")
    print(f"               99 % {late:.3f} = {late / median:.1f} times, worst {beside[-1]:.3f} s")
    print(f"any request    at most {soak.slowest:.1f} s, of {soak.deadline:g} s")
    print("at the end     " + ", ".join(f"{name} {value}" for name, value in after.items()))
    if late > times_alone * median:
        soak.breaks(f"a short request takes {late / median:.1f} times its time alone, more than {times_alone:g}")
    if len(quarters) == 4:
        before, last = quarters[2]["memory"], quarters[3]["memory"]
        if seconds >= STEADY_AFTER and last > 1.03 * before + 8:
            soak.breaks(f"memory grows: {before:.0f} MiB in the third quarter, {last:.0f} in the last")
        for name in ("descriptors", "threads"):
            if after[name] > quarters[0][name] + 8:
                soak.breaks(f"{name} are left: {quarters[0][name]:.0f} in the first quarter, {after[name]} at the end")
    if "Traceback" in soak.server.printed():
        soak.breaks(f"the server's log has a traceback: {soak.server.printed()[-2000:]}")


def main() -> int:
    """Read the options, and soak."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--seconds", type=float, default=600)
    options.add_argument("--clients", type=int, default=8, help="that send requests of all kinds")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--deadline", type=float, default=60, help="seconds of each request")
    options.add_argument("--pressure", type=float, default=0.25, help="share of the free memory that a process takes")
    options.add_argument("--times-alone", type=float, default=5, help="of a short request, the most")
    given = options.parse_args()
    with serving("--dtype", "float32", "--limit", f"deadline={given.deadline}") as server:
        soak = Soak(server, random.Random(given.seed), given.deadline)
        stopped = threading.Event()
        beside = [
            threading.Thread(target=kill_workers, args=(soak, stopped)),
            threading.Thread(target=grade, args=(soak, stopped)),
            threading.Thread(target=press, args=(soak, stopped, given.pressure)),
        ]
        for thread in beside:
            thread.start()
        try:
            measured = asyncio.run(soak_all(soak, given.seconds, given.clients))
        finally:
            stopped.set()
            for thread in beside:
                thread.join()
        judge(soak, *measured, given.seconds, given.times_alone)
    print(f"{len(soak.broken)} promises broken" if soak.broken else "every promise held")
    return 1 if soak.broken else 0


if __name__ == "__main__":
    sys.exit(main())
