"""The command line, a server and a real browser as fixtures."""

import io
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from commands import Outcome, Run
from serving import serving

from diffucoder.cli import main

QUIET = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The address of a server of the shipped model, one for all tests that leave it as it was."""
    with serving("--dtype", "float32") as (url, _):
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; the tests that ask for it are skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the dev extra brings playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium here; `make browser` installs it")
    with playwright.sync_playwright() as run:
        made = run.chromium.launch(executable_path=path, args=QUIET.split())
        yield made
        made.close()


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call the command line in this process: `cli("generate", "x", stdin="...")`."""

    def call(*arguments: object, stdin: str | bytes = "") -> Outcome:
        given = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(sys, "argv", ["diffucoder", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), out, err)

    return call
