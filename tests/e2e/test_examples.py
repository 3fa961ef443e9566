"""The programs in `examples/` run and print what their docstrings say; the notebook's outputs are what its cells print.

All run in this process, one after another: importing torch takes seconds.
"""

import ast
import doctest
import json
import re
import runpy
import textwrap
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from diffucoder.errors import SandboxError
from diffucoder.grading.sandbox import isolation

EXAMPLES = Path(__file__).parents[2] / "examples"
PROGRAMS = sorted(EXAMPLES.glob("*.py"))
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
LONGEST = 40  # lines of a program


def test_the_page_of_examples_shows_every_program() -> None:
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text(encoding="utf-8")
    assert set(re.findall(r'^--8<-- "examples/(.*)"$', page, re.MULTILINE)) == {path.name for path in PROGRAMS}


def expected_output(program: str) -> str:
    """The block after "Output:" of the docstring; `...` in it is any text."""
    docstring = ast.get_docstring(ast.parse(program)) or ""
    return textwrap.dedent(docstring.partition("Output:\n")[2])


def assert_prints(expected: str, printed: str) -> None:
    """Compare as doctest does, apart from the line breaks at the end."""
    given = f"{expected.rstrip()}\n"
    assert doctest.OutputChecker().check_output(given, f"{printed.rstrip()}\n", doctest.ELLIPSIS), printed


def run_cells(notebook: dict[str, Any]) -> list[str]:
    """Run the code cells in order, in one namespace: what each prints."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            output = StringIO()
            with redirect_stdout(output):
                exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
            printed.append(output.getvalue())
    return printed


def skip_without_sandbox(program: str) -> None:
    if "diffucoder.grading" in program:
        try:
            isolation()
        except SandboxError as error:
            pytest.skip(str(error))


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_an_example_prints_what_its_docstring_says(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = path.read_text(encoding="utf-8")
    skip_without_sandbox(program)
    runpy.run_path(str(path), run_name="__main__")
    assert_prints(expected_output(program), capsys.readouterr().out)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_of_a_notebook_print_what_is_stored(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    skip_without_sandbox("".join("".join(cell["source"]) for cell in code))
    stored = ["".join(line for output in cell["outputs"] for line in output["text"]) for cell in code]
    assert run_cells(notebook) == stored
    assert all(stored), "a cell without output has nothing to compare"


def test_there_are_enough_examples_and_each_is_short_and_explained() -> None:
    assert len(PROGRAMS) >= 8
    assert NOTEBOOKS
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in PROGRAMS:
        program = path.read_text(encoding="utf-8")
        assert program.count("\n") <= LONGEST, path.name
        assert expected_output(program), f"{path.name} has no block after Output:"
        assert re.search(rf"\[`{path.name}`\]\({path.name}\)", listed), f"examples/README.md does not list {path.name}"


def test_any_text_may_stand_for_dots_and_nothing_else() -> None:
    assert_prints("a ... c\n", "a b c\n\n")
    with pytest.raises(AssertionError):
        assert_prints("a b\n", "a c\n")
