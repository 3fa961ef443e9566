"""Calls in a separate process, which is killed if a call takes too much time or memory.

For: functions of the package that read what strangers wrote (a chat template, a generated program, a model's files).
Not for: running generated programs; `grading.sandbox` does that.

    limited = Limited(seconds=2, memory=2**30)
    tree = limited(json_of_program, text)  # raises LimitError instead of hanging, growing or crashing

Arguments and results are sent as JSON, never as pickles, so that a child cannot run code here.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

from diffucoder import errors

_SERVE = "from diffucoder.limited import _serve; _serve()"
_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before a child that did not start is tried again
_CALLS = 3  # times that a call is made whose child was killed from outside
_PATIENCE = 10  # seconds of the clock for each second of a processor: the machine may be busy


class LimitError(errors.DiffuCoderError):
    """A call went over a limit, crashed, or raised an error that is not one of the package's own."""


class Limited:
    """Calls functions of modules in child processes, which wait for the next call; as many as there are callers."""

    def __init__(self, *, seconds: float, memory: int) -> None:
        """Limit each call to `seconds` of CPU time, and each child to `memory` bytes of address space."""
        self.seconds = seconds
        self.memory = memory
        self._idle: list[subprocess.Popen[bytes]] = []
        self.close = weakref.finalize(self, _stop, self._idle)
        os.register_at_fork(after_in_child=self._idle.clear)  # they answer the parent

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:  # Any: whatever JSON can hold
        """Return `function(*args)`. Raises LimitError, and the package's own errors as the function raised them.

        If the system kills a child for lack of memory, this is not a limit: the call is made again.
        """
        name = f"{function.__module__}:{function.__qualname__}"
        call = json.dumps([name, args]).encode() + b"\n"
        for _ in range(_CALLS):
            answer, status = self._ask(call)
            if status != -signal.SIGKILL:
                break
        if status in (-signal.SIGPROF, -signal.SIGALRM):
            raise LimitError(f"took over {self.seconds:g} s")
        if status is not None:
            raise LimitError(f"crashed, or needed over {self.memory / 2**20:,.0f} MiB (status {status})")
        kind, value = json.loads(answer)
        if kind is None:
            return value
        if hasattr(errors, kind):
            raise getattr(errors, kind)(value)
        raise LimitError(f"{kind}: {value}")

    def _ask(self, call: bytes) -> tuple[bytes, int | None]:
        """Return the answer of a child to a line, and its exit status if it ended instead."""
        try:
            child = self._idle.pop()
        except IndexError:
            child = self._start()
        answer = b""
        assert child.stdin is not None
        assert child.stdout is not None
        with suppress(BrokenPipeError):
            child.stdin.write(call)
            child.stdin.flush()
            answer = child.stdout.readline()
        if answer.endswith(b"\n"):
            self._idle.append(child)
            return answer, None
        _stop([child])
        return b"", child.returncode

    def _start(self) -> subprocess.Popen[bytes]:
        """Start a child. Where the machine lacks descriptors, processes or memory, wait for them half a minute."""

        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                [sys.executable, "-P", "-c", _SERVE, str(self.seconds), str(self.memory)],  # -P: not the current folder
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )

        for pause in _PAUSES:
            with suppress(OSError):
                return start()
            time.sleep(pause)
        return start()


def _stop(children: list[subprocess.Popen[bytes]]) -> None:
    for child in children:
        child.kill()
        with suppress(BrokenPipeError), child:  # closes the pipes, which may hold a question for the dead, and waits
            pass
    children.clear()


def _serve() -> None:
    """The child: answer each line, a function and its arguments. Its clocks' signals have no handlers: they end it."""
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(ValueError, OSError):  # macOS does not limit address space
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the pipe
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a function prints must not look like an answer
    for line in sys.stdin.buffer:
        name, args = json.loads(line)
        module, _, function = name.partition(":")
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, seconds * _PATIENCE)
        answer: list[Any]
        try:
            answer = [None, getattr(import_module(module), function)(*args)]
        except MemoryError:
            os._exit(1)
        except BaseException as error:  # a panic of a library in Rust is not an Exception
            answer = [type(error).__name__, str(error)]
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
