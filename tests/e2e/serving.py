"""A server as a process of its own."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def serving(*options: str, **environment: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """A server's address and process; it is ended if it has not ended itself."""
    command = [sys.executable, "-m", "diffucoder.cli", "serve", "--port", "0", *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    try:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if found := re.search(r"listening on (http://\S+),", line):
                yield found[1], process
                break
        else:
            raise AssertionError(f"the server did not start: {said}")
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()
