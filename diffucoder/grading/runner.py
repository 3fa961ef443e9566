"""What runs in the sandbox to question a program: what does this call return, does this test pass?

`grade` runs this file in the sandbox, with a job on stdin. It uses only the standard library of Python 3.9 and later.
Kinds of jobs:

    value   evaluate expressions and report their values as JSON; what is expected is not in the sandbox
    test    run tests beside the program, statements each; a pass is reported with a token (`run_test`)

The runner forks a child. The child runs the program as a module (not as `__main__`: what a script does when it is
started is left out) and answers in the same namespace. A question that takes too long or ends its child has failed; a
new child gets the next ones. Children can neither trace the runner nor open its memory or its pipes.
"""

from __future__ import annotations

import hashlib
import json
import marshal
import os
import select
import signal
import sys
import time
from collections.abc import Iterator, KeysView
from contextlib import suppress
from types import CodeType
from typing import Any, NamedTuple, NoReturn

PATIENCE = 5  # a question may take so many times its processor seconds on the clock
POLL = 0.02  # seconds between two looks at a silent child
DIGEST_CELLS = 20_000_000  # a list of lists with more items is reported by its digest

Question = tuple[str, tuple[Any, ...], float]  # source, arguments (an expression knows them as `_`), processor seconds


class Answer(NamedTuple):
    status: str  # "ok", "failed", "timeout" or "killed"
    seconds: float  # on the clock
    content: bytes  # JSON: the value, or a message


def main() -> None:
    """Read the job, put its questions to children, write a line `[index, status, seconds, content]` for every answer.

    All questions together may take `seconds` of the processor and `clock` on the clock. In a `fresh` job every question
    has a child of its own and an equal share of the time. One that takes longer gets a second try, with the time that
    the others left. In other jobs a child answers as many questions as it lives for.
    """
    job = marshal.loads(sys.stdin.buffer.read())
    deadline = time.monotonic() + job["clock"]
    waiting = list(range(len(job["questions"])))
    slow: list[int] = []
    last_try = not job["fresh"]
    while waiting:
        children = len(waiting) if job["fresh"] else 1
        batch = waiting[: len(waiting) // children]
        used = os.times()
        seconds = (job["seconds"] - used.children_user - used.children_system) / children
        child = Child(job, [job["questions"][index] for index in batch])
        now = time.monotonic()
        for answer in child.answers(seconds, now + (deadline - now) / children):
            index = waiting.pop(0)
            if answer.status == "timeout" and not last_try:
                slow.append(index)
                continue
            head = f'[{index}, "{answer.status}", {answer.seconds:.6f}, '
            write(1, head.encode(), answer.content, b"]")
            if job["stop_at_failure"] and answer.status != "ok":
                waiting.clear()
                break
        os.close(child.pipe)
        child.kill()
        if not waiting and not last_try:
            waiting = slow
            last_try = True


class Child:
    """A process that runs the program and then answers questions, as the runner sees it."""

    def __init__(self, job: dict[str, Any], questions: list[Question]) -> None:
        self.questions = questions
        self.max_output = job["output"]  # bytes of an answer
        self.received = bytearray()
        self.lost: tuple[str, str] | None = None  # status and message, once no more answers will come
        self.exit_code: int | None = None
        self.begin = time.monotonic()
        self.pipe, child_pipe = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            os.setpgid(0, 0)
            os.close(self.pipe)
            run_child(job, questions, child_pipe)
        os.close(child_pipe)

    def answers(self, seconds: float, until: float) -> Iterator[Answer]:
        """Answers to the questions in order, until the child is lost. A program that fails has failed all of them."""
        ready = self.receive(b"ready", seconds, until)
        if ready.status != "ok":
            yield from [ready] * len(self.questions)
            return
        token = ready.content  # empty unless the question is a test
        for _, _, limit in self.questions:
            left = seconds - self.processor_seconds()
            yield self.receive(b"=" + token, min(limit, left), until)
            if self.lost:
                return

    def receive(self, prefix: bytes, seconds: float, until: float) -> Answer:
        """The answer in the next line. It begins with `prefix`, or with b"-" for a failure."""
        begin = time.monotonic()
        line = self.read_line(seconds, until)
        spent = time.monotonic() - begin
        if line.startswith(prefix):
            return Answer("ok", spent, line[len(prefix) :])
        if line.startswith(b"-"):
            return Answer("failed", spent, line[1:])
        self.lost = self.lost or ("failed", "wrote what it should not")
        return Answer(self.lost[0], spent, message(self.lost[1]))

    def read_line(self, seconds: float, until: float) -> bytes:
        """The next line, which may take so many seconds of the processor; b"" if the child is lost.

        A child that waits for a processor gets longer: PATIENCE times the seconds, but not past `until`.
        """
        end = min(until, time.monotonic() + PATIENCE * seconds)
        processor_end = 0.0  # set after the first look, so that no answer is charged for a pause of the whole machine
        searched = 0
        while (length := self.received.find(b"\n", searched)) < 0:
            searched = len(self.received)
            # a process that the program started may hold the pipe open for longer than the child lives
            ended = self.has_ended()
            late = time.monotonic() >= end
            ready = select.select([self.pipe], [], [], 0.0 if ended or late else POLL)[0]
            chunk = b""
            if ready:
                chunk = os.read(self.pipe, 1 << 16)
                self.received += chunk
            if searched > self.max_output:
                self.lost = ("killed", f"output: gave more than {self.max_output} bytes")
            elif not chunk and (ready or ended):
                self.lost = self.ending()
            elif late or (processor_end and self.processor_seconds() >= processor_end):
                self.lost = ("timeout", "seconds: no time left")
            if self.lost:
                return b""
            processor_end = processor_end or self.processor_seconds() + seconds
        line = bytes(self.received[:length])
        del self.received[: length + 1]
        return line

    def ending(self) -> tuple[str, str]:
        self.kill()
        if self.exit_code is not None and self.exit_code < 0:
            return "killed", f"signal: {signal.strsignal(-self.exit_code) or -self.exit_code}"
        return "failed", "ended before its test did"

    def processor_seconds(self) -> float:
        """What the child has used of the processor."""
        try:
            return time.clock_gettime(~self.process << 3 | 2)  # the number of the clock as in clock_getcpuclockid(3)
        except OSError:  # the child is gone, or this is not Linux
            return time.monotonic() - self.begin

    def has_ended(self, options: int = os.WNOHANG) -> bool:
        if self.exit_code is None:
            process, status = os.waitpid(self.process, options)
            if process:
                self.exit_code = os.waitstatus_to_exitcode(status)
        return self.exit_code is not None

    def kill(self) -> None:
        """End the child, and what it started if that is still in its process group."""
        if self.exit_code is None:
            for kill in (os.killpg, os.kill):
                with suppress(ProcessLookupError):
                    kill(self.process, signal.SIGKILL)
            self.has_ended(0)


# --- in the child ----------------------------------------------------------------------------------------------------

exit_now = os._exit  # a program may replace the functions of `os`
write_some = os.write


def run_child(job: dict[str, Any], questions: list[Question], pipe: int) -> NoReturn:
    """Run the program in a new module and answer the questions on the pipe."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)
    module = sys.modules["program"] = type(sys)("program")
    try:
        program = compile(job["program"], "<program>", "exec", dont_inherit=True)
        if job["kind"] == "test":
            run_test(program, questions[0][0], vars(module), pipe)
        else:
            answer_values(program, questions, vars(module), pipe)
    except BaseException as error:
        write(pipe, b"-" + describe(error))
    finally:
        exit_now(0)


def run_test(program: CodeType, source: str, names: dict[str, Any], pipe: int) -> None:
    """Run the program and the test, and report a pass. Only code that ran to its end knows the token of a pass.

    Arguments are evaluated from left to right. So while the program runs, the token is an argument of a call that waits
    for its last one: no variable holds it, and a program that goes up the stack does not find it.
    """
    test = compile(source, "<test>", "exec", dont_inherit=True)
    write(pipe, b"=", send_token(pipe), run_both(program, test, names))


def send_token(pipe: int) -> bytes:
    """Send the runner a new token, and return it."""
    token = os.urandom(16).hex().encode()
    write(pipe, b"ready" + token)
    return token


def run_both(program: CodeType, test: CodeType, names: dict[str, Any]) -> bytes:
    run = exec  # looked up before the program can replace it
    run(program, names)
    run(test, names)
    return b"true"


def answer_values(program: CodeType, questions: list[Question], names: dict[str, Any], pipe: int) -> None:
    """Run the program, then evaluate one expression after the other."""
    exec(program, names)
    write(pipe, b"ready")
    for source, arguments, _ in questions:
        try:
            value = eval(compile(source, "<test>", "eval", dont_inherit=True), names, {"_": arguments})
            line = b"=" + json.dumps(digest_if_large(value) or to_json(value)).encode()
        except BaseException as error:
            line = b"-" + describe(error)
        write(pipe, line)


def digest_if_large(value: Any) -> dict[str, str] | None:
    """In place of a list of lists that is too large to send: a digest, which equal lists share."""
    if not isinstance(value, (list, tuple)) or not value or not isinstance(value[0], (list, tuple, str)):
        return None
    if len(value) * len(value[0]) <= DIGEST_CELLS:
        return None
    digest = hashlib.sha256(type(value).__name__.encode())
    for row in value:
        digest.update(marshal.dumps(row, 2))  # in this version of the format, equal data has equal bytes
    return {"digest": digest.hexdigest()}


def to_json(value: Any) -> Any:
    """A value as JSON: None, bools, strings, floats, small integers and lists as they are, anything else by a tag.

    Of an instance of a subclass only the data is sent. A value that is not plain data becomes the name of its type.
    """
    if value is None or isinstance(value, (bool, str, float)):
        return value
    if isinstance(value, int):
        value = int.__index__(value)
        return value if abs(value) < 1 << 63 else {"int": hex(value)}
    if isinstance(value, list):
        return list(map(to_json, value))
    kind: Any
    for kind in (tuple, frozenset, set, KeysView):  # the last equals a set
        if isinstance(value, kind):
            return {"set" if kind is KeysView else kind.__name__: list(map(to_json, value))}
    if isinstance(value, dict):
        return {"dict": [[to_json(key), to_json(item)] for key, item in value.items()]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        item = value.item()
        if type(item) is not type(value):  # it is for a longdouble
            return to_json(item)
    try:
        return {"ratio": list(map(hex, value.as_integer_ratio()))}  # Fraction, Decimal
    except (AttributeError, TypeError, ValueError, OverflowError):
        return {"object": [type(value).__name__, length_of(value)]}


def length_of(value: Any) -> int | None:
    try:
        return len(value)
    except Exception:  # the class may be one of the program's
        return None


def describe(error: BaseException) -> bytes:
    """The type of an error as JSON, and its first argument if that is simple."""
    arguments = error.args
    if isinstance(error, OSError) and len(arguments) > 1 and isinstance(arguments[1], str):
        arguments = arguments[1:]  # the first is a number
    text = type(error).__name__
    for argument in arguments[:1]:
        if type(argument) in (str, float) or (type(argument) is int and abs(argument) < 1 << 64):
            text += f": {argument}"
    return message(text)


def message(text: str) -> bytes:
    return json.dumps(text[:300]).encode()


def write(pipe: int, *parts: bytes) -> None:
    """Write a line."""
    unsent = memoryview(b"".join(parts) + b"\n")
    while unsent:
        unsent = unsent[write_some(pipe, unsent) :]


if __name__ == "__main__":
    main()
