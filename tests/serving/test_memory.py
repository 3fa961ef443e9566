"""Memory that nothing uses goes back to the system."""

import subprocess
import sys

PROGRAM = """
import os
from diffucoder.serving.run import return_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

held = [bytes(2000) for _ in range(100_000)]
last = held[-1]  # after all others: the C library keeps the free memory before it
del held
before = resident()
return_memory()
print(before - resident())
"""


def test_memory_is_returned() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(ended.stdout) > 100  # MiB, of 190
