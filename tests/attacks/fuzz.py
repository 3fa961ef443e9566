"""Send hostile requests to the server and hostile files to the loaders, and report what breaks.

    make fuzz                                    5,000 sets of files, 20,000 requests
    python tests/attacks/fuzz.py --minutes 5     as many of both as fit
    python tests/attacks/fuzz.py --repeat FILE   an example again that failed

Inputs come from `strategies` and `hostile_files`; the same seed gives the same inputs. They are read in child processes
(`targets`), each call with at most 10 s of a processor, 100 s of the clock and 5 GiB of address space. An example fails
with a traceback, a status of 5xx, a call over its limits, or a request to another machine. It is then written to
`runs/fuzz`, and the exit code is 1. Once it is fixed, keep its smallest form in `found.jsonl`, which tests repeat.
"""

import argparse
import json
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).parent
ROOMS = (HERE, HERE.parents[1], HERE.parents[1] / "tools", HERE.parent / "models", HERE.parent / "serving")
sys.path[:0] = map(str, ROOMS)  # children get it too

import hostile_files
import layout
import strategies
import targets
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from soak import serving

from diffucoder.limited import Limited, LimitError

Example = dict[str, Any]

SECONDS = 10  # of a processor for one call: one set of files, or one batch of requests
MEMORY = 5 << 30  # bytes of address space of a child, of which torch takes most
TOGETHER = 32  # requests of a batch
CHUNK = 400  # examples that are made together
LARGE = 20  # one in so many sets of files is slow: a run folder or a GGUF
ON_WIRE = 50  # one request in so many is sent to a server process, as bytes


def draw(strategy: SearchStrategy[Example], count: int, number: int) -> list[Example]:
    """`count` examples of a strategy, fixed by the seed `number`."""
    examples: list[Example] = []

    @seed(number)
    @settings(
        max_examples=count, phases=[Phase.generate], database=None, deadline=None, suppress_health_check=HealthCheck
    )
    @given(strategy)
    def keep(example: Example) -> None:
        examples.append(example)

    keep()
    return examples


@dataclass
class Report:
    """What has happened until now."""

    folder: Path
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)  # by their first line
    memory: int = 0  # MiB, the most of any child
    began: float = field(default_factory=time.monotonic)

    def fails(self, example: Example, fault: str) -> None:
        """Keep a failing example, and print where."""
        kind = (fault.strip().splitlines() or [""])[-1][:160]
        self.faults[kind] += 1
        if self.faults[kind] > 3:  # more of the same
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{len(list(self.folder.iterdir())):04d}.json"
        path.write_text(json.dumps({"fault": fault, **example}) + "\n")
        print(f"FAILED {path}: {kind}", flush=True)

    def progress(self, what: str, done: int) -> None:
        """Print a line."""
        print(
            f"{time.monotonic() - self.began:6.0f} s  {done:6,} {what}, {sum(self.faults.values())} failed", flush=True
        )

    def end(self) -> bool:
        """Print the counts. Whether nothing failed."""
        for outcome, count in sorted(self.outcomes.items()):
            print(f"{count:7,}  {outcome}")
        print(f"{self.memory:7,}  MiB of memory at most in a child")
        for kind, count in self.faults.most_common():
            print(f"{count:7,}  FAILED {kind}")
        return not self.faults


# --- files -----------------------------------------------------------------------------------------------------------


def files(number: int) -> Iterator[list[Example]]:
    """Chunks of sets of files without end."""
    while True:
        large = draw(hostile_files.large_files, CHUNK // LARGE, number)
        yield large + draw(hostile_files.small_files, CHUNK - len(large), number)
        number += 1


class Children:
    """Child processes, warmed up: they have imported what they need, so that a call's limits are its own."""

    def __init__(self, warm_up: Callable[[Limited], object], count: int, seconds: float = SECONDS) -> None:
        """Start `count` of them; a call may take so many seconds."""
        self.warm_up = warm_up
        self.room = TemporaryDirectory(prefix="fuzz-")
        os.environ[layout.ROOM] = self.room.name
        self.free: SimpleQueue[Limited] = SimpleQueue()
        for _ in range(count):
            child = Limited(seconds=seconds, memory=MEMORY)
            warm_up(child)
            self.free.put(child)

    def call(self, function: Callable[[Any], Any], argument: Any) -> Any:
        """Call a function in one of them. Raises LimitError."""
        child = self.free.get()
        try:
            return child(function, argument)
        except LimitError:
            self.warm_up(child)  # it starts again
            raise
        finally:
            self.free.put(child)

    def close(self) -> None:
        """End them."""
        while not self.free.empty():
            self.free.get().close()
        self.room.cleanup()


def read_honest_files(child: Limited) -> None:
    """Let a child read the honest files of the slow targets."""
    for target in ("model", "traces", "chats"):
        child(targets.read_files, {"target": target, "files": {}})


def read_files(example: Example, children: Children, report: Report) -> None:
    """Let a child read an example."""
    try:
        answer = children.call(targets.read_files, example)
    except LimitError as error:
        answer = {"outcome": "broken", "fault": f"{example['target']}: {error}", "memory": 0}
    report.memory = max(report.memory, answer["memory"])
    report.outcomes[f"{example['target']}: {answer['outcome']}"] += 1
    if answer["fault"]:
        report.fails(example, answer["fault"])


# --- requests --------------------------------------------------------------------------------------------------------


def requests(number: int) -> Iterator[list[Example]]:
    """Chunks of requests without end."""
    while True:
        yield draw(strategies.requests(), CHUNK, number)
        number += 1


def answer_honest_requests(child: Limited) -> None:
    """Let a child load the model, and decode with each cache."""
    for cache in ("none", "prefix", "delayed"):
        body = json.dumps({"prompt": "def f(x):\n", "decoding": {"cache": cache, "block": 4, "steps": 2}})
        request = {"method": "POST", "path": "/v1/completions", "headers": {}, "body": body}
        child(targets.answer_requests, [request])


def send_requests(batch: list[Example], children: Children, report: Report) -> None:
    """Let a child answer a batch. What breaks the batch as a whole is looked for by sending each request alone."""
    try:
        answer = children.call(targets.answer_requests, batch)
    except LimitError as error:
        answer = {"answers": [], "faults": [f"requests: {error}"], "memory": 0}
    report.memory = max(report.memory, answer["memory"])
    if answer["faults"] and len(batch) > 1:
        before = sum(report.faults.values())
        for request in batch:
            send_requests([request], children, report)
        if sum(report.faults.values()) == before:
            report.fails({"requests": batch}, answer["faults"][0])
        return
    for request, (status, fault) in zip(batch, answer["answers"], strict=False):
        report.outcomes[f"status {status}"] += 1
        if fault:
            report.fails({"requests": [request]}, fault)
    for fault in answer["faults"]:
        report.fails({"requests": batch}, fault)


def on_the_wire(count: int, number: int, report: Report) -> None:
    """Send bytes to a server process: whole requests, and what is hardly HTTP. It must go on answering."""
    messages = draw(
        st.builds(
            lambda content: {"bytes": content}, strategies.connections | st.builds(_as_bytes, strategies.requests())
        ),
        count,
        number,
    )
    with serving("--dtype", "float32", "--set", "new_tokens=4", "--limit", "deadline=5") as server:
        for done, message in enumerate(messages, start=1):
            began = time.monotonic()
            answer = _exchange(server.address, message["bytes"].encode("latin-1"))
            status = answer[9:12].decode("latin-1") if answer.startswith(b"HTTP/") else "closed"
            report.outcomes[f"on the wire: {status}"] += 1
            if status.startswith("5"):
                report.fails(message, f"on the wire: {answer[-300:]!r}")
            if time.monotonic() - began > 10 * SECONDS:
                report.fails(message, "on the wire: no answer")
            if "Traceback" in server.printed() or server.process.poll() is not None:
                report.fails(message, f"the server's log: {server.printed()[-3000:]}")
                return
            if done % 200 == 0:
                report.progress("messages on the wire", done)
        if not _exchange(
            server.address, b"GET /ready HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
        ).startswith(b"HTTP/1.1 200"):
            report.fails(messages[-1], "the server is not ready any more")


def _as_bytes(request: Example) -> str:
    head = f"{request['method']} {request['path']} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    for name, value in request["headers"].items():
        head += f"{name}: {value}\r\n"
    return f"{head}Content-Length: {len(request['body'])}\r\n\r\n{request['body']}"


def _exchange(address: tuple[str, int], message: bytes) -> bytes:
    """Send bytes, say that there are no more, and read to the end."""
    answer = b""
    try:
        with socket.create_connection(address, timeout=11 * SECONDS) as connection:
            connection.sendall(message)
            connection.shutdown(socket.SHUT_WR)
            while received := connection.recv(65536):
                answer += received
    except OSError:  # it may be closed at any time
        pass
    return answer


# --- all of it -------------------------------------------------------------------------------------------------------


def run_until(
    chunks: Iterator[list[Example]],
    work: Callable[[list[Example]], None],
    done: Callable[[int], bool],
    *,
    together: int,
    processes: int,
) -> None:
    """Call `work` for the examples of chunks, so many together, on several threads, until `done` of their number."""
    count = 0
    with ThreadPoolExecutor(processes) as threads:
        while not done(count):
            chunk = next(chunks)
            groups = [chunk[start : start + together] for start in range(0, len(chunk), together)]
            list(threads.map(work, groups))
            count += len(chunk)


def fuzz_files(
    report: Report, number: int, done: Callable[[int], bool], *, processes: int = 1, seconds: float = SECONDS
) -> None:
    """Read hostile sets of files until `done` of their number."""
    children = Children(read_honest_files, processes, seconds)

    def read(group: list[Example]) -> None:
        for example in group:
            read_files(example, children, report)

    run_until(files(number), read, done, together=8, processes=processes)
    children.close()


def fuzz_requests(
    report: Report, number: int, done: Callable[[int], bool], *, processes: int = 1, seconds: float = SECONDS
) -> None:
    """Send hostile requests to the application until `done` of their number."""
    children = Children(answer_honest_requests, processes, seconds)
    run_until(
        requests(number),
        lambda batch: send_requests(batch, children, report),
        done,
        together=TOGETHER,
        processes=processes,
    )
    children.close()


def repeat(path: Path, report: Report) -> None:
    """Do again what a file of `Report.fails` holds; a file of lines holds several."""
    examples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    servers = Children(answer_honest_requests, any("requests" in example for example in examples))
    readers = Children(read_honest_files, any("target" in example for example in examples))
    for example in examples:
        if "requests" in example:
            send_requests(example["requests"], servers, report)
        elif "target" in example:
            read_files(example, readers, report)
        else:
            print("bytes on a connection: send them to `diffucoder serve` with nc")
    readers.close()
    servers.close()


def main() -> int:
    """Read the options, and fuzz."""
    summary, _, _ = (__doc__ or "").partition("\n")
    options = argparse.ArgumentParser(description=summary)
    options.add_argument("--files", type=int, default=5000, help="sets of files")
    options.add_argument("--requests", type=int, default=20000, help="requests")
    options.add_argument("--minutes", type=float, help="instead of the two: as many as fit")
    options.add_argument("--seed", type=int, default=0, help="fixes the inputs")
    options.add_argument("--processes", type=int, default=os.cpu_count(), help="children at a time")
    options.add_argument(
        "--seconds", type=float, default=SECONDS, help="of a processor for a call; ten times on the clock"
    )
    options.add_argument("--folder", type=Path, default=Path("runs/fuzz"), help="of the failing examples")
    options.add_argument("--repeat", type=Path, help="a file of failing examples")
    given = options.parse_args()
    report = Report(given.folder.absolute())
    if given.repeat:
        repeat(given.repeat, report)
        return 0 if report.end() else 1
    began = time.monotonic()

    def counted(what: str, wanted: int, share: float) -> Callable[[int], bool]:
        def done(count: int) -> bool:
            report.progress(what, count)
            return time.monotonic() - began > 60 * given.minutes * share if given.minutes else count >= wanted

        return done

    start = 1000 * given.seed
    limits = {"processes": given.processes, "seconds": given.seconds}
    if given.files:
        fuzz_files(report, start, counted("sets of files", given.files, 0.5), **limits)
    if given.requests:
        fuzz_requests(report, start, counted("requests", given.requests, 0.95), **limits)
    wire = int(20 * given.minutes) if given.minutes else given.requests // ON_WIRE
    if wire:
        on_the_wire(wire, start, report)
    return 0 if report.end() else 1


if __name__ == "__main__":
    sys.exit(main())
