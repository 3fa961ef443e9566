"""The script that takes the pictures of the documentation: it finds what it clicks on, and pages fit their windows."""

import runpy
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffucoder import DecodingParams, DiffuCoder
from diffucoder.analysis.report import write
from diffucoder.analysis.settings import Conventions
from diffucoder.decoding.trace import write_traces

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a small report on the shipped model."""
    folder = tmp_path_factory.mktemp("report")
    coder = DiffuCoder.load()
    request = coder.request("Given a number, double the number.", DecodingParams(new_tokens=32, num_samples=2))
    write_traces(folder / "two.jsonl", [result.trace for result in coder.run([request], entropies=32)[0]])
    write(folder, [folder / "two.jsonl"], Conventions())
    return (folder / "index.html").as_uri()


def test_pictures_are_taken_and_nothing_scrolls_sideways(
    browser: Any, server: str, report: str, tmp_path: Path
) -> None:
    script = runpy.run_path(str(DOCS / "screenshots.py"))
    names = ["page_holes", "page_narrow_dark", "order", "order_narrow_dark"]
    assert script["take"](browser, names, tmp_path, server=server, report=report) == []
    for name in names:
        picture = Image.open(tmp_path / f"{name}.png")
        assert picture.size == (script["PICTURES"][name].width, script["PICTURES"][name].height)
        assert len(picture.convert("RGB").getcolors(2**20)) > 20, "more than an empty page"


def test_the_pictures_of_the_documentation_are_those_of_the_script_and_small() -> None:
    pictures = runpy.run_path(str(DOCS / "screenshots.py"))["PICTURES"]
    assert {path.stem for path in DOCS.glob("*.png")} == set(pictures)
    assert sum(path.stat().st_size for path in DOCS.glob("*.png")) < 1_500_000
