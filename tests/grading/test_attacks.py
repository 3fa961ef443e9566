"""What a program may do against whoever judges it; one way a test, each of which worked once."""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from time import process_time

import pytest
from machine import in_time, living, wait_for

from diffucoder.decoding.requests import Generation
from diffucoder.decoding.trace import Trace
from diffucoder.evaluation.evalplus import correct
from diffucoder.grading.asserts import parse
from diffucoder.grading.grade import Call, Outcome, call, grade
from diffucoder.grading.sandbox import DEFAULT_LIMITS, Limits, Sandbox
from diffucoder.models.checkpoint import load_tokenizer
from diffucoder.training.exercises import Exercise
from diffucoder.training.rewards import reward
from diffucoder.training.rollouts import Completion, write_samples

# Ending or stalling the runner


def asked(program: str, box: Sandbox, limits: Limits = DEFAULT_LIMITS) -> list[Outcome]:
    """Two calls, of which the first without a value is the last."""
    return call(program, [Call("f(2)"), Call("f(3)")], limits, sandbox=box, until_failure=True)


@pytest.mark.parametrize(
    ("program", "status", "seconds"),
    [
        pytest.param("import os\nos.kill(os.getppid(), 9)", "killed", 5.0, id="killing the runner"),
        pytest.param("import os\nos.kill(-1, 9)", "killed", 5.0, id="killing everybody"),
        pytest.param("import os\nos.kill(os.getppid(), 19)", "killed", 5.0, id="stopping the runner"),
        pytest.param(
            "import os, time\ndef f(x):\n    os.kill(os.getppid(), 9)\n    time.sleep(9)",
            "killed",
            5.0,
            id="killing the runner in a call",
        ),
    ],
)
def test_calls_that_the_runner_never_answered_are_lost(program: str, status: str, seconds: float, box: Sandbox) -> None:
    outcomes = asked(program, box, Limits(seconds=seconds))
    assert [outcome.status for outcome in outcomes] == [status, status]


def test_calls_are_lost_where_the_whole_worker_is_killed_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    marker = f"marker-{uuid.uuid4()}"
    program = (
        f"import subprocess\nsubprocess.run(['/usr/bin/python3', '-c', 'import time; time.sleep(60)', {marker!r}])"
    )
    workers = []
    with Sandbox(1) as own:
        new_worker = own._new_worker
        monkeypatch.setattr(own, "_new_worker", lambda: workers.append(new_worker()) or workers[-1])

        def kill_whatever_runs_it() -> None:
            for number in range(3):  # a program is run so many times
                wait_for(marker)
                os.killpg(workers[number].process.pid, signal.SIGKILL)
                while living(marker):
                    time.sleep(0.01)

        killer = threading.Thread(target=kill_whatever_runs_it)
        killer.start()
        outcomes = call(program, [Call("f(2)")], Limits(seconds=60), sandbox=own, until_failure=True)
        killer.join()
    assert len(workers) == 3
    assert [outcome.status for outcome in outcomes] == ["killed"]


def test_an_interrupt_to_process_1_ends_nothing(box: Sandbox) -> None:
    program = "import os, time\nos.kill(1, 2)\ntime.sleep(0.2)\ndef f(x):\n    return x\n"
    assert [outcome.value for outcome in asked(program, box)] == [2, 3]


def test_a_program_can_still_be_interrupted(box: Sandbox) -> None:
    program = "import os\ndef f(x):\n    try:\n        os.kill(os.getpid(), 2)\n    except KeyboardInterrupt:\n"
    assert [outcome.value for outcome in asked(program + "        return x\n", box)] == [2, 3]


def slow_to_compile(depth: int) -> str:
    """Finally blocks in each other: every one doubles the code."""
    lines = ["def f(x):"]
    for level in range(depth):
        lines += [" " * (level + 1) + line for line in ("try:", " pass", "finally:")]
    return "\n".join([*lines, " " * (depth + 1) + "return x"])


def test_a_program_that_takes_too_long_to_compile_is_none_that_passes(box: Sandbox) -> None:
    with in_time(20):
        (first, *_) = asked(slow_to_compile(18), box, Limits(seconds=0.5))
    assert first.status != "ok"


# Lying answers and shadowed built-ins, where an assert does more with an answer than to compare it

LIAR = """
class Liar(float):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __sub__(self, other): return 0.0
    __rsub__ = __sub__
    def __getattr__(self, name): return lambda *a: True
    def __len__(self): return 2
    __hash__ = None
def f(*a): return Liar()
"""
SHADOWS = "all = any = lambda *a: True\nsum = round = abs = max = len = lambda *a, **k: 0\ndef f(*a): return [0]\n"
EXPECTING = [
    "assert all([f(2) == 4, f(3) == 9])",
    "assert not f(2) != 4",
    "assert (f(2) == 4) == True",
    "assert (f(2) == 4) is True",
    "assert bool(f(2) == 4)",
    "assert f(2) - 4 == 0",
    "assert abs(f(2) - 4) / 4 < 1e-6",
    "assert round(abs(f(2) - 4.0), 3) == 0",
    "assert sum(abs(a - b) for a, b in zip(f(2), [1.0, 2.0])) < 1e-6",
    "assert all(abs(a - b) < 1e-6 for a, b in zip(f(2), [1.0, 2.0]))",
    "assert len(set(f(2)) ^ {1, 2}) == 0",
    "assert max(abs(a - b) for a, b in zip(f(2), [1.0, 2.0])) < 1e-6",
    "assert (lambda r: r == 4)(f(2))",
    "assert f(2) == 4",
    "assert set(f(2)) == {4}",
    "assert f(2).__eq__(4)",
    "assert f(2).equals(4)",
    "assert f().startswith('Hello')",
    "assert math.isclose(f(2), 4)",
]


@pytest.mark.parametrize("program", [LIAR, SHADOWS], ids=["liar", "shadows"])
@pytest.mark.parametrize("head", ["", "import math\nmath.isclose = lambda *a, **k: True\n"])
def test_a_lie_passes_no_test_that_counts_as_trusted(program: str, head: str, box: Sandbox) -> None:
    verdict = grade(head + program, EXPECTING, sandbox=box)
    believed = [test for test, each in zip(EXPECTING, verdict.tests, strict=True) if each.passed and each.trusted]
    assert believed == []


def test_an_honest_program_still_passes_what_is_done_out_here(box: Sandbox) -> None:
    program = """
from collections import deque
from fractions import Fraction
def f(n): return n * n
def gen(n): yield from range(n)
def queue(n): return deque(range(n))
def ratio(n): return Fraction(1, n)
class Solution:
    def f(self, n): return n * n
"""
    tests = [
        "assert not f(2) != 4",
        "assert abs(f(2) - 12.0 / 3.0) < 1e-6",
        "assert list(gen(3)) == [0, 1, 2]",
        "assert sorted(gen(3), reverse=True) == [2, 1, 0]",
        "assert sum(gen(3)) == 3",
        "assert len(queue(3)) == 3",
        "assert queue(3)[0] == 0",
        "assert queue(3)",
        "assert not queue(0)",
        "assert 2 * ratio(4) == 0.5",
        "assert Solution().f(2) == 4",
    ]
    verdict = grade(program, tests, sandbox=box)
    assert verdict.passed, verdict
    assert verdict.trusted
    assert not grade(program, ["assert len(gen(3)) == 3"], sandbox=box).passed


# Writing where the runner writes

OPENED = """
import os
runner, opened = os.getppid(), []
for name, mode in [("mem", os.O_RDWR), ("mem", os.O_RDONLY), ("fd/1", os.O_WRONLY), ("environ", os.O_RDONLY)]:
    try:
        os.close(os.open(f"/proc/{runner}/{name}", mode))
        opened.append(name)
    except OSError:
        pass
try:
    opened += os.listdir(f"/proc/{runner}/fd")
except OSError:
    pass
def f(x): return opened
"""


def test_nothing_of_the_runner_can_be_opened(box: Sandbox) -> None:
    assert [outcome.value for outcome in asked(OPENED, box)] == [[], []]


def test_nothing_of_another_program_of_the_job_can_be_opened(box: Sandbox) -> None:
    left_behind = "import os, time\nother = os.fork()\nif other == 0:\n    time.sleep(60)\n"
    program = left_behind + OPENED.replace("os.getppid()", "other")
    assert [outcome.value for outcome in asked(program, box)] == [[], []]


@pytest.mark.parametrize(
    "told",
    [
        "boo",
        "",
        "[",
        '[0, "ok", 0.1, 4',
        '[x0, "ok", 0.1, 4]',
        '[9, "ok", 0.1, 4]',
        '[-1, "ok", 0.1, 4]',
        '[0, "ok", nan, 4]',
        '[0, "ok", inf, 4]',
        '[0, "ok", soon, 4]',
        '[0, "passed", 0.1, 4]',
        '[0, "ok"]',
        '[9' + "9" * 5000 + ', "ok", 0.1, 4]',
        '[0, "failed", 0.1, 4]',
        '[0, "failed", 0.1, [1e999, "x"]]',
    ],
)  # fmt: skip
def test_what_is_no_answer_is_a_loss(told: str, box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffucoder.grading.grade.source_of", lambda name: f"print({told!r})")
    for outcome in asked("pass", box):
        assert (outcome.status, outcome.value) in {("killed", None), ("failed", None)}, outcome
        assert outcome.seconds >= 0


def forged(answer: bytes) -> str:
    """A program that says `answer` itself, on the pipe to its runner."""
    return f"import os\nos.write(4, b'ready\\n')\nos.write(4, {answer!r} + b'\\n')\nos._exit(0)\n"


ODD = [
    b"=", b"=nul", b'={"a":1}', b"={}", b'={"set":[[1]]}', b'={"complex":["x"]}', b'={"ratio":[]}',
    b'={"ratio":["1","0"]}', b'={"int":5}', b'={"tuple":5}', b'={"dict":[[1]]}', b'={"bytes":"zz"}', b"=" + b"[" * 9999,
    b"=" + b'{"tuple":[' * 5000 + b"]}" * 5000, b"=1e999", b"=NaN", b"=" + b"9" * 5000, b"-", b"-[]", b'-["a","b"]',
    b'-[1e999,"x"]', b"-[NaN,1]", b'-{"7":1,"8":2}', b"-[" + b"9" * 4000 + b",1]", b"!", b"", b"\xff\xfe", b"=\x00",
    b'={"object":"x"}', b'={"object":["x"]}', b'={"object":["x",-1]}', b'={"object":["x",1e9]}', b'={"object":{}}',
    b'={"digest":[]}', b'={"dict":{"a":1}}', b'={"frozenset":[{"digest":1}]}', b'="\\ud800"',
    b'={"decimal":"x"}', b'={"decimal":[1]}', b'={"subclass":null}', b'={"subclass":{"subclass":2}}',
    b'={"array":[1,"d",[2]]}', b'={"array":[1,[2]]}', b'={"array":[0,{"d":2}]}',
    b'={"array":[1000000000000000000,"O",1]}', b'={"array":[700000000,"U","x"]}', b'={"array":[-1,"O",[1]]}',
    b'={"array":[99,"d",2]}', b'={"array":[0,2]}', b'={"d":[2]}', b'={"d":"2"}', b'={"g":"00"}', b'={"b":300}',
    b'={"V":2}',
    b'={"items":[1]}', b'={"keys":[[1]]}', b'={"UserString":5}', b'={"Counter":[[[],1]]}', b'={"memoryview":5}',
    b'={"bh":2}',
]  # fmt: skip


def test_no_answer_however_odd_passes_or_raises(box: Sandbox) -> None:
    tests = ["assert f(1) == 2", "assert 1.9 < f(1) < 3", "assert abs(f(1) - 2.5) < 1e-6", "assert f(1) in {2, 3}"]
    tests += ["assert len(f(1)) == 2", "assert set(f(1)) == {2}", "assert f(1)", "assert not f(1) != 2"]
    for answer in ODD:
        verdict = grade(forged(answer), tests, sandbox=box)
        assert verdict.passed_tests == 0, answer
        verdict.detail.encode()


# What is told of a failure


@pytest.mark.parametrize(
    "program",
    [
        pytest.param("raise ValueError('\\ud800')", id="half a character"),
        pytest.param("raise ValueError('\x1b[31m\x07\\u202e')", id="escapes"),
        pytest.param(forged(b'-[0, "' + b"A\\ud800\\u001b[31m" * 3000 + b'"]'), id="a long message"),
        pytest.param("def f(x):\n    return type('\x1b[31m\\ud800' * 99, (), {})()", id="a name of a class"),
        pytest.param("def f(x):\n    return '\\ud800' * 9", id="a value"),
    ],
)
def test_what_is_told_of_a_failure_can_be_printed_and_stored(program: str, box: Sandbox) -> None:
    verdict = grade(program, ["assert f(1) == 2, '\ud800'", "x = f(1)\nassert x == '\x1b'"], sandbox=box)
    assert verdict.passed_tests == 0
    for detail in (verdict.detail, *(test.detail for test in verdict.tests)):
        assert detail.isprintable()
        assert 0 < len(detail.encode()) < 1000


def test_a_failure_that_is_told_of_can_be_written_down(tmp_path: Path, box: Sandbox) -> None:
    given = reward("```python\ndef f(x):\n    raise ValueError('\\ud800')\n```\n", ["assert f(1) == 2"], box)
    trace = Trace(tokens=[1, 2], prompt_length=1, steps=[0], confidence=[1], log_probs=[0], forward_passes=1)
    answer = Generation(0, "x", ("x",), (2,), 1, 0.0, "length", trace)
    write_samples(tmp_path, 1, [Completion(Exercise("a", "p", ()), answer, given)], [0.0], load_tokenizer(None))
    assert "ValueError" in (tmp_path / "samples.jsonl").read_text(encoding="utf-8")


# Memory that no limit counts, and who dies where memory runs out


def test_no_memory_can_be_had_that_the_limits_do_not_count(box: Sandbox) -> None:
    program = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
number = 447  # memfd_secret, which the C library has no name for
for taken in (
    libc.shmget(0, 4096, 0o1600), libc.msgget(0, 0o1600), libc.semget(0, 1, 0o1600),
    libc.memfd_create(b"x", 0), libc.syscall(number, 0),
):
    print(taken, end=" ")
"""
    assert box.run(program).stdout == "-1 -1 -1 -1 -1 "


def test_where_memory_runs_out_a_program_is_the_first_to_be_killed(box: Sandbox) -> None:
    program = """
try:
    open("/proc/self/oom_score_adj", "w").write("0")
except OSError as error:
    print(error.strerror)
print(open("/proc/self/oom_score_adj").read())
"""
    assert box.run(program).stdout == "Read-only file system\n1000\n\n"


# Traces in what the programs of a worker share


def test_what_can_be_written_is_mounted_anew_for_every_program(box: Sandbox) -> None:
    program = """
writable = {}
for line in open("/proc/self/mountinfo"):
    at, options = line.split()[4:6]
    writable[at] = "rw" in options.split(",")  # the last at a place hides the others
print(*sorted(at for at in writable if writable[at]))
"""
    devices = {f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty")}
    assert set(box.run(program).stdout.split()) - devices == {"/tmp", "/home/nobody", "/dev/shm", "/dev/pts"}


def test_a_terminal_that_one_program_closes_is_open_to_the_next() -> None:
    close = "import os\nos.utime('/dev/pts/ptmx', ns=(0, 77))\nos.chmod('/dev/pts/ptmx', 0)"
    look = "import os, pty\nprint(os.stat('/dev/pts/ptmx').st_mtime_ns == 77, len(pty.openpty()))"
    with Sandbox(1) as own:
        own.run(close)
        assert own.run(look).stdout == "False 2\n"


# Getting in front of others


def test_a_program_cannot_undo_that_it_gives_way(box: Sandbox) -> None:
    program = """
import os
def priority():
    try:
        return open("/proc/self/autogroup").read().rpartition(" ")[2].strip()
    except OSError:
        return "none here"
before = priority()
for attempt in (lambda: open("/proc/self/autogroup", "w").write("0"), os.setsid, lambda: os.nice(-1)):
    try:
        attempt() if os.fork() == 0 else os.wait()
    except OSError as error:
        pass
    if priority() != before:
        print("gave way no longer")
print("done", flush=True)
"""
    assert set(box.run(program).stdout.split("\n")) == {"done", ""}


# Answers that take their reader long


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param("{'set': alike}", id="a set of one hash"),
        pytest.param("{'frozenset': alike}", id="a frozenset of one hash"),
        pytest.param("{'dict': [[each, 0] for each in alike]}", id="keys of one hash"),
        pytest.param("alike", id="a list that a test makes a set of"),
        pytest.param("{'set': [{'tuple': [each, 'x']} for each in alike]}", id="tuples of one hash"),
        pytest.param("{'ratio': ['7' * 300_000, '3' * 299_999]}", id="a fraction to reduce"),
        pytest.param("{'decimal': '1E+99999999'}", id="a decimal number with many zeros"),
        pytest.param("{'bytearray': b'%1000000000d'.hex()}", id="a format of great width"),
        pytest.param("{'UserString': '%1000000000d'}", id="another format of great width"),
        pytest.param("{'array': [1, 'd', [[0]] * 100_000]}", id="an array that is stretched"),
        pytest.param("[{'ratio': ['7' * 9_000, '3' * 8_999 + str(k)]} for k in range(20)]", id="fractions to add up"),
    ],
)
def test_no_answer_takes_its_reader_long(answer: str, box: Sandbox) -> None:
    program = f"""
import json, os
alike = [{{"int": hex(k * ((1 << 61) - 1) + 1)}} for k in range(2, 50_000)]
line = memoryview(b"ready\\n=" + json.dumps({answer}).encode() + b"\\n")
while line:
    line = line[os.write(4, line):]
os._exit(0)
"""
    began = process_time()
    (outcome,) = call(program, [Call("f(2)")], Limits(output=4 << 20), sandbox=box)
    for question in ("set(f(2)) == {1}", "sum(f(2)) == 1", "sorted(f(2)) == [1]", "f(2) % 2 == 1", "int(f(2)) == 1"):
        split = parse(f"assert {question}")
        assert split is not None
        assert not split.holds(outcome.value)
    assert not correct("Mbpp/2", (1,), [1, 2], outcome.value)
    assert process_time() - began < 3


# Reading one test to pass another

LEAK = """
import re, sys
frame, constants = sys._getframe(), []
while frame:
    for question in frame.f_locals.get("questions") or []:
        constants += map(int, re.findall("[0-9]+", question[0]))
    frame = frame.f_back
def f(x):
    return next((each for each in constants if each > 5), None)
"""


def test_what_one_test_holds_is_not_there_for_a_trusted_one(box: Sandbox) -> None:
    verdict = grade(LEAK, ["assert f(3) == 9", "y = f(3)\nassert y == 9"], sandbox=box)
    assert [(test.passed, test.trusted) for test in verdict.tests] == [(False, True), (True, False)]


def test_tests_of_both_kinds_are_told_in_order(box: Sandbox) -> None:
    tests = ["x = f(1)\nassert x == 1", "assert f(2) == 2", "y = f(3)\nassert y == 0", "assert f(4) == 0"]
    verdict = grade("def f(x):\n    return x\n", tests, sandbox=box)
    assert [test.passed for test in verdict.tests] == [True, True, False, False]
    assert verdict.detail.startswith("test 3: ")


# Tests that cannot be split: what is told to be held there

WALK = """
import os, sys
def values(thing, depth=0):
    if isinstance(thing, bytes):
        yield thing
    elif isinstance(thing, (list, tuple, set)) and depth < 4:
        for each in thing:
            yield from values(each, depth + 1)
    elif depth < 4:
        yield from values([*getattr(thing, "__dict__", thing if isinstance(thing, dict) else {}).values()], depth + 1)
def repeat_tokens():
    frame, found = sys._getframe(), []
    while frame:
        found += [*values(dict(frame.f_locals)), *values(dict(frame.f_globals))]
        frame = frame.f_back
    for token in found:
        os.write(4, b"=" + token + b"true\\n")
        os.write(4, b"=" + token + b"\\n")
    os._exit(0)
"""


@pytest.mark.parametrize(
    "program",
    [
        pytest.param("import builtins\nbuiltins.exec = lambda *a, **k: None\n", id="a patched exec"),
        pytest.param(
            WALK
            + """
class Meta(type):
    @property
    def __name__(cls):
        repeat_tokens()
class Error(Exception, metaclass=Meta): pass
raise Error
""",
            id="code in the name of an error",
        ),
        pytest.param(WALK + "repeat_tokens()", id="a token in a variable up the stack"),
        pytest.param(WALK + "def f(x):\n    repeat_tokens()\n", id="the same, within the test"),
        pytest.param("import os\nos.write(4, b'ready\\n=true\\n')\nos._exit(0)\n", id="a token of the program's"),
    ],
)
def test_a_pass_of_a_whole_test_cannot_be_had_by(program: str, box: Sandbox) -> None:
    assert not grade(program, ["x = f(2)\nassert x == 4"], sandbox=box).passed


# What is told of an error


@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("open('/nope')", "FileNotFoundError: No such file or directory"),
        ("raise OSError('gone')", "OSError: gone"),
        ("raise OSError(5, None)", "OSError: 5"),
        ("raise ValueError(10**5000)", "ValueError"),
        ("raise ValueError(-7)", "ValueError: -7"),
        ("raise KeyError(('a',))", "KeyError"),
    ],
)
def test_an_error_is_told_by_its_first_words(program: str, detail: str, box: Sandbox) -> None:
    assert grade(program, ["assert f(2) == 4"], sandbox=box).detail == f"test 1: {detail}"


# What is no fault of the program


def test_who_waits_for_a_processor_is_not_timed_out(box: Sandbox) -> None:
    program = "import time\ndef f(x):\n    end = time.process_time() + 0.3\n    while time.process_time() < end: pass\n"
    tests = [f"assert f({n}) is None" for n in range(4)]
    # of the same low priority as the program, so that it gets its share also on a machine that is busy with more
    rival = "from diffucoder.grading.forkserver import lower_priority\nlower_priority()\nwhile True: pass\n"
    command = [sys.executable, "-c", rival]
    rivals = [subprocess.Popen(command, start_new_session=True) for _ in range(3 * (os.cpu_count() or 1))]
    try:
        verdict = grade(program, tests, Limits(seconds=2.5), sandbox=box)
    finally:
        for rival in rivals:
            rival.kill()
            rival.wait()
    assert verdict.passed, verdict


def test_who_sleeps_for_long_is_timed_out(box: Sandbox) -> None:
    with in_time(5):
        verdict = grade("import time\ntime.sleep(60)\n", ["assert f(1) == 1"] * 3, Limits(seconds=0.4), sandbox=box)
    assert [test.status for test in verdict.tests] == ["timeout"] * 3


def test_who_stops_the_runner_ends_the_run(box: Sandbox) -> None:
    program = "import os, signal, time\ndef f(x):\n    os.kill(os.getppid(), signal.SIGSTOP)\n    time.sleep(99)\n"
    verdict = grade(program, ["assert f(1) == 2"], sandbox=box)
    assert (verdict.passed, verdict.status, verdict.detail) == (False, "killed", "test 1: signal SIGSTOP")
    assert verdict.seconds < 5
    child = "import os, signal\nchild = os.fork() or os.kill(os.getpid(), signal.SIGSTOP)\nif child:\n"
    assert box.run(child + "    os.waitpid(child, os.WUNTRACED)\n    print('its own')\n").stdout == "its own\n"


def test_a_call_that_worked_and_then_ended_its_process_costs_only_itself(box: Sandbox) -> None:
    program = """
import os, time
def f(x):
    if x == 2:
        while time.process_time() < 0.2: pass
        os._exit(0)
    return x
"""
    outcomes = call(program, [Call("f(2)"), Call("f(3)")], sandbox=box)
    assert [outcome.status for outcome in outcomes] == ["failed", "ok"]


def test_right_answers_may_be_as_long_as_the_limit_each(box: Sandbox) -> None:
    program = "def f(x):\n    return str(x) * 40_000\n"
    tests = [f"assert f({n}) == '{n}' * 40_000" for n in range(4)]
    assert grade(program, tests, sandbox=box).passed
