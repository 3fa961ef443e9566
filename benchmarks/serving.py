"""A real server on 127.0.0.1 under load: throughput, latency, disconnects, memory, and a SIGTERM in the middle.

    python benchmarks/serving.py                                  # four minutes, on a quiet machine
    python benchmarks/serving.py --seconds 5 --requests 200       # a trial

In one run, on the shipped model and requests of the dev split: one client at a time, `--clients` at once for
`--seconds`, and beside them what batches reach without a server. Then 200 clients that leave at a random moment,
`--requests` requests for the memory, and a SIGTERM while clients wait. The table goes to benchmarks/results/serving.md.
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
    seconds: list[float] = field(default_factory=list)  # of answered requests
    tokens: int = 0
    took: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.took

    @property
    def told(self) -> str:
        """Statuses with their numbers."""
        return ", ".join(f"{count:,} × {status}" for status, count in sorted(self.statuses.items()))


def main(
    seconds: Annotated[float, typer.Option(help="of load")] = 60.0,
    clients: Annotated[int, typer.Option(help="that ask at once")] = 64,
    requests: Annotated[int, typer.Option(help="behind the memory figure")] = 2000,
    preset: Annotated[str, typer.Option(help="of decoding")] = "fast",
) -> None:
    """Start a server, load it, and write the table."""
    prompts = [problem.prompt for problem in problems("dev", 500, seed=7)]
    without = ceiling(prompts, preset)
    url, process = start(preset)
    try:
        asyncio.run(load(url, prompts, 1, 3.0))  # warm
        one = asyncio.run(load(url, prompts, 1, seconds / 4))
        many = asyncio.run(load(url, prompts, clients, seconds))
        before = state(process.pid)
        asyncio.run(leave(url, prompts, 200))
        idle = settled(url)
        after = state(process.pid)
        memory = []
        for _ in range(4):
            asyncio.run(load(url, prompts, 16, 1e9, requests // 4))
            memory.append(state(process.pid)["VmRSS"] // 1024)
        ended = asyncio.run(terminate(url, prompts, process))
    finally:
        process.kill()
    late = 1e3 * quantiles(many.seconds, n=100)[98]
    rows = [
        ("batches of 16 without a server", f"{without:.0f} tokens/s", ""),
        ("one client at a time", f"{one.rate:.0f} tokens/s", f"median {1e3 * median(one.seconds):.0f} ms"),
        (
            f"{clients} clients for {seconds:.0f} s",
            f"{many.rate:.0f} tokens/s ({many.rate / one.rate:.1f} × one, {many.rate / without:.0%} of the batches)",
            f"p50 {1e3 * median(many.seconds):.0f} ms, p99 {late:.0f} ms; {many.told}",
        ),
        (
            "200 clients that leave",
            f"{idle['running']:.0f} running, {idle['waiting']:.0f} waiting afterwards",
            f"threads {before['Threads']} → {after['Threads']}",
        ),
        (f"{requests:,} requests", f"{', '.join(map(str, memory))} MiB", "resident after each quarter"),
        ("SIGTERM while 32 clients wait", ended, ""),
    ]
    RESULTS.write_text(report(rows, preset), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


def ceiling(prompts: list[str], preset: str) -> float:
    """Tokens a second of full batches, in this process."""
    coder, params = DiffuCoder.load(), DecodingParams(preset=preset)  # type: ignore[arg-type]  # it checks
    coder.generate_batch(prompts[:BATCH], params)
    began, tokens = time.perf_counter(), 0
    for at in range(0, 8 * BATCH, BATCH):
        tokens += sum(len(result.tokens) for result in coder.generate_batch(prompts[at : at + BATCH], params))
    return tokens / (time.perf_counter() - began)


def start(preset: str) -> tuple[str, "subprocess.Popen[str]"]:
    """A server's address and process."""
    command = [sys.executable, "-m", "diffucoder.cli", "serve", "--port", "0", "--set", f"preset={preset}"]
    process = subprocess.Popen([*command, "--limit", f"max_batch={BATCH}"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"listening on (http://\S+),", line):
            return found[1], process
    raise SystemExit("the server did not start")


async def load(url: str, prompts: list[str], clients: int, seconds: float, most: int = 10**9) -> Load:
    """So many clients that ask one request after the other, for so long, or `most` requests in all."""
    seen, left = Load(), iter(range(most))
    began = time.monotonic()

    async def client(number: int, http: httpx.AsyncClient) -> None:
        draw = random.Random(number)
        while time.monotonic() - began < seconds and next(left, None) is not None:
            asked = {"messages": [{"role": "user", "content": draw.choice(prompts)}], "max_tokens": 64}
            at = time.monotonic()
            answer = await http.post(f"{url}/v1/chat/completions", json=asked, timeout=120)
            seen.statuses[answer.status_code] += 1
            if answer.status_code == 200:
                seen.seconds.append(time.monotonic() - at)
                seen.tokens += answer.json()["usage"]["completion_tokens"]
            else:
                await asyncio.sleep(min(1.0, float(answer.headers.get("retry-after", 1))))

    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=clients)) as http:
        await asyncio.gather(*(client(number, http) for number in range(clients)))
    seen.took = time.monotonic() - began
    return seen


async def leave(url: str, prompts: list[str], count: int) -> None:
    """Clients that hang up at a random moment, some of them in the middle of a stream."""
    draw = random.Random(0)

    async def client(stream: bool, patience: float) -> None:
        asked = {"messages": [{"role": "user", "content": draw.choice(prompts)}], "max_tokens": 200, "stream": stream}
        asked["decoding"] = {"preset": "exact"}
        async with httpx.AsyncClient() as http:
            with suppress(asyncio.TimeoutError, httpx.HTTPError):
                await asyncio.wait_for(http.post(f"{url}/v1/chat/completions", json=asked, timeout=60), patience)

    for _ in range(0, count, 20):
        await asyncio.gather(*(client(draw.random() < 0.5, draw.uniform(0.01, 1.0)) for _ in range(20)))


def settled(url: str) -> dict[str, float]:
    """The engine's figures once nothing is left to do, or after ten seconds."""
    for _ in range(100):
        told = httpx.get(f"{url}/metrics").text
        figures = {n: float(re.search(rf"^diffucoder_{n} (\S+)", told, re.M)[1]) for n in ("running", "waiting")}  # type: ignore[index]
        if not any(figures.values()):
            break
        time.sleep(0.1)
    return figures


def state(process: int) -> dict[str, int]:
    """Threads, and KiB in memory, of a process."""
    told = Path(f"/proc/{process}/status").read_text()
    return {name: int(re.search(rf"^{name}:\s+(\d+)", told, re.M)[1]) for name in ("Threads", "VmRSS")}  # type: ignore[index]


async def terminate(url: str, prompts: list[str], process: "subprocess.Popen[str]") -> str:
    """What 32 clients get whose requests were accepted when the server is told to stop."""
    asked = [{"messages": [{"role": "user", "content": prompt}], "max_tokens": 64} for prompt in prompts[:32]]
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=64)) as http:
        posts = [asyncio.create_task(http.post(f"{url}/v1/chat/completions", json=each, timeout=60)) for each in asked]
        await asyncio.sleep(0.5)  # all of them are there
        process.send_signal(signal.SIGTERM)
        answers = await asyncio.gather(*posts, return_exceptions=True)
    statuses = Counter(str(a.status_code) if isinstance(a, httpx.Response) else type(a).__name__ for a in answers)
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
