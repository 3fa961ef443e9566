"""The laboratories: commands that go on after a stop, the comparison of arms, and the pages that they fill."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from diffucoder.metrics import wilson
from recipes.report import drawing, table, update_page
from recipes.runner import RunFolder, setting_text
from recipes.tiny import grpo

# --- commands --------------------------------------------------------------------------------------------------------


def test_a_command_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunFolder(tmp_path / "runs").run(["-c", "pass"])
    assert capsys.readouterr().out.splitlines() == [f"$ {sys.executable} -c pass"]


def test_a_command_that_fails_ends_the_laboratory_with_its_status(tmp_path: Path) -> None:
    runs = RunFolder(tmp_path)
    with pytest.raises(SystemExit) as ended:
        runs.run(["-c", "raise SystemExit(3)"])
    assert ended.value.code == 3


def test_a_finished_run_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = RunFolder(tmp_path)
    for folder in ("trained/model", "converted"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "tokenizer_config.json").write_text("{}")
    (tmp_path / "trained.solved.json").write_text('{"64": {"share": 0.5}}')
    assert runs.train("trained", "adapt", Path("none.toml"), {}) == tmp_path / "trained" / "model"
    assert runs.convert(Path("none"), "converted") == tmp_path / "converted"
    assert runs.solve("trained", None, []) == {"64": {"share": 0.5}}
    assert capsys.readouterr().out == ""


def test_settings_are_written_as_the_command_line_reads_them() -> None:
    assert [setting_text(value) for value in (True, ["a"], 3, 1e-3, "x")] == ["true", '["a"]', "3", "0.001", "x"]


# --- the comparison of arms ------------------------------------------------------------------------------------------


def test_arms_of_fewer_passes_are_given_more_steps() -> None:
    steps = {arm: grpo.steps_of(arm) for arm in grpo.ARMS}
    assert steps["coupled"] == steps["decoupled"] == grpo.RECIPE["steps"]
    assert steps["full_mask"] == steps["d1"] > steps["coupled"]


def test_gains_are_paired_and_vary_over_seeds_and_problems() -> None:
    before = np.array([1, 0, 0, 1] * 100)
    after = [np.array([1, 1, 0, 1] * 100), np.array([1, 1, 0, 0] * 100)]
    middle, half = grpo.difference([(before, each) for each in after])
    assert middle == pytest.approx(0.125)
    seeds = 12.71 * (0.25 / 2**0.5) / 2**0.5  # gains of 0.25 and 0
    problems = 1.96 * (0.5**2 * 3 / 4 / 400 * 400 / 399 * 0.75) ** 0.5
    assert half == pytest.approx((seeds**2 + problems**2) ** 0.5, rel=0.02)
    assert grpo.difference([(before, before)]) == (0, 0)
    _, alone = grpo.difference([(before, after[0])])
    assert 0 < alone < 0.05


def test_the_exercises_are_hard_problems_in_lower_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = grpo.problems
    monkeypatch.setattr(grpo, "problems", lambda split, count, **more: draw(split, 5, **more))
    grpo.make_data(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"train/{n}" for n in range(5)]
    assert all(row["prompt"] == row["prompt"].lower() and len(row["tests"]) == 5 for row in rows)
    assert (tmp_path / "dev.jsonl").exists()


# --- pages -----------------------------------------------------------------------------------------------------------


def test_a_report_fills_its_sections_and_leaves_the_text_around_them(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n<!-- a -->\nold\n<!-- /a -->\n\nby hand\n")
    update_page(page, {"a": "new", "b": "more"})
    text = page.read_text()
    assert text.startswith("# Title\n\n<!-- a -->\nnew\n<!-- /a -->\n\nby hand\n")
    assert text.endswith("<!-- b -->\nmore\n<!-- /b -->\n\n")
    update_page(page, {"a": "new", "b": "more"})
    assert page.read_text() == text


def test_tables_align_figures_to_the_right() -> None:
    assert table(["arm", "steps"], [["a", 3]]) == "| arm | steps |\n| --- | --: |\n| a | 3 |"


def test_the_interval_of_a_share_is_wilsons() -> None:
    low, high = wilson(0, 60)
    assert low == pytest.approx(0, abs=1e-12)
    assert high == pytest.approx(0.0602, abs=1e-4)
    assert wilson(1595, 2000) == pytest.approx((0.7793, 0.8145), abs=1e-4)


def test_the_same_drawing_gives_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        with drawing(tmp_path / f"{name}.svg") as axes:
            axes.plot([1, 2], [3, 4])
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
