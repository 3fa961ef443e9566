"""Judge a program by its tests: program + tests → Verdict.

One sandbox run a program. In it a *harness* forks a child for every test; the child runs the program afresh, as a
module (not as `__main__`, so what a script does when started stays out of the way), then the test, an assert string,
in the same namespace. Time is shared out fairly: a test that loops forever does not take the others' turn.

A pass must be earned: the child hands its harness a secret, new for every test, after the test ran to its end. Neither
exit codes nor printed text nor exit handlers can pass for that. The harness reports over a stdout that its children do
not have, and they cannot trace it (see `sandbox`).

What is not covered: program and test share a process, so a program that is out to cheat can. It can find the secret
or read the test by digging through memory (`gc`, `ctypes`, patching code objects), jump over the test with a trace
function, shadow or patch the built-ins that the test calls, or return objects that equal everything. What does not
work: `sys.exit(0)`, `os._exit(0)`, exit handlers, printing, patching `os`, reading variables up the stack.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal, cast

from diffucoder.errors import ConfigError
from diffucoder.grading.sandbox import DEFAULT_LIMITS, ExecutionResult, Limits, Status, run

_GRACE = 1.0  # seconds the harness gets beyond the tests' own, to start and to report
_LINE = 512  # bytes a test's line in the harness's report may take


@dataclass(frozen=True)
class Verdict:
    """How a program did; `status` and `detail` speak of the first test that did not pass."""

    passed: bool
    passed_tests: int
    total_tests: int
    status: Status | Literal["no program"]
    seconds: float
    detail: str


def grade(program: str, tests: Sequence[str], limits: Limits = DEFAULT_LIMITS, *, unsafe: bool = False) -> Verdict:
    """Run every test against the program; `limits.seconds` is for all of them together."""
    if isinstance(tests, str) or not tests:
        raise ConfigError(f"tests={tests!r} must be a list of one or more assert strings; drop the problem otherwise")
    if not program.strip():
        return Verdict(False, 0, len(tests), "no program", 0.0, "the program is empty")
    roomier = replace(
        limits,
        seconds=limits.seconds + _GRACE,
        processes=limits.processes + 1,
        output=_LINE * len(tests) + limits.output,
    )
    # ascii() of plain values is read back by eval, which spares the harness the import of json.
    job = ascii((limits.seconds, program, list(tests)))
    return _verdict(run(_HARNESS, roomier, stdin=job, unsafe=unsafe), tests)


def grade_many(
    pairs: Iterable[tuple[str, Sequence[str]]],
    limits: Limits = DEFAULT_LIMITS,
    *,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
    unsafe: bool = False,
) -> list[Verdict]:
    """Grade (program, tests) pairs, `workers` at a time, in order; `progress` hears how many are done."""
    verdicts: list[Verdict] = []
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for verdict in pool.map(lambda pair: grade(pair[0], pair[1], limits, unsafe=unsafe), pairs):
            verdicts.append(verdict)
            if progress is not None:
                progress(len(verdicts))
    return verdicts


def _verdict(result: ExecutionResult, tests: Sequence[str]) -> Verdict:
    missing: Status = "killed" if result.status == "ok" else result.status
    outcomes = [(missing, result.detail or "the harness ended before it")] * len(tests)
    for line in result.stdout.split("\n")[:-1]:  # a line cut short has no end
        index, status, detail = line.split(" ", 2)
        outcomes[int(index)] = (cast(Status, status), detail)
    failed = [index for index, (status, _) in enumerate(outcomes) if status != "ok"]
    passed = len(tests) - len(failed)
    if not failed:
        return Verdict(True, passed, len(tests), "ok", result.seconds, "")
    status, detail = outcomes[failed[0]]
    if detail == "AssertionError":
        detail += ": " + " ".join(tests[failed[0]].split())[:300]
    return Verdict(False, passed, len(tests), status, result.seconds, f"test {failed[0] + 1}: {detail}")


# Runs in the sandbox as the program; reads (seconds, program, tests), prints "index status detail" for every test.
_HARNESS = r'''
import os, select, sys, time
import _signal as signal  # signal itself takes 2 ms to import


class Report:
    """A child's word to its harness. It lives on the stack of a `with` statement, which no variable gives access to."""

    __slots__ = ("pipe", "secret")

    def __init__(self, pipe, secret):
        self.pipe, self.secret = pipe, secret

    def __enter__(self):
        return None

    def __exit__(self, kind, error, trace, write=os.write, leave=os._exit):  # bound here: programs may patch os
        write(self.pipe, self.secret if kind is None else describe(error))
        leave(0)


def describe(error):
    # No code of the program's may run while a Report's frame is open, so no str(error) and no error.args.
    arguments = BaseException.args.__get__(error)
    plain = arguments and type(arguments[0]) in (str, int, float)
    text = type(error).__name__ + (": " + str(arguments[0]) if plain else "")
    return text[:300].encode(errors="replace")


def compiled(source, name):
    try:
        return compile(source, name, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        return describe(error)


def attempt(program, test, pipe, secret):
    """In the child: run program and test in a new module, tell the harness, never return."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)
    module = sys.modules["program"] = type(sys)("program")
    with Report(pipe, secret.pop()):
        exec(program, module.__dict__)
        exec(test, module.__dict__)


def judge(program, test, seconds):
    """Run one test in a child: its status, and what to say about it."""
    for code in (program, test):
        if isinstance(code, bytes):  # did not compile
            return "failed", code
    secret = [os.urandom(16)]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.close(reader)
        attempt(program, test, writer, secret)
    os.close(writer)
    message, code, ended = listen(reader, child, time.monotonic() + seconds)
    os.close(reader)
    try:
        os.killpg(child, signal.SIGKILL)  # what the program started, if it stayed in the group
    except ProcessLookupError:
        pass
    if code is None:
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if message.startswith(secret[0]):
        return "ok", b""
    if not ended:
        return "timeout", b"seconds: no time left"
    if code < 0:
        return "killed", b"signal: " + (signal.strsignal(-code) or str(-code)).encode()
    return "failed", message[:300] or b"ended before its test did"


def listen(reader, child, deadline):
    """What the child wrote, its exit code if known yet, and whether it ended by itself."""
    message, code = b"", None
    while code is None:
        left = deadline - time.monotonic()
        if left <= 0:
            return message, code, False
        # What the program started may hold the pipe open longer than the child lives: so look at both.
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
        while len(message) < 4096 and select.select([reader], [], [], 0 if pid else min(left, 0.02))[0]:
            chunk = os.read(reader, 4096)
            if not chunk:
                return message, code, True
            message += chunk
    return message, code, True


def main():
    seconds, source, tests = eval(sys.stdin.read())
    deadline = time.monotonic() + seconds
    program = compiled(source, "<program>")
    tests = [compiled(test, "<test>") for test in tests]
    waiting = range(len(tests))
    for again in (False, True):  # a test that outran its share gets a second try with what the others left
        slow = []
        for position, index in enumerate(waiting):
            share = (deadline - time.monotonic()) / (len(waiting) - position)
            status, detail = judge(program, tests[index], share)
            if status == "timeout" and not again:
                slow.append(index)
            else:
                line = " ".join(detail.decode(errors="replace").split())
                os.write(1, f"{index} {status} {line}\n".encode(errors="replace"))
        waiting = slow


main()
'''
