"""`diffucoder train`: settings from recipes and --set, real runs of a few steps, refusals of one line.

The stages themselves are tested in tests/training; here is what stands between a user and them.
"""

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from commands import Outcome, Run, assert_refused, process
from transformers import Qwen2ForCausalLM

from diffucoder import DiffuCoder
from diffucoder.config import all_settings, load_settings
from diffucoder.models.hub import SHIPPED
from diffucoder.training.settings import STAGES, TrainSettings

RECIPES = Path(__file__).parents[2] / "recipes"
STAGE_OF = {
    "parent": "pretrain",
    "adapt": "adapt",
    "mid": "adapt",
    "sft": "sft",
    "grpo": "grpo",
}  # by how a recipe's name begins
FILES = [*sorted((RECIPES / "7b").glob("*.toml")), *sorted((RECIPES / "tiny").glob("*.toml"))]
STAGE_RECIPES = [path for path in FILES if path.stem not in ("budgets", "wording")]


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    """The arguments of a run of four steps that takes a second."""
    code = [{"text": f"def f{n}(xs):\n    return [x + {n} for x in xs]\n"} for n in range(20)]
    chats = [{"prompt": f"Add {n}.", "answer": "x + 1"} for n in range(8)]
    for name, records in (("code", code), ("chats", chats)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return said(
        **{"run": tmp_path / "run", "cache": tmp_path / "cache", "data": [str(tmp_path / "code.jsonl")]},
        **{"steps": 4, "batch": 2, "lr": 1e-2, "save_every": 2, "log_every": 1},
    )


def said(**values: Any) -> list[str]:
    """The settings as a user writes them on the command line."""
    texts = {name: json.dumps(v) if isinstance(v, list) else str(v) for name, v in values.items()}
    return [part for name, text in texts.items() for part in ("--set", f"{name}={text}")]


def parent(*arguments: str) -> list[str]:
    sizes = said(tokenizer=SHIPPED, hidden=64, layers=1, intermediate=64, context=16, positions=64)
    return ["train", "pretrain", *arguments, *sizes]


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


# --- help ------------------------------------------------------------------------------------------------------------


def test_help_names_the_stages(cli: Run) -> None:
    code, out, err = cli("train", "--help")
    assert (code, err) == (0, "")
    assert all(stage in out for stage in STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_help_lists_every_setting_with_its_default_and_what_it_is(cli: Run, stage: str) -> None:
    code, out, err = cli("train", stage, "--help")
    assert (code, err) == (0, "")
    printed = [line.strip() for line in out.splitlines()]
    for name, field in all_settings(STAGES[stage]):
        assert field.description, name
        default = "" if field.is_required() else f" [{field.default}]"
        assert f"{name}{default}: {field.description}" in printed


# --- recipes ---------------------------------------------------------------------------------------------------------


def read(stage: str, values: dict[str, Any]) -> TrainSettings:
    """Settings of a recipe, completed by what `recipes/tiny/lab.py` or a user fills in."""
    filled_in = {"run": "runs/x", "data": ["x.jsonl"], **({"tokenizer": "x"} if stage == "pretrain" else {})}
    return STAGES[stage](**{**filled_in, **values})


@pytest.mark.parametrize("path", STAGE_RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_recipe_fits_its_stage(path: Path) -> None:
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    settings = read(STAGE_OF[path.stem.partition("-")[0]], values)
    assert {name: getattr(settings, name) for name in values if name == "steps"} == {
        name: value for name, value in values.items() if name == "steps"
    }
    if path.parent.name == "7b":  # these stand by themselves
        assert load_settings(type(settings), path) == settings


@pytest.mark.parametrize("budget", ["tiny", "lab", "quick"])
def test_every_budget_fits_its_recipes(budget: str) -> None:
    changes = tomllib.loads((RECIPES / "tiny" / "budgets.toml").read_text(encoding="utf-8"))[budget]
    for name, stage in STAGE_OF.items():
        recipe = tomllib.loads((RECIPES / "tiny" / f"{name}.toml").read_text(encoding="utf-8"))
        assert read(stage, {**recipe, **changes.get(name, {})}).steps > 0


def test_there_are_recipes_of_every_stage() -> None:
    for folder, stages in (("7b", {"adapt", "mid", "sft", "grpo"}), ("tiny", set(STAGE_OF))):
        assert stages <= {path.stem for path in STAGE_RECIPES if path.parent.name == folder}


# --- runs ------------------------------------------------------------------------------------------------------------


def test_the_stages_follow_each_other(cli: Run, settings: list[str], tmp_path: Path) -> None:
    chats = said(data=[str(tmp_path / "chats.jsonl")], length=64)
    started = {
        "pretrain": parent(*settings, *said(run=tmp_path / "pretrain")),
        "adapt": ["train", "adapt", *settings, *said(run=tmp_path / "adapt", context=16)],
        "sft": ["train", "sft", *settings, *said(run=tmp_path / "sft"), *chats],
    }
    before = None
    for stage, arguments in started.items():
        model = said(model=before) if before else []
        code, out, _ = cli(*arguments, *model)
        before = tmp_path / stage / "model"
        hint = f"convert {before} START" if stage == "pretrain" else f"generate --model {before} ..."
        assert (code, out) == (0, f"model in {before}; try: diffucoder {hint}\n")
        assert [line["step"] for line in metrics(tmp_path / stage)] == [1, 2, 3, 4]
    assert DiffuCoder.load(before).tokenizer.mask_id == 3
    answered = cli("generate", "Add 1.", "--model", before, "--new-tokens", 4, "--steps", 2)
    assert (answered.code, answered.err) == (0, "")


def test_settings_come_from_a_recipe_and_then_from_set(cli: Run, settings: list[str], tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("steps = 400\nwarmup = 2\nseed = 5\n")
    assert cli(*parent(str(tmp_path / "recipe.toml"), *settings, *said(seed=6))).code == 0
    written = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert (written["steps"], written["warmup"], written["seed"]) == (4, 2, 6)


def test_resume_goes_on_from_the_newest_checkpoint(cli: Run, settings: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cli(*parent(*settings)).code == 0
    weights, figures = (run / "model" / "model.safetensors").read_bytes(), metrics(run)
    (run / "checkpoints" / "step-00000004" / "whole.json").unlink()
    (run / "model" / "model.safetensors").unlink()
    code, _, err = cli(*parent(*settings, "--resume"))
    assert code == 0
    assert "step-00000004 is torn" in err
    assert (run / "model" / "model.safetensors").read_bytes() == weights
    assert metrics(run) == figures


def test_resume_without_a_run_begins_one(cli: Run, settings: list[str], tmp_path: Path) -> None:
    assert cli(*parent(*settings, "--resume")).code == 0
    assert len(metrics(tmp_path / "run")) == 4


def test_a_run_folder_that_is_taken_is_refused(cli: Run, settings: list[str], tmp_path: Path) -> None:
    assert cli(*parent(*settings)).code == 0
    before = metrics(tmp_path / "run")
    assert_refused(
        _fresh(cli(*parent(*settings))), "holds a run already; resume it with --resume", "or name another folder"
    )
    assert_refused(
        _fresh(cli(*parent(*settings, "--resume", *said(lr=0.5)))), "lr=0.5 but the run in", "began with 0.01"
    )
    assert metrics(tmp_path / "run") == before


def test_a_process_trains_and_says_where_the_model_is(settings: list[str], tmp_path: Path) -> None:
    outcome = process(*parent(*settings))
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith(f"model in {tmp_path / 'run' / 'model'}; ")
    assert outcome.out.count("\n") == 1
    assert "Warning" not in outcome.err


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["adapt"], ["settings run, steps, lr, data are missing; give them in the settings file or as --set run=..."]),
        (["adapt", *said(run="x", steps=1, lr=1)], ["setting 'data' is missing"]),
        (["adapt", *said(contxt=3)], ["unknown setting 'contxt'; did you mean 'context'?"]),
        (["sft", *said(run="x", data=["y"], lr=1, anneal_steps=3)], ["unknown setting 'anneal_steps'"]),
        (["sft", "--set", "lr"], ["setting 'lr' is not of the form key=value"]),
        (["sft", *said(run="x", data=["y"], lr="fast")], ["lr='fast'", "valid number", "peak learning rate"]),
        (["sft", *said(run="x", data=["y"], lr=1, spare=4)], ["error: spare=4 needs padding='flexible'"]),
        (["sft", *said(run="x", data=["/no/such"], lr=1, length=64)], ["'/no/such' is not a folder or a file"]),
        (["sft", *said(run="x", data=["y"], lr=1)], ["length=2048 exceeds the model's context of 512"]),
        (["sft", *said(run="x", data=["y"], lr=1, model="nobody")], ["model 'nobody' is not a folder"]),
        (["adapt", "/no/such.toml"], ["settings file '/no/such.toml' cannot be read"]),
        (["adapt", "--steps", "3"], ["No such option", "--steps", "train adapt --help"]),
        (["grow"], ["No such command 'grow'", "train --help"]),
    ],
)
def test_bad_settings_are_one_line(
    cli: Run, arguments: list[str], parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(cli("train", *arguments), *parts)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_is_no_toml_is_one_line(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("steps: 3\n")
    assert_refused(cli("train", "adapt", tmp_path / "recipe.toml"), "recipe.toml' is not TOML")


def test_without_the_extra_training_says_what_to_install(
    cli: Run, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # as if nobody had imported them yet
    for name in ("pretrain", "adapt", "masked", "run", "trainer", "processes", "checkpoints"):
        monkeypatch.delitem(sys.modules, f"diffucoder.training.{name}", raising=False)
    assert Qwen2ForCausalLM  # imported, since transformers only does that if accelerate is there or not installed
    monkeypatch.setitem(sys.modules, "accelerate", None)
    refusal = "training needs accelerate; run pip install -e '.[train]' in a clone of the repository"
    assert_refused(cli(*parent(*settings)), refusal)


def _fresh(outcome: Outcome) -> Outcome:
    """Forget accelerate's state, which a refused run leaves in this process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    return outcome
