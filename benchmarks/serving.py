"""A real server on 127.0.0.1 under load: throughput, latency, disconnects, memory, and a SIGTERM in the middle.

    python benchmarks/serving.py                                  # four minutes, on a quiet machine
    python benchmarks/serving.py --seconds 5 --requests 200       # a trial

One run, with the shipped model and requests of the dev split, measures one client at a time, `--clients` at once for
`--seconds`, and the speed of batches without a server. Then 200 clients leave at a random moment, `--requests` requests
show the memory, and a SIGTERM arrives while clients wait. The table goes to benchmarks/results/serving.md.
"""

import asyncio
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated

import httpx
import typer
from common import RESULTS, key_of, machine

from diffucoder import DecodingParams, DiffuCoder
from recipes.report import provenance, table, update_page
from recipes.tiny.problems import problems

BATCH = 16
LEAVING = 200  # clients that disconnect
WAITING = 32  # clients that wait when the SIGTERM arrives


@dataclass
class Load:
    """What clients saw."""

    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)  # seconds of answered requests
    tokens: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    @property
    def summary(self) -> str:
        late = quantiles(self.latencies, n=100)[98]
        statuses = ", ".join([f"{count:,} × {status}" for status, count in sorted(self.statuses.items())])
        return f"p50 {1e3 * median(self.latencies):.0f} ms, p99 {1e3 * late:.0f} ms; {statuses}"


def main(
    seconds: Annotated[float, typer.Option(help="seconds of load")] = 60.0,
    clients: Annotated[int, typer.Option(help="clients at once")] = 64,
    requests: Annotated[int, typer.Option(help="requests behind the memory figure")] = 2000,
    preset: Annotated[str, typer.Option(help="preset of decoding")] = "fast",
) -> None:
    """Start a server, load it, and write the table."""
    prompts = [problem.prompt for problem in problems("dev", 500, seed=7)]
    batches = rate_without_server(prompts, preset)
    url, server = start_server(preset)
    try:
        asyncio.run(apply_load(url, prompts, 1, 3.0))  # warm-up
        one = asyncio.run(apply_load(url, prompts, 1, seconds / 4))
        many = asyncio.run(apply_load(url, prompts, clients, seconds))
        threads = process_status(server.pid, "Threads")
        asyncio.run(disconnect(url, prompts))
        left = wait_until_idle(url)
        threads_after = process_status(server.pid, "Threads")
        memory = []
        for _ in range(4):
            asyncio.run(apply_load(url, prompts, 16, 1e9, requests // 4))
            memory.append(str(process_status(server.pid, "VmRSS") // 1024))
        ended = asyncio.run(terminate(url, prompts, server))
    finally:
        server.kill()
    shares = f"{many.rate / one.rate:.1f} × one client, {many.rate / batches:.0%} of the batches"
    rows = [
        [f"batches of {BATCH} without a server", f"{batches:.0f} tokens/s", ""],
        ["one client at a time", f"{one.rate:.0f} tokens/s", one.summary],
        [f"{clients} clients for {seconds:.0f} s", f"{many.rate:.0f} tokens/s ({shares})", many.summary],
        [f"{LEAVING} clients that leave", f"{left} left afterwards", f"threads {threads} → {threads_after}"],
        [f"{requests:,} requests", f"{', '.join(memory)} MiB", "resident after each quarter"],
        [f"SIGTERM while {WAITING} clients wait", ended, ""],
    ]
    run = provenance("python benchmarks/serving.py", f"preset {preset}, model {key_of(None)}", machine())
    update_page(RESULTS / "serving.md", {"run": run, "table": table(["", "", ""], rows)})


def rate_without_server(prompts: list[str], preset: str) -> float:
    """Tokens a second of full batches, in this process."""
    coder = DiffuCoder.load()
    params = DecodingParams(preset=preset)  # type: ignore[arg-type]  # it checks
    coder.generate_batch(prompts[:BATCH], params)
    began = time.perf_counter()
    tokens = 0
    for start in range(0, 8 * BATCH, BATCH):
        results = coder.generate_batch(prompts[start : start + BATCH], params)
        tokens += sum([len(result.tokens) for result in results])
    return tokens / (time.perf_counter() - began)


def start_server(preset: str) -> tuple[str, "subprocess.Popen[str]"]:
    """A server's address and process."""
    command = [sys.executable, "-m", "diffucoder.cli", "serve", "--port", "0", "--set", f"preset={preset}"]
    process = subprocess.Popen([*command, "--limit", f"max_batch={BATCH}"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        address = re.search(r"listening on (http://\S+),", line)
        if address:
            return address[1], process
    raise SystemExit("the server did not start")


async def apply_load(url: str, prompts: list[str], clients: int, seconds: float, most: int = 10**9) -> Load:
    """So many clients that send one request after the other, for so long, or `most` requests in all."""
    load = Load()
    left = iter(range(most))
    began = time.monotonic()

    async def client(number: int, http: httpx.AsyncClient) -> None:
        draw = random.Random(number)
        while time.monotonic() - began < seconds and next(left, None) is not None:
            sent = time.monotonic()
            answer = await http.post(f"{url}/v1/chat/completions", json=chat(draw.choice(prompts)), timeout=120)
            load.statuses[answer.status_code] += 1
            if answer.status_code == 200:
                load.latencies.append(time.monotonic() - sent)
                load.tokens += answer.json()["usage"]["completion_tokens"]
            else:
                await asyncio.sleep(min(1.0, float(answer.headers.get("retry-after", 1))))

    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=clients)) as http:
        await asyncio.gather(*[client(number, http) for number in range(clients)])
    load.seconds = time.monotonic() - began
    return load


async def disconnect(url: str, prompts: list[str]) -> None:
    """Clients that disconnect at a random moment, some of them in the middle of a stream."""
    draw = random.Random(0)

    async def client(stream: bool, patience: float) -> None:
        body = {**chat(draw.choice(prompts)), "max_tokens": 200, "stream": stream, "decoding": {"preset": "exact"}}
        async with httpx.AsyncClient() as http:
            with suppress(asyncio.TimeoutError, httpx.HTTPError):
                await asyncio.wait_for(http.post(f"{url}/v1/chat/completions", json=body, timeout=60), patience)

    for _ in range(0, LEAVING, 20):
        await asyncio.gather(*[client(draw.random() < 0.5, draw.uniform(0.01, 1.0)) for _ in range(20)])


async def terminate(url: str, prompts: list[str], server: "subprocess.Popen[str]") -> str:
    """What clients get whose requests were accepted when the server is told to stop."""
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=64)) as http:
        posts = []
        for prompt in prompts[:WAITING]:
            post = http.post(f"{url}/v1/chat/completions", json=chat(prompt), timeout=60)
            posts.append(asyncio.create_task(post))
        await asyncio.sleep(0.5)  # all of them have arrived
        server.send_signal(signal.SIGTERM)
        answers = await asyncio.gather(*posts, return_exceptions=True)
    statuses: Counter[str] = Counter()
    for answer in answers:
        statuses[str(answer.status_code) if isinstance(answer, httpx.Response) else type(answer).__name__] += 1
    return ", ".join([f"{count} × {status}" for status, count in statuses.items()]) + f"; exit {server.wait(30)}"


def chat(prompt: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": prompt}], "max_tokens": 64}


def wait_until_idle(url: str) -> str:
    """Running and waiting requests once nothing is left to do, or after ten seconds."""
    for _ in range(100):
        metrics = httpx.get(f"{url}/metrics").text
        counts = re.findall(r"^diffucoder_(running|waiting) (\S+)", metrics, re.MULTILINE)
        if not any(float(count) for _, count in counts):
            break
        time.sleep(0.1)
    return ", ".join([f"{float(count):.0f} {name}" for name, count in counts])


def process_status(process: int, name: str) -> int:
    """A figure of a process: its threads, or KiB in memory."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0])


if __name__ == "__main__":
    typer.run(main)
