"""What runs in the sandbox as the program, to question a program: what does this call give, does this test pass?

For: `grade`, which sends this file's source as the job, with the questions on stdin.

It forks a child that runs the program, as a module (not as `__main__`, so what a script does when started stays out of
the way), and then answers in the same namespace. Two kinds of question:

    value   evaluate an expression, tell what it gives as plain data. The right answer is not here: the host compares.
    run     execute a test's statements. A pass must be earned: the child hands over a secret, new for every test, after
            the test ran to its end. Neither exit codes nor printed text nor exit handlers can pass for that.

A question that outruns its time, or ends its child, is lost; the next ones are put to a new child. Answers go to
stdout, which the children do not have, and they can neither trace this process nor open its memory or its pipes.
"""

from __future__ import annotations

import hashlib
import json
import marshal
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Iterator, KeysView, Sequence
from contextlib import contextmanager, suppress
from types import CodeType
from typing import Any, NoReturn, Union

BLOCK = 1 << 16
LARGE = 20_000_000
GLANCE = 0.05  # seconds; most answers are there by then
PATIENCE = 5  # times the seconds of a processor may pass on the clock
PR_SET_DUMPABLE = 4
TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds; how exactly a processor's are counted
# An error's own, whatever its class makes of the names.
ARGUMENTS, TRACE = vars(BaseException)["args"].__get__, vars(BaseException)["__traceback__"].__get__
NAME = vars(type)["__name__"].__get__

Code = Union[CodeType, bytes]  # compiled, or why not (JSON of [line, message])  # noqa: UP007  # for Python 3.9
Question = tuple[str, Code, tuple[Any, ...], float]  # kind, code, arguments, seconds
Answer = tuple[str, float, bytes]  # status, seconds, JSON


def main() -> None:
    """Read the job, write a line `[index, status, seconds, value or [line of the program, message]]` a question."""
    shut()
    seconds, clock, room, fresh, stop, source, questions = marshal.loads(sys.stdin.buffer.read())
    with bounded(seconds):  # this process compiles, and some sources take longer than anything
        program = compiled(source, "<program>", "exec")
        questions = [
            (kind, compiled(text, "<test>", "eval" if kind == "value" else "exec"), arguments, limit)
            for kind, text, arguments, limit in questions
        ]
    deadline = time.monotonic() + clock
    if fresh:
        one_by_one(program, questions, seconds, deadline, room)
    else:
        in_a_row(program, questions, seconds, deadline, room, stop)


def shut() -> None:
    """Close this process's files in /proc to processes of the same user, and those of the children to each other."""
    with suppress(ImportError, OSError, AttributeError):  # there is no prctl outside Linux
        import ctypes  # late: where there is isolation it is loaded already

        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


# In both of these `seconds` are a processor's, for all questions together: what waits on a busy machine is not slow.


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """In here this process may take as long as a program; more ends it."""
    before, most = resource.getrlimit(resource.RLIMIT_CPU)
    enough = int(seconds + time.process_time()) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (enough if most == resource.RLIM_INFINITY else min(enough, most), most))
    yield
    resource.setrlimit(resource.RLIMIT_CPU, (before, most))


def one_by_one(program: Code, questions: list[Question], seconds: float, deadline: float, room: int) -> None:
    """A child a question. One that outran its share of the time gets a second try with what the others left."""
    waiting: Sequence[int] = range(len(questions))
    for again in (False, True):
        slow = []
        for position, index in enumerate(waiting):
            count = len(waiting) - position
            share, until = seconds / count, time.monotonic() + (deadline - time.monotonic()) / count
            child = Child(program, [questions[index]], room)
            answer = child.begin(share, until) or child.answer(share - child.used(), until)
            child.close()
            seconds -= child.spent
            if answer[0] == "timeout" and not again:
                slow.append(index)
            else:
                tell(index, *answer)
        waiting = slow


def in_a_row(program: Code, questions: list[Question], seconds: float, deadline: float, room: int, stop: bool) -> None:
    """As few children as there are losses. With `stop`, the first question without a value is the last one."""
    index = 0
    while index < len(questions):
        child = Child(program, questions[index:], room)
        broken = child.begin(seconds, deadline)
        used = child.used()
        while index < len(questions) and (broken or not child.lost):
            answer = broken or child.answer(min(questions[index][3], seconds - used), deadline)
            tell(index, *answer)
            index += 1
            if stop and answer[0] != "ok":
                index = len(questions)
            if answer[1] > GLANCE:
                used = child.used()
        child.close()
        seconds -= child.spent


def tell(index: int, status: str, seconds: float, answer: bytes) -> None:
    write(1, b'[%d, "%s", %.6f, %s]\n' % (index, status.encode(), seconds, answer))


class Child:
    """A process that runs the program and then answers questions."""

    def __init__(self, program: Code, questions: list[Question], room: int) -> None:
        self.program, self.room, self.earned = program, room, questions[0][0] == "run"
        self.buffer, self.lost, self.process, self.begun = bytearray(), False, 0, time.monotonic()
        self.code: int | None = None
        self.spent = 0.0  # seconds of a processor, once it has ended
        if isinstance(program, bytes):  # it did not compile
            return
        self.secret = os.urandom(16).hex().encode()
        self.reader, writer = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            os.setpgid(0, 0)
            os.close(self.reader)
            secret = [self.secret]
            del self.secret
            reply(program, questions, writer, secret)
        os.close(writer)

    def begin(self, seconds: float, until: float) -> Answer | None:
        """None once the program itself has run; else the answer to every question."""
        if isinstance(self.program, bytes):
            return "failed", 0.0, self.program
        line, why, spent = self.patiently(seconds, until)
        return None if line == b"ready" else self.failure(line, why, spent)

    def answer(self, seconds: float, until: float) -> Answer:
        """(status, seconds, JSON) of the next question; afterwards `lost` tells whether more can be asked."""
        line, why, spent = self.patiently(seconds, until)
        if line[:1] == b"=" and not self.earned:
            return "ok", spent, line[1:]
        if self.earned and line == b"!" + self.secret:
            return "ok", spent, b"true"
        return self.failure(line, why, spent)

    def patiently(self, seconds: float, until: float) -> tuple[bytes, tuple[str, str], float]:
        """The next line, or why there is none, and the seconds that took: `seconds` of a processor at most.

        A child that got no processor for its seconds is given longer, up to PATIENCE times, but not past `until`.
        """
        began = time.monotonic()
        line, why = self.line(min(until, began + min(seconds, GLANCE)))
        if not line and why[0] == "timeout":
            end = min(until, began + PATIENCE * seconds)
            allowed = self.used() + seconds
            while not line and why[0] == "timeout":
                now = time.monotonic()
                left = min(end - now, allowed - self.used())
                if left <= 0:
                    break
                line, why = self.line(now + max(left, TICK))
        return line, why, time.monotonic() - began

    def failure(self, line: bytes, why: tuple[str, str], spent: float) -> Answer:
        if line[:1] == b"-":
            return "failed", spent, line[1:]
        self.lost = True
        return why[0], spent, message(why[1])

    def used(self) -> float:
        """Seconds of a processor the child has had."""
        if self.code is not None or not self.process:
            return self.spent
        try:
            with open(f"/proc/{self.process}/stat") as file:
                return sum(map(int, file.read().rpartition(")")[2].split()[11:13])) * TICK
        except (OSError, ValueError):  # no /proc here
            return time.monotonic() - self.begun

    def line(self, deadline: float) -> tuple[bytes, tuple[str, str]]:
        """The next line, or b"" and why there is none: (status, message)."""
        end, seen = -1, 0
        while (end := self.buffer.find(b"\n", seen)) < 0:
            seen = len(self.buffer)
            left = deadline - time.monotonic()
            if left <= 0:
                return b"", ("timeout", "seconds: no time left")
            if len(self.buffer) > self.room:
                return b"", ("killed", f"output: gave more than {self.room} bytes")
            # what the program started may hold the pipe open longer than the child lives: so look at both
            if self.code is None:
                self.ended(*os.wait4(self.process, os.WNOHANG))
            ready = select.select([self.reader], [], [], 0 if self.code is not None else min(left, 0.02))[0]
            chunk = os.read(self.reader, BLOCK) if ready else b""
            if not chunk and (ready or self.code is not None):
                return b"", self.ending()
            self.buffer += chunk
        line = bytes(self.buffer[:end])
        del self.buffer[: end + 1]
        return line, ("failed", "wrote what it should not")

    def ending(self) -> tuple[str, str]:
        if self.code is None:
            self.reap()
        code = self.code or 0
        if code < 0:
            return "killed", "signal: " + (signal.strsignal(-code) or str(-code))
        return "failed", "ended before its test did"

    def reap(self) -> None:
        """Kill the child, and what it started if that stayed in its group."""
        for kill in (os.killpg, os.kill):
            with suppress(ProcessLookupError):
                kill(self.process, signal.SIGKILL)
        self.ended(*os.wait4(self.process, 0))

    def ended(self, process: int, status: int, usage: resource.struct_rusage) -> None:
        if process:
            self.code, self.spent = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime

    def close(self) -> None:
        if self.process:
            os.close(self.reader)
            if self.code is None:
                self.reap()


# --- in the child ----------------------------------------------------------------------------------------------------


class Report:
    """A child's word to its harness. It lives on the stack of a `with` statement, which no variable gives access to."""

    __slots__ = ("pipe", "secret")

    def __init__(self, pipe: int, secret: bytes) -> None:
        self.pipe, self.secret = pipe, secret

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any, write: Any = os.write, leave: Any = os._exit) -> None:
        # bound in the head, for programs may patch os
        write(self.pipe, b"!" + self.secret + b"\n" if kind is None else b"-" + described(error) + b"\n")
        leave(0)


def reply(program: CodeType, questions: list[Question], pipe: int, secret: list[bytes]) -> NoReturn:
    """Run the program in a new module, answer, never return."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)
    module = sys.modules["program"] = type(sys)("program")
    if questions[0][0] == "run":
        attempt(program, questions[0][1], pipe, secret, module.__dict__)
    del secret[:]
    try:
        exec(program, module.__dict__)
        write(pipe, b"ready\n")
    except BaseException as error:
        write(pipe, b"-" + described(error) + b"\n")
        os._exit(0)
    for _, code, arguments, _ in questions:
        write(pipe, value(code, arguments, module.__dict__) + b"\n")
    os._exit(0)


def attempt(
    program: CodeType, test: Code, pipe: int, secret: list[bytes], names: dict[str, Any], run: Any = exec
) -> None:
    # bound in the head, for programs may patch the built-ins
    if isinstance(test, bytes):  # it did not compile
        write(pipe, b"-" + test + b"\n")
        os._exit(0)
    write(pipe, b"ready\n")
    with Report(pipe, secret.pop()):
        run(program, names)
        run(test, names)


def value(code: Code, arguments: tuple[Any, ...], names: dict[str, Any]) -> bytes:
    if isinstance(code, bytes):
        return b"-" + code
    try:
        return b"=" + json.dumps(plain(bulky(eval(code, names, {"_": arguments})))).encode()
    except BaseException as error:
        return b"-" + described(error)


class Digest:
    """Stands for a list too large to carry; equal to that of an equal list. There is no tolerance then."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Digest) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return f"<a large list, sha256 {self.text}>"


def bulky(thing: Any) -> Any:
    """The digest of a list of lists with more than LARGE cells; else the thing itself."""
    if not isinstance(thing, (list, tuple)) or not thing or not isinstance(thing[0], (list, tuple, str)):
        return thing
    if len(thing) * len(thing[0]) <= LARGE:
        return thing
    digest = hashlib.sha256(type(thing).__name__.encode())
    for each in thing:
        digest.update(marshal.dumps(each, 2))  # the version in which equal data has equal bytes
    return Digest(digest.hexdigest())


def plain(thing: Any) -> Any:
    """What JSON can say: null, booleans, strings, floats, small integers and lists as they are, the rest by a tag.

    Of a subclass only the data counts, not what it says it equals. What is no data at all is told by its type's name.
    """
    if thing is None or thing is True or thing is False or isinstance(thing, (str, float)):
        return thing
    if isinstance(thing, int):
        thing = int.__index__(thing)
        return thing if abs(thing) < 1 << 63 else {"int": hex(thing)}
    if isinstance(thing, list):
        return [plain(each) for each in thing]
    kind: Any
    for kind in (tuple, set, frozenset):
        if isinstance(thing, kind):
            return {kind.__name__: [plain(each) for each in thing]}
    if isinstance(thing, dict):
        return {"dict": [[plain(key), plain(each)] for key, each in thing.items()]}
    if isinstance(thing, (bytes, bytearray)):
        return {"bytes": bytes(thing).hex()}
    if isinstance(thing, complex):
        return {"complex": [thing.real, thing.imag]}
    if isinstance(thing, KeysView):  # equals a set
        return {"set": [plain(each) for each in thing]}
    if isinstance(thing, Digest):
        return {"digest": thing.text}
    if type(thing).__module__ == "numpy" and not getattr(thing, "shape", True):
        return plain(thing.item())
    try:
        return {"ratio": [hex(part) for part in thing.as_integer_ratio()]}  # Fraction, Decimal
    except (AttributeError, TypeError, ValueError, OverflowError):
        return {"object": [type(thing).__name__, length(thing)]}


def length(thing: Any) -> int | None:
    try:
        return len(thing)
    except Exception:  # of a class of the program's, perhaps
        return None


def described(error: BaseException) -> bytes:
    """JSON [line of the program or 0, message]."""
    # No code of the program's may run while a Report's frame is open, so no str(error) and no error.args.
    arguments = ARGUMENTS(error)
    if issubclass(type(error), OSError) and len(arguments) > 1 and type(arguments[1]) is str:
        arguments = arguments[1:]  # the first is a number
    first = arguments[0] if arguments else None
    simple = type(first) in (str, float) or (type(first) is int and abs(first) < 1 << 64)  # longer ones have no str
    line, trace = 0, TRACE(error)
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<program>":
            line = trace.tb_lineno
        trace = trace.tb_next
    if type(error) is SyntaxError:
        line = error.lineno or 0
    return message(NAME(type(error)) + (": " + str(first) if simple else ""), line)


def message(text: str, line: int = 0) -> bytes:
    return json.dumps([line, text[:300]]).encode()


def compiled(source: str, name: str, mode: str) -> Code:
    try:
        return compile(source, name, mode, dont_inherit=True)
    except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        return described(error)


def write(pipe: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(pipe, left) :]


if __name__ == "__main__":
    main()
