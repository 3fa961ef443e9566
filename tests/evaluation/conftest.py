"""A sandbox to judge in, and small tasks of every kind."""

from pathlib import Path

import pytest

from diffucoder.evaluation.benchmarks import Calls, Task


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees what another one has cached."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


HALF = "def half(x):\n    return x / 2\n"


@pytest.fixture
def half() -> Task:
    """A task with inputs; on plus inputs the result must be a fraction."""
    return Task(
        task_id="Test/0",
        entry_point="half",
        prompt='def half(x):\n    """Half of x."""\n',
        request="Half of x.",
        canonical=HALF,
        tests=Calls(base=((2,), (4,)), plus=((1,), (0.3,))),
    )
