"""A real server on 127.0.0.1 under load: throughput, latency, disconnects, memory, and a SIGTERM in the middle.

    python benchmarks/serving.py                                  # four minutes, on a quiet machine
    python benchmarks/serving.py --seconds 5 --requests 200       # a trial

In one run, on the shipped model and requests of the dev split: one client at a time, then `--clients` at once for
`--seconds`, and for comparison the throughput of batches without a server. Then 200 clients that leave at a random
moment, `--requests` requests for the memory, and a SIGTERM while clients wait. The table is written to
benchmarks/results/serving.md.
"""

import asyncio
import platform
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
import torch
import typer
from tiny_accuracy import key_of

from diffucoder import DecodingParams, DiffuCoder
from diffucoder.problems import problems

RESULTS = Path(__file__).parent / "results" / "serving.md"
BATCH = 16


@dataclass
class Load:
    """What clients saw."""

    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)  # seconds, of answered requests
    tokens: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    @property
    def summary(self) -> str:
        """How often each status came."""
        return ", ".join(f"{count:,} × {status}" for status, count in sorted(self.statuses.items()))


def main(
    seconds: Annotated[float, typer.Option(help="seconds of load")] = 60.0,
    clients: Annotated[int, typer.Option(help="clients that send requests at once")] = 64,
    requests: Annotated[int, typer.Option(help="requests before memory is measured")] = 2000,
    preset: Annotated[str, typer.Option(help="preset of decoding")] = "fast",
) -> None:
    """Start a server, load it, and write the table."""
    prompts = [problem.prompt for problem in problems("dev", 500, seed=7)]
    ceiling = batch_rate(prompts, preset)
    url, process = start(preset)
    try:
        asyncio.run(load(url, prompts, 1, 3.0))  # warm
        one = asyncio.run(load(url, prompts, 1, seconds / 4))
        many = asyncio.run(load(url, prompts, clients, seconds))
        before = state(process.pid)
        asyncio.run(leave(url, prompts, 200))
        idle = wait_until_idle(url)
        after = state(process.pid)
        memory = []
        for _ in range(4):
            asyncio.run(load(url, prompts, 16, 1e9, requests // 4))
            memory.append(str(state(process.pid)["VmRSS"] // 1024))
        ended = asyncio.run(terminate(url, prompts, process))
    finally:
        process.kill()
    p50 = 1e3 * median(many.latencies)
    p99 = 1e3 * quantiles(many.latencies, n=100)[98]
    speedup = f"{many.rate / one.rate:.1f} × one, {many.rate / ceiling:.0%} of the batches"
    rows = [
        ("batches of 16 without a server", f"{ceiling:.0f} tokens/s", ""),
        ("one client at a time", f"{one.rate:.0f} tokens/s", f"median {1e3 * median(one.latencies):.0f} ms"),
        (
            f"{clients} clients for {seconds:.0f} s",
            f"{many.rate:.0f} tokens/s ({speedup})",
            f"p50 {p50:.0f} ms, p99 {p99:.0f} ms; {many.summary}",
        ),
        (
            "200 clients that leave",
            f"{idle['running']:.0f} running, {idle['waiting']:.0f} waiting afterwards",
            f"threads {before['Threads']} → {after['Threads']}",
        ),
        (f"{requests:,} requests", f"{', '.join(memory)} MiB", "resident after each quarter"),
        ("SIGTERM while 32 clients wait", ended, ""),
    ]
    RESULTS.write_text(report(rows, preset), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


def batch_rate(prompts: list[str], preset: str) -> float:
    """Tokens a second of full batches, in this process."""
    coder = DiffuCoder.load()
    params = DecodingParams(preset=preset)  # type: ignore[arg-type]  # pydantic checks it
    coder.generate_batch(prompts[:BATCH], params)  # warm-up
    began = time.perf_counter()
    tokens = 0
    for start in range(0, 8 * BATCH, BATCH):
        for result in coder.generate_batch(prompts[start : start + BATCH], params):
            tokens += len(result.tokens)
    return tokens / (time.perf_counter() - began)


def start(preset: str) -> tuple[str, "subprocess.Popen[str]"]:
    """A server's address and process."""
    command = [sys.executable, "-m", "diffucoder.cli", "serve", "--port", "0", "--set", f"preset={preset}"]
    process = subprocess.Popen([*command, "--limit", f"max_batch={BATCH}"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if address := re.search(r"listening on (http://\S+),", line):
            return address[1], process
    raise SystemExit("the server did not start")


async def load(url: str, prompts: list[str], clients: int, seconds: float, most: int = 10**9) -> Load:
    """Let `clients` send one request after the other, for so many seconds, or `most` requests in all."""
    seen = Load()
    left = iter(range(most))
    began = time.monotonic()

    async def client(number: int, http: httpx.AsyncClient) -> None:
        draw = random.Random(number)
        while time.monotonic() - began < seconds and next(left, None) is not None:
            body = {"messages": [{"role": "user", "content": draw.choice(prompts)}], "max_tokens": 64}
            sent = time.monotonic()
            answer = await http.post(f"{url}/v1/chat/completions", json=body, timeout=300)
            seen.statuses[answer.status_code] += 1
            if answer.status_code == 200:
                seen.latencies.append(time.monotonic() - sent)
                seen.tokens += answer.json()["usage"]["completion_tokens"]
            else:
                await asyncio.sleep(min(1.0, float(answer.headers.get("retry-after", 1))))

    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=clients)) as http:
        await asyncio.gather(*(client(number, http) for number in range(clients)))
    seen.seconds = time.monotonic() - began
    return seen


async def leave(url: str, prompts: list[str], count: int) -> None:
    """Clients that hang up at a random moment, some of them in the middle of a stream."""
    draw = random.Random(0)

    async def client(stream: bool, patience: float) -> None:
        body = {"messages": [{"role": "user", "content": draw.choice(prompts)}], "max_tokens": 200, "stream": stream}
        body["decoding"] = {"preset": "exact"}
        async with httpx.AsyncClient() as http:
            with suppress(asyncio.TimeoutError, httpx.HTTPError):
                await asyncio.wait_for(http.post(f"{url}/v1/chat/completions", json=body, timeout=60), patience)

    for _ in range(0, count, 20):
        await asyncio.gather(*(client(draw.random() < 0.5, draw.uniform(0.01, 1.0)) for _ in range(20)))


def wait_until_idle(url: str) -> dict[str, float]:
    """The engine's figures once nothing is left to do, or after ten seconds."""
    figures: dict[str, float] = {}
    for _ in range(100):
        text = httpx.get(f"{url}/metrics").text
        for name in ("running", "waiting"):
            figures[name] = number(rf"^diffucoder_{name} (\S+)", text)
        if not any(figures.values()):
            break
        time.sleep(0.1)
    return figures


def state(process: int) -> dict[str, int]:
    """Threads, and KiB in memory, of a process."""
    text = Path(f"/proc/{process}/status").read_text()
    return {name: int(number(rf"^{name}:\s+(\d+)", text)) for name in ("Threads", "VmRSS")}


def number(pattern: str, text: str) -> float:
    """What the group of a pattern matches in a text that has it."""
    match = re.search(pattern, text, re.MULTILINE)
    assert match is not None, pattern
    return float(match[1])


async def terminate(url: str, prompts: list[str], process: "subprocess.Popen[str]") -> str:
    """What 32 clients get whose requests were accepted when the server is told to stop."""
    posts = []
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=64)) as http:
        for prompt in prompts[:32]:
            body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 64}
            posts.append(asyncio.create_task(http.post(f"{url}/v1/chat/completions", json=body, timeout=300)))
        await asyncio.sleep(0.5)  # all of them have arrived
        process.send_signal(signal.SIGTERM)
        answers = await asyncio.gather(*posts, return_exceptions=True)
    statuses: Counter[str] = Counter()
    for answer in answers:
        statuses[str(answer.status_code) if isinstance(answer, httpx.Response) else type(answer).__name__] += 1
    return ", ".join(f"{count} × {status}" for status, count in statuses.items()) + f"; exit {process.wait(30)}"


def report(rows: list[tuple[str, str, str]], preset: str) -> str:
    """The table, with what it was measured on."""
    head = [
        "# The server under load",
        "",
        f"`python benchmarks/serving.py`, {time.strftime('%Y-%m-%d')}: preset {preset}, model {key_of(None)}, "
        f"{torch.get_num_threads()} threads, clients and server on one machine; Python {platform.python_version()}, "
        f"torch {torch.__version__}.",
        "",
        "| | | |",
        "| --- | --- | --- |",
    ]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows), ""])


if __name__ == "__main__":
    typer.run(main)
