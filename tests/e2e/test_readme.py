"""Oracle 14: what the README and the guides tell people to type runs.

A fenced block after the line `<!-- not run: reason -->` (a network, a 7B model, make) is left out. The bash lines of a
page run one after another in one folder, where the repository's files are at hand; its python blocks run as one
program. Loading torch takes seconds: plain `diffucoder` lines, fed by a pipe or not, are called in this process, and
the programs of all pages share one.
"""

import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from diffucoder.cli import main
from diffucoder.errors import SandboxError
from diffucoder.grading.sandbox import isolation

REPOSITORY = Path(__file__).parents[2]
# docs/design.md draws what all parts together will be, in sketches; test_tutorials.py runs the quickstart
LEFT_OUT = {"design.md", "quickstart.md"}
PAGES = sorted(p for p in [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")] if p.name not in LEFT_OUT)
STRICT = ("-euo", "pipefail", "-c")
NOT_RUN = r"(?:^[ ]*(<!-- not run: \S[^\n]*-->)\n)?"  # before a fence
_FENCE = re.compile(NOT_RUN + r"^([ ]*)```(\w+)[^\n]*\n(.*?)^\2```[ ]*$", re.MULTILINE | re.DOTALL)
_EACH_PAGE = """
import sys
for path in sys.argv[1:]:
    print(path)
    exec(compile(open(path, encoding="utf-8").read(), path, "exec"), {"__name__": "__main__"})
"""


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language that are meant to run."""
    texts = []
    for not_run, indent, its_language, text in _FENCE.findall(page):
        if its_language == language and not not_run:
            texts.append(re.sub(f"^{indent}", "", text, flags=re.MULTILINE))
    return texts


def lines(block: str) -> list[str]:
    """The commands of a bash block; one piece where a line may depend on the next."""
    if re.search(r"<<|^\s*(for|while|if|function)\b|\{$", block, re.MULTILINE):
        return [block]
    return [line for line in block.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


def plain(line: str) -> list[str] | None:
    """The arguments of a line that is nothing but a `diffucoder` command; None where a shell has to read it."""
    words = list(shlex.shlex(line, posix=True, punctuation_chars=True))
    simple = not re.search(r"[$`~*]", line) and not any(set(word) <= set("();<>|&") for word in words)
    return shlex.split(line, comments=True)[1:] if simple and words[0] == "diffucoder" else None


def run(command: list[str], folder: Path) -> str:
    """Run in `folder`, our `diffucoder` first on the path, no network: what it printed. Fails with that."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=folder, env=environment, input="", capture_output=True, text=True)
    assert ended.returncode == 0, f"{command[0]} ended with {ended.returncode}:\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder that sees what the repository holds: what a block writes does not end up there."""
    for name in ("recipes", "benchmarks", "docs", "README.md"):
        if (REPOSITORY / name).exists():
            (tmp_path / name).symlink_to(REPOSITORY / name)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for line in [line for block in blocks(page.read_text(encoding="utf-8"), "bash") for line in lines(block)]:
        feeder, piped, command = line.partition(" | diffucoder ")
        arguments = plain(f"diffucoder {command}" if piped else line)
        if arguments is None:
            run(["bash", *STRICT, line], folder)
            continue
        fed = run(["bash", *STRICT, feeder], folder) if piped else ""
        monkeypatch.setattr(sys, "argv", ["diffucoder", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(fed.encode()), encoding="utf-8"))
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, line


def test_the_programs_of_all_pages_run(folder: Path) -> None:
    programs = {page.stem: "\n".join(blocks(page.read_text(encoding="utf-8"), "python")) for page in PAGES}
    try:
        isolation()
    except SandboxError:
        programs = {name: program for name, program in programs.items() if "grading" not in program}
    for name, program in programs.items():
        (folder / f"{name}.py").write_text(program, encoding="utf-8")
    run([sys.executable, "-c", _EACH_PAGE, *(f"{name}.py" for name in programs)], folder)


def test_blocks_are_found_and_those_not_to_be_run_are_left_out() -> None:
    page = """
```bash
diffucoder models   # what is here
```
* in a list
  ```python
  if True:
      x = 1
  ```
<!-- not run: needs a network -->
```bash
diffucoder generate "x" --model cpgrpo
```
```
diffucoder is only mentioned
```
"""
    assert blocks(page, "bash") == ["diffucoder models   # what is here\n"]
    assert blocks(page, "python") == ["if True:\n    x = 1\n"]


def test_a_shell_reads_what_is_more_than_a_plain_command() -> None:
    assert plain('diffucoder generate "a | b; c > d" --steps 3  # quick') == [
        "generate",
        "a | b; c > d",
        "--steps",
        "3",
    ]
    assert plain("diffucoder infill - < code.py") is None
    assert plain("echo x | diffucoder infill -") is None
    assert plain("make run") is None
    assert lines("# first\ndiffucoder generate x \\\n  --watch\n\ndiffucoder models\n") == [
        "diffucoder generate x    --watch",
        "diffucoder models",
    ]
    assert len(lines("cat > code.py <<EOF\nx = 1\nEOF\ndiffucoder infill code.py\n")) == 1


def test_a_failing_command_is_noticed_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="error: steps=0"):
        run(["bash", *STRICT, "diffucoder generate x --steps 0\necho on"], tmp_path)
