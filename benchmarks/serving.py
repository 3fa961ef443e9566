"""A real server on 127.0.0.1 under load: throughput, latency and memory.

    python benchmarks/serving.py    # two minutes, on a quiet machine

It measures one client at a time, `--clients` at once for `--seconds`, the server's memory meanwhile, and the speed of
batches without a server. The table goes to benchmarks/results/serving.md.
"""

import asyncio
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated

import httpx
import typer
from common import RESULTS, model_id, write_page

from diffucoder import DecodingParams, DiffuCoder
from recipes.tiny.problems import problems

BATCH = 16
PRESET = "fast"


@dataclass
class Load:
    """What clients saw."""

    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)  # seconds of answered requests
    tokens: int = 0
    seconds: float = 0.0

    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    def summary(self) -> str:
        late = quantiles(self.latencies, n=100)[98]
        statuses = ", ".join([f"{count:,} × {status}" for status, count in sorted(self.statuses.items())])
        return f"p50 {1e3 * median(self.latencies):.0f} ms, p99 {1e3 * late:.0f} ms; {statuses}"


def main(
    seconds: Annotated[float, typer.Option(help="seconds of load")] = 60.0,
    clients: Annotated[int, typer.Option(help="clients at once")] = 64,
) -> None:
    """Start a server, load it, and write the table."""
    prompts = [problem.prompt for problem in problems("dev", 500, seed=7)]
    batches = rate_without_server(prompts)
    url, server = start_server()
    try:
        asyncio.run(apply_load(Load(), url, prompts, 1, 3.0))  # warm-up
        one = Load()
        asyncio.run(apply_load(one, url, prompts, 1, seconds / 4))
        many = Load()
        memory = []
        for _ in range(4):
            asyncio.run(apply_load(many, url, prompts, clients, seconds / 4))
            memory.append(str(resident_mib(server.pid)))
    finally:
        server.kill()
    shares = f"{many.rate() / one.rate():.1f} × one client, {many.rate() / batches:.0%} of the batches"
    rows = [
        [f"batches of {BATCH} without a server", f"{batches:.0f} tokens/s", ""],
        ["one client at a time", f"{one.rate():.0f} tokens/s", one.summary()],
        [f"{clients} clients for {seconds:.0f} s", f"{many.rate():.0f} tokens/s ({shares})", many.summary()],
        ["resident memory", f"{', '.join(memory)} MiB", "after each quarter of these"],
    ]
    details = (f"preset {PRESET}, model {model_id(None)}",)
    write_page(RESULTS / "serving.md", "python benchmarks/serving.py", details, ["", "", ""], rows)


def rate_without_server(prompts: list[str]) -> float:
    """Tokens a second of full batches, in this process."""
    coder = DiffuCoder.load()
    params = DecodingParams(preset=PRESET)
    coder.generate_batch(prompts[:BATCH], params)
    began = time.perf_counter()
    tokens = 0
    for start in range(0, 8 * BATCH, BATCH):
        results = coder.generate_batch(prompts[start : start + BATCH], params)
        tokens += sum([len(result.tokens) for result in results])
    return tokens / (time.perf_counter() - began)


def start_server() -> tuple[str, subprocess.Popen]:
    """A server's address and process."""
    options = ["--port", "0", "--set", f"preset={PRESET}", "--limit", f"max_batch={BATCH}"]
    command = [sys.executable, "-m", "diffucoder.cli", "serve", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        address = re.search(r"listening on (http://\S+),", line)
        if address:
            return address[1], process
    raise SystemExit("the server did not start")


async def apply_load(load: Load, url: str, prompts: list[str], clients: int, seconds: float) -> None:
    """So many clients send one request after the other, for so long; `load` counts what they see."""
    began = time.monotonic()

    async def client(number: int, http: httpx.AsyncClient) -> None:
        draw = random.Random(number)
        while time.monotonic() - began < seconds:
            sent = time.monotonic()
            body = {"messages": [{"role": "user", "content": draw.choice(prompts)}], "max_tokens": 64}
            answer = await http.post(f"{url}/v1/chat/completions", json=body, timeout=120)
            load.statuses[answer.status_code] += 1
            if answer.status_code == 200:
                load.latencies.append(time.monotonic() - sent)
                load.tokens += answer.json()["usage"]["completion_tokens"]
            else:
                await asyncio.sleep(min(1.0, float(answer.headers.get("retry-after", 1))))

    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=clients)) as http:
        await asyncio.gather(*[client(number, http) for number in range(clients)])
    load.seconds += time.monotonic() - began


def resident_mib(process: int) -> int:
    """The memory of a process."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) // 1024


if __name__ == "__main__":
    typer.run(main)
