"""A short form of `make soak`: a real server, everything at once, and nothing is lost."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from soak import children_of

from diffucoder.grading.sandbox import Sandbox

SOAK = Path(__file__).parents[2] / "tools" / "soak.py"


def test_nothing_is_lost_in_twenty_seconds() -> None:
    # latency and memory are for `make soak`: they need a quiet machine and more time
    options = ["--seconds", "20", "--clients", "4", "--deadline", "10", "--pressure", "0.05", "--times-alone", "inf"]
    ended = subprocess.run([sys.executable, SOAK, *options], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "every promise held" in ended.stdout
    for kind in ("short", "grade", "memory"):
        assert f"\n{kind} " in ended.stdout


def test_a_program_whose_sandbox_is_killed_from_outside_runs_again() -> None:
    before = children_of(os.getpid())
    results = []
    with Sandbox(1) as sandbox:
        assert sandbox.run("pass").status == "ok"
        [worker] = set(children_of(os.getpid())) - set(before)
        program = "import time; time.sleep(2); print('finished')"
        thread = threading.Thread(target=lambda: results.append(sandbox.run(program)))
        thread.start()
        time.sleep(0.5)
        os.kill(worker, signal.SIGKILL)
        thread.join()
    assert [result.stdout for result in results] == ["finished\n"]
