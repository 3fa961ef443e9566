"""A server as a process of its own, and waiting that does not depend on how busy the machine is."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import httpx

PATIENCE = 300.0  # seconds for anything that only a fault or a very busy machine can hold up


@contextmanager
def serving(*options: str, **environment: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """A server's address and process; it is ended if it has not ended itself."""
    command = [sys.executable, "-m", "diffucoder.cli", "serve", "--port", "0", *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    try:
        assert process.stderr is not None
        output = ""
        for line in process.stderr:
            output += line
            if address := re.search(r"listening on (http://\S+),", line):
                yield address[1], process
                break
        else:
            raise AssertionError(f"the server did not start: {output}")
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


get = partial(httpx.get, timeout=PATIENCE)
post = partial(httpx.post, timeout=PATIENCE)


def stream(url: str, body: Any) -> AbstractContextManager[httpx.Response]:
    """A request whose answer is read as it comes."""
    return httpx.stream("POST", url, json=body, timeout=PATIENCE)


def figure(url: str, name: str) -> float:
    """One of the figures of `/metrics`."""
    match = re.search(rf"^diffucoder_{name} (\S+)$", get(f"{url}/metrics").text, re.MULTILINE)
    assert match is not None
    return float(match[1])


def wait(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds; fail after PATIENCE."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.05)
