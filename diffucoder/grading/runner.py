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
import math
import os
import select
import signal
import sys
import time
from collections import Counter, UserList, UserString
from collections.abc import Callable, ItemsView, Iterator, Mapping, Set
from contextlib import suppress
from decimal import Decimal
from itertools import chain
from numbers import Rational  # Fraction, and what sympy registers
from types import CodeType
from typing import Any, NamedTuple, NoReturn

POLL = 0.02  # seconds between two looks at a silent child
DEPTH = 500  # calls within calls that read an answer
DIGEST_CELLS = 20_000_000  # a list of lists with more items is reported by its digest

Question = tuple[str, tuple[Any, ...], float]  # source, arguments (an expression knows them as `_`), seconds


class Answer(NamedTuple):
    status: str  # "ok", "failed", "timeout" or "killed"
    seconds: float  # as `Child.spent` counts
    content: bytes  # JSON: the value, or a message


def schedule(process: int | str) -> list[float]:
    """Seconds in which a process ran, and in which it waited for a processor. Zeros where they are not counted."""
    try:
        with open(f"/proc/{process}/schedstat") as file:
            return [int(number) / 1e9 for number in file.read().split()[:2]]
    except OSError:
        return [0.0, 0.0]


def main() -> None:
    """Read the job, put its questions to children, write a line `[index, status, seconds, content]` for every answer.

    All questions together may take `seconds`, without those in which they wait for a processor, and `clock` with them.
    In a `fresh` job every question has a child of its own and an equal share of the time. One that takes longer gets a
    second try, with the time that the others left. In other jobs a child answers as many questions as it lives for.
    """
    job = marshal.loads(sys.stdin.buffer.read())
    # in place of this file: what a program finds at `__file__`
    with suppress(OSError), open("program.py", "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(job["program"])
    job["deadline"] = time.monotonic() + job["clock"]
    waiting = list(range(len(job["questions"])))
    if not job["fresh"]:
        while waiting:
            waiting = ask_child(job, waiting)
        return
    for try_again in (True, False):
        for share in range(len(waiting), 0, -1):
            waiting += ask_child(job, [waiting.pop(0)], share, try_again)


def ask_child(job: dict[str, Any], indexes: list[int], share: int = 1, try_again: bool = False) -> list[int]:
    """Put questions to a new child, report its answers, and return the questions that still wait for one.

    The child may use one of so many equal shares of the time that is left, and what it uses is taken from the job's
    `seconds`. With `try_again` a question that takes longer waits.
    """
    child = Child(job, [job["questions"][index] for index in indexes])
    waiting = list(indexes)
    now = time.monotonic()
    for answer in child.answers(job["seconds"] / share, now + (job["deadline"] - now) / share):
        if try_again and answer.status == "timeout":
            break
        head = f'[{waiting.pop(0)}, "{answer.status}", {answer.seconds:.6f}, '
        write(1, head.encode(), answer.content, b"]")
        if job["stop_at_failure"] and answer.status != "ok":
            waiting.clear()
            break
    os.close(child.pipe)
    job["seconds"] -= child.spent()
    child.kill()
    return waiting


class Child:
    """A process that runs the program and then answers questions, as the runner sees it."""

    def __init__(self, job: dict[str, Any], questions: list[Question]) -> None:
        self.questions = questions
        self.max_output = job["output"]  # bytes of an answer
        self.received = bytearray()
        self.lost: tuple[str, str] | None = None  # status and message, once no more answers will come
        self.exit_code: int | None = None
        self.begin = time.monotonic()
        self.asleep = 0.0
        self.used = 0.0
        self.is_counted = schedule("self")[0] > 0  # False where this is not Linux, or the kernel does not count
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
            yield self.receive(b"=" + token, min(limit, seconds - self.spent()), until)
            if self.lost:
                return

    def receive(self, prefix: bytes, seconds: float, until: float) -> Answer:
        """The answer in the next line. It begins with `prefix`, or with b"-" for a failure."""
        begin = self.spent()
        line = self.read_line(seconds, until)
        spent = self.spent() - begin
        if line.startswith(prefix):
            return Answer("ok", spent, line[len(prefix) :])
        if line.startswith(b"-"):
            return Answer("failed", spent, line[1:])
        self.lost = self.lost or ("failed", "wrote what it should not")
        return Answer(self.lost[0], spent, message(self.lost[1]))

    def read_line(self, seconds: float, until: float) -> bytes:
        """The next line, which may take so many seconds and come until then; b"" if the child is lost.

        A line that is there is in time, also where this process had to wait for a processor before it looked.
        """
        end = math.inf  # set after the first look, so that no answer is charged for a pause of the whole machine
        searched = 0
        while (length := self.received.find(b"\n", searched)) < 0:
            searched = len(self.received)
            late = time.monotonic() >= until
            self.lost = self.read_some(0.0 if late else POLL)
            if self.lost is None and b"\n" not in self.received[searched:]:
                if self.spent() >= end:
                    self.lost = ("timeout", "seconds: no time left")
                elif late:
                    self.lost = ("timeout", "clock: it waited too long for a processor")
            if self.lost:
                return b""
            end = min(end, self.spent() + seconds)
        line = bytes(self.received[:length])
        del self.received[: length + 1]
        return line

    def read_some(self, wait: float) -> tuple[str, str] | None:
        """Read what the child has written, or wait for it that long. Return status and message if no more will come."""
        # a process that the program started may hold the pipe open for longer than the child lives
        ended = self.has_ended()
        ready = select.select([self.pipe], [], [], 0.0 if ended else wait)[0]
        chunk = os.read(self.pipe, 1 << 16) if ready else b""
        if len(self.received) > self.max_output:
            return "killed", f"output: gave more than {self.max_output} bytes"
        self.received += chunk
        if chunk or not (ready or ended):
            return None
        self.kill()
        if self.exit_code is not None and self.exit_code < 0:
            return "killed", f"signal: {signal.strsignal(-self.exit_code) or -self.exit_code}"
        return "failed", "ended before its test did"

    def spent(self) -> float:
        """Seconds of the child on an idle machine: on the clock, without those in which it waited for a processor."""
        if self.exit_code is None:
            elapsed = time.monotonic() - self.begin
            if not self.is_counted:
                self.used = elapsed
                return elapsed
            with open(f"/proc/{self.process}/stat", "rb") as file:
                state = file.read().rpartition(b")")[2].split()[0]
            ran, waited = schedule(self.process)
            if state != b"R":  # of one that waits now, `waited` lacks this time
                self.asleep = max(self.asleep, elapsed - ran - waited)
            self.used = ran + self.asleep
        return self.used

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
    module.__file__ = sys.argv[0]
    try:
        program = compile(job["program"], sys.argv[0], "exec", dont_inherit=True)
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
            line = b"=" + json.dumps(digest_if_large(value) or data_of(value)).encode()
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


def data_of(value: Any) -> Any:
    """The JSON of an answer."""
    limit = sys.getrecursionlimit()  # the program may have raised it beyond what the stack can take
    sys.setrecursionlimit(DEPTH)
    try:
        return to_json(value)
    except RecursionError:
        return deep_to_json(value)
    finally:
        sys.setrecursionlimit(limit)


def deep_to_json(value: Any) -> dict[str, Any]:
    """Containers that are nested too deep for JSON, in postfix order: each after its members.

    A container that holds itself is sent there as its type and length.
    """
    parts: list[tuple[str, Any]] = []  # type and number of members, or "data" and JSON
    around: set[int] = set()  # identities of the containers whose members are being sent
    waiting: list[tuple[Any, list[tuple[str, Any]]]] = [(value, [])]  # with the parts that follow its members
    while waiting:
        part, ending = waiting.pop()
        bases = [base for base in NESTED if isinstance(part, base)]
        if ending:
            around.remove(id(part))
            parts += ending
        elif id(part) in around:
            parts.append(("data", opaque(part)))
        elif bases:
            members = list(chain.from_iterable(part.items())) if bases[0] is dict else list(part)
            ending = [(bases[0].__name__, len(members))]
            if type(part) is not bases[0]:
                ending.append(("subclass", 1))
            around.add(id(part))
            waiting += [(part, ending), *[(member, []) for member in reversed(members)]]
        else:
            try:
                parts.append(("data", to_json(part)))
            except RecursionError:
                parts.append(("data", opaque(part)))
    return {"deep": parts}


def to_json(value: Any) -> Any:
    """A value as JSON: None, bools, strings, floats, small integers and lists as they are, anything else by a tag.

    The other side has the same type again, so the value behaves there as it does here. Of an instance of a subclass
    only the data is sent, marked as such. A value that is not plain data becomes the name of its type.
    """
    kind = type(value)
    if value is None or kind in (bool, str, float):
        return value
    if getattr(kind, "__module__", "") == "numpy" and getattr(value, "size", 0) == 1:
        kinds = "biufcUSO" if kind.__name__ == "ndarray" else "biufc"
        if value.dtype.kind in kinds:
            return numpy_to_json(value)
    if kind.__name__ == "timedelta64":  # numpy has it for an integer
        return opaque(value)
    for base in CONTENTS:
        if isinstance(value, base):
            content = CONTENTS[base](value)
            return {"subclass": content} if base in EXACT and kind is not base else content
    return opaque(value)


def members_to_json(members: Any) -> list[Any]:
    return list(map(to_json, members))


def pairs_to_json(pairs: Any) -> list[list[Any]]:
    return [[to_json(key), to_json(item)] for key, item in pairs]


def of_integer(number: int) -> Any:
    number = int.__index__(number)
    return number if abs(number) < 1 << 63 else {"int": hex(number)}


# What is sent of an instance: the first base that fits decides.
CONTENTS: dict[Any, Callable[[Any], Any]] = {  # Any: abstract classes too
    int: of_integer,
    float: float.__float__,
    str: str.__str__,
    list: members_to_json,
    tuple: lambda members: {"tuple": members_to_json(members)},
    set: lambda members: {"set": members_to_json(members)},
    frozenset: lambda members: {"frozenset": members_to_json(members)},
    Counter: lambda counts: {"Counter": pairs_to_json(counts.items())},
    dict: lambda table: {"dict": pairs_to_json(table.items())},
    bytes: lambda data: {"bytes": bytes(data).hex()},
    bytearray: lambda data: {"bytearray": data.hex()},
    memoryview: lambda view: {"memoryview": view.hex()} if (view.format, view.ndim) == ("B", 1) else opaque(view),
    complex: lambda number: {"complex": [number.real, number.imag]},
    Rational: lambda number: {"ratio": [hex(number.numerator), hex(number.denominator)]},
    Decimal: lambda number: {"decimal": str(number)},
    ItemsView: lambda pairs: {"items": pairs_to_json(pairs)},
    Set: lambda members: {"keys": members_to_json(members)},  # dict.keys() and others that equal a set
    Mapping: lambda table: {"mapping": pairs_to_json(table.items())},  # those that equal a dict
    UserList: lambda members: {"UserList": members_to_json(members)},
    UserString: lambda text: {"UserString": str(text)},
}
NESTED = (list, tuple, set, frozenset, dict)
EXACT = (*NESTED, int, float, str, bytes, bytearray, complex)


def numpy_to_json(value: Any) -> dict[str, Any]:
    """A number of numpy, tagged with the character of its type, or an array of one number, string or object."""
    if type(value).__name__ == "ndarray":
        kind = value.dtype.kind
        return {"array": [value.ndim, kind, to_json(value.item() if kind in "USO" else value.reshape(-1)[0])]}
    item = value.item()
    if type(item) is type(value):  # a longdouble is not a number of Python
        return {value.dtype.char: value.tobytes().hex()}
    return {value.dtype.char: to_json(item)}


def opaque(value: Any) -> Any:
    name = type(value).__name__
    library = str(getattr(type(value), "__module__", "")).partition(".")[0]
    length = None
    with suppress(Exception):  # the class may be one of the program's
        length = len(value)
    return {"object": [f"{library}.{name}" if library in ("numpy", "pandas") else name, length]}


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
