"""A short form of `make soak`: a real server, everything at once, and nothing is lost."""

import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[2] / "tools" / "soak.py"


def test_nothing_is_lost_in_twenty_seconds() -> None:
    # latency is for `make soak` on a quiet machine
    options = ["--seconds", "20", "--clients", "4", "--pressure", "0.05", "--times-alone", "inf"]
    ended = subprocess.run([sys.executable, SOAK, *options], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "every promise held" in ended.stdout
    for kind in ("short", "grade", "memory"):
        assert f"\n{kind} " in ended.stdout
