"""The tutorials of the documentation run, and print what stands below their blocks.

A page is read from top to bottom. The bash lines and Python blocks run in the order of the page, in one folder and one
Python namespace. A block of ```text after a block is its output, where `...` is any text. A block that begins with
`# not run: reason` is left out, as on all pages (test_readme.py).
"""

import doctest
import io
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from test_readme import NOT_RUN, STRICT, lines, plain, run

from diffucoder.cli import main
from diffucoder.errors import SandboxError
from diffucoder.grading.sandbox import isolation

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [DOCS / "quickstart.md", *sorted((DOCS / "extend").glob("*.md"))]
_BLOCK = re.compile(NOT_RUN + r"^```(bash|python|text)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str, str | None]]:
    """Each block that runs: its language, its text, and the output below it, if any."""
    found = _BLOCK.findall(page)
    runnable = []
    for at, (not_run, language, text) in enumerate(found):
        following = found[at + 1] if at + 1 < len(found) else ("", "", "")
        if language != "text" and not not_run:
            runnable.append((language, text, following[2] if following[1] == "text" else None))
    return runnable


def run_bash(block: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the lines of a block, plain `diffucoder` commands in this process: what they print."""
    printed = ""
    for line in lines(block):
        arguments = plain(line)
        if arguments is None:
            printed += run(["bash", *STRICT, line], folder)
            continue
        output = io.StringIO()
        monkeypatch.setattr(sys, "argv", ["diffucoder", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
        with redirect_stdout(output), pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, line
        printed += output.getvalue()
    return printed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_tutorial_prints_what_it_shows(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text(encoding="utf-8")
    if "grading" in text or "evaluate" in text:
        try:
            isolation()
        except SandboxError as error:
            pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for language, block, expected in blocks(text):
        if language == "bash":
            printed = run_bash(block, tmp_path, monkeypatch)
        else:
            output = io.StringIO()
            with redirect_stdout(output):
                exec(compile(block, page.name, "exec"), names)
            printed = output.getvalue()
        if expected is not None:
            same = doctest.OutputChecker().check_output(
                f"{expected.rstrip()}\n", f"{printed.rstrip()}\n", doctest.ELLIPSIS
            )
            assert same, f"{page.name} shows\n{expected}\nand\n{block}\nprints\n{printed}"


def test_blocks_and_their_outputs_are_found() -> None:
    page = """
```bash
echo a
```

```text
a
```

<!-- not run: it needs a server -->
```python
x = 1
```

```python
y = 2
```
"""
    assert blocks(page) == [("bash", "echo a\n", "a\n"), ("python", "y = 2\n", None)]
