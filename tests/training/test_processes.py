"""The processes of a run, where no run is needed."""

import os
import subprocess
import sys

ENDING = """
import atexit
from diffucoder.training.processes import exit_worker
atexit.register(print, "taken down")
print("done")
exit_worker()
print("went on")
"""


def ending(processes: int) -> str:
    """What a process, one of so many, prints at its end."""
    environment = {**os.environ, "WORLD_SIZE": str(processes)}
    done = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_of_several_processes_ends_before_its_interpreter_is_taken_down() -> None:
    assert ending(2).split("\n") == ["done", ""]  # printed, though nothing is flushed for it


def test_a_process_alone_goes_on() -> None:
    assert ending(1).split("\n") == ["done", "went on", "taken down", ""]
