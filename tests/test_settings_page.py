"""The settings page of the documentation has every setting, with its values, default and meaning."""

import runpy
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from diffucoder.config import Settings

SCRIPT = Path(__file__).parents[1] / "docs" / "settings_reference.py"
MODULES = ("analysis", "evaluation", "serving", "training")


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def rows_of(page: str, kind: type[Settings]) -> dict[str, list[str]]:
    """The table of a class: the cells of each row, by the name of the setting."""
    section = page.partition(f"## {kind.__name__}\n")[2].partition("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")] for line in table]
    return {row[0].strip("`"): row[1:] for row in cells}


def descendants(kind: type[Settings]) -> set[type[Settings]]:
    """Subclasses at any depth, of the package alone."""
    found = {child for child in kind.__subclasses__() if child.__module__.startswith("diffucoder.")}
    return found.union(*(descendants(child) for child in found)) if found else found


def test_every_settings_class_is_on_the_page(script: dict[str, Any]) -> None:
    for name in MODULES:
        import_module(f"diffucoder.{name}.settings")
    assert descendants(Settings) == set(script["CLASSES"])


def test_every_setting_has_values_a_default_and_a_meaning(script: dict[str, Any]) -> None:
    page = script["settings_page"]()
    for kind in script["CLASSES"]:
        rows = rows_of(page, kind)
        assert list(rows) == list(script["own_fields"](kind)), kind
        for name, cells in rows.items():
            assert len(cells) == 3, (kind, name)
            assert all(cells), (kind, name, cells)


def test_values_and_defaults_are_written_in_words(script: dict[str, Any]) -> None:
    from diffucoder.decoding.params import DecodingParams
    from diffucoder.training.settings import TrainSettings

    rows = rows_of(script["settings_page"](), DecodingParams)
    assert rows["policy"][:2] == ["`random`, `max_prob`, `margin`, `entropy`", "`entropy`"]
    assert rows["top_p"][:2] == ["number or none, > 0, ≤ 1", "none"]
    rows = rows_of(script["settings_page"](), TrainSettings)
    assert rows["lr"][:2] == ["number, > 0", "required"]
    assert rows["betas"][:2] == ["2 × number", "`[0.9, 0.95]`"]
    assert rows["keep"][2].endswith("(*resumable*)")
