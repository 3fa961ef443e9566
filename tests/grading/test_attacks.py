"""What a program may do against whoever judges it; one way a test, each of which worked once."""

import os
import signal
import threading
import time

import pytest

from diffucoder.errors import SandboxError
from diffucoder.grading.grade import Call, Outcome, call, grade
from diffucoder.grading.sandbox import Limits, Sandbox, isolation


@pytest.fixture(autouse=True, scope="module")
def isolated() -> None:
    try:
        isolation()
    except SandboxError as error:
        pytest.skip(str(error))


# Ending or stalling the harness


def asked(program: str, limits: Limits) -> list[Outcome]:
    """Two calls, of which the first without a value is the last."""
    return call(program, [Call("f(2)"), Call("f(3)")], limits, until_failure=True)


@pytest.mark.parametrize(
    ("program", "status"),
    [
        pytest.param("import os\nos.kill(os.getppid(), 9)", "killed", id="killing the harness"),
        pytest.param("import os\nos.kill(-1, 9)", "killed", id="killing everybody"),
        pytest.param("import os\nos.kill(os.getppid(), 19)", "timeout", id="stopping the harness"),
        pytest.param(
            "import os, time\ndef f(x):\n    os.kill(os.getppid(), 9)\n    time.sleep(9)",
            "killed",
            id="killing the harness in a call",
        ),
    ],
)
def test_calls_that_the_harness_never_answered_are_lost(program: str, status: str) -> None:
    outcomes = asked(program, Limits(seconds=0.3))
    assert [outcome.status for outcome in outcomes] == [status, status]


def test_calls_are_lost_where_the_whole_worker_is_killed() -> None:
    with Sandbox(1) as box:
        box.run("pass")
        (worker,) = box._idle
        killer = threading.Timer(1.0, os.killpg, (worker.process.pid, signal.SIGKILL))
        killer.start()
        program = "import time\ntime.sleep(60)\n"
        outcomes = call(program, [Call("f(2)")], sandbox=box, until_failure=True)
        killer.join()
    assert [outcome.status for outcome in outcomes] == ["killed"]


def test_an_interrupt_to_process_1_ends_nothing() -> None:
    program = "import os, time\nos.kill(1, 2)\ntime.sleep(0.2)\ndef f(x):\n    return x\n"
    assert [outcome.value for outcome in asked(program, Limits())] == [2, 3]


def test_a_program_can_still_be_interrupted() -> None:
    program = "import os\ndef f(x):\n    try:\n        os.kill(os.getpid(), 2)\n    except KeyboardInterrupt:\n"
    assert [outcome.value for outcome in asked(program + "        return x\n", Limits())] == [2, 3]


def slow_to_compile(depth: int) -> str:
    """Finally blocks in each other: every one doubles the code."""
    lines = ["def f(x):"]
    for level in range(depth):
        lines += [" " * (level + 1) + line for line in ("try:", " pass", "finally:")]
    return "\n".join([*lines, " " * (depth + 1) + "return x"])


def test_a_program_that_takes_too_long_to_compile_is_a_timeout() -> None:
    begin = time.monotonic()
    (first, *_) = asked(slow_to_compile(24), Limits(seconds=0.5))
    assert first.status in ("timeout", "killed")
    assert time.monotonic() - begin < 20
