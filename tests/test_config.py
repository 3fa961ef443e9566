"""Settings: where values come from, which one wins, and what a wrong one is told."""

from pathlib import Path
from typing import Self

import pytest
from pydantic import Field, model_validator

from diffucoder.config import Settings, all_settings, load_settings
from diffucoder.errors import ConfigError


class Recipe(Settings):
    """Stands for any settings class."""

    lr: float = Field(default=1e-3, gt=0, description="peak of the schedule")
    steps: int = Field(default=10, ge=1, description="optimiser steps")
    name: str = Field(default="plain", description="of the run")
    ratios: tuple[float, ...] = Field(default=(), description="of the mixture")


class Named(Settings):
    """A setting without a default."""

    model: str = Field(description="where to start")


class Ranged(Settings):
    """A rule over two settings."""

    low: int = Field(default=0, description="where to begin")
    high: int = Field(default=9, description="where to end")

    @model_validator(mode="after")
    def _low_is_below_high(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}; lower it")
        return self


class Nested(Settings):
    """Settings inside settings."""

    seed: int = Field(default=0, description="of the run")
    inner: Recipe = Field(default=Recipe(), description="of the part")
    pair: Ranged = Field(default=Ranged(), description="of the other part")


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text('lr = 2e-5\nname = "warm"\nratios = [0.5, 0.25]\n')
    return path


def test_defaults_stand_where_nothing_is_said() -> None:
    assert load_settings(Recipe) == Recipe() == Recipe(lr=1e-3, steps=10, name="plain", ratios=())


def test_the_file_overrides_the_defaults(toml: Path) -> None:
    assert load_settings(Recipe, toml) == Recipe(lr=2e-5, name="warm", ratios=(0.5, 0.25))


def test_set_overrides_the_file_and_the_last_one_wins(toml: Path) -> None:
    settings = load_settings(Recipe, toml, ["lr=1e-4", "steps=3", "steps = 4", "ratios=[1.0]"])
    assert settings == Recipe(lr=1e-4, steps=4, name="warm", ratios=(1.0,))


@pytest.mark.parametrize("text", ["bare", "two words", "a/path.toml", "x=y", '"quoted"'])
def test_strings_need_no_quotes_on_the_command_line(text: str) -> None:
    assert load_settings(Recipe, overrides=[f"name={text}"]).name == text.strip('"')


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stepz=3"], "unknown setting 'stepz'; did you mean 'steps'?"),
        (["temperature=1"], "unknown setting 'temperature'; known: lr, name, ratios, steps"),
        (["steps"], "setting 'steps' is not of the form key=value; write for example lr=1e-5"),
        (["steps=0"], "steps=0: input should be greater than or equal to 1 (optimiser steps)"),
        (["lr=fast"], "lr='fast': input should be a valid number, unable to parse string as a number"),
        (["lr=fast"], "(peak of the schedule)"),
        (["steps=2.5"], "steps=2.5: input should be a valid integer"),
        (['ratios=["half"]'], "ratios.0='half': input should be a valid number"),
    ],
)
def test_a_wrong_value_is_told_its_name_and_its_rule(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_settings(Recipe, overrides=overrides)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_unknown_key_of_a_file_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / "typo.toml").write_text("nmae = 'x'\n")
    with pytest.raises(ConfigError, match="unknown setting 'nmae'; did you mean 'name'"):
        load_settings(Recipe, tmp_path / "typo.toml")


def test_a_missing_setting_says_how_to_give_it() -> None:
    with pytest.raises(ConfigError, match=r"setting 'model' is missing; .*as --set model="):
        load_settings(Named)


def test_a_misspelt_setting_is_told_before_one_that_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'modle'; did you mean 'model'\?"):
        load_settings(Named, overrides=["modle=x"])


def test_a_rule_over_several_settings_speaks_for_itself() -> None:
    with pytest.raises(ConfigError, match=r"^low=10 is above high=9; lower it$"):
        load_settings(Ranged, overrides=["low=10"])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml' cannot be read \(No such file or directory\); check the path"):
        load_settings(Recipe, tmp_path / "none.toml")


@pytest.mark.parametrize("content", [b"lr = = 1\n", b"[recipe\n", b"name = '\xff'\n"])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"broken\.toml' is not TOML"):
        load_settings(Recipe, tmp_path / "broken.toml")


def test_settings_made_by_hand_are_validated_like_those_of_a_file() -> None:
    with pytest.raises(ConfigError, match="steps=-1"):
        Recipe(steps=-1)


def test_settings_do_not_change() -> None:
    settings = Recipe()
    with pytest.raises(ValueError, match="frozen"):
        settings.steps = 5  # type: ignore[misc]  # what the test is about


# --- nested settings -------------------------------------------------------------------------------------------------


def test_a_nested_class_is_a_table_of_the_file_and_has_full_names_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "nested.toml").write_text("seed = 3\n[inner]\nlr = 2e-5\nsteps = 7\n")
    settings = load_settings(Nested, tmp_path / "nested.toml", ["inner.steps=8", "inner.name=part", "pair.low = 2"])
    assert settings == Nested(seed=3, inner=Recipe(lr=2e-5, steps=8, name="part"), pair=Ranged(low=2))


def test_all_settings_have_their_full_names() -> None:
    names = [name for name, _ in all_settings(Nested)]
    assert names == ["seed", "inner.lr", "inner.steps", "inner.name", "inner.ratios", "pair.low", "pair.high"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["inner.stepz=3"], "unknown setting 'inner.stepz'; did you mean 'inner.steps'?"),
        (["steps=3"], "unknown setting 'steps'; did you mean 'inner.steps'?"),
        (["iner.steps=3"], "unknown setting 'iner'; did you mean 'inner'?"),
        (["inner.steps=0"], "inner.steps=0: input should be greater than or equal to 1 (optimiser steps)"),
        (["inner=3"], "inner=3: input should be a valid dictionary or instance of Recipe"),
        (["pair.low=10"], "in [pair]: low=10 is above high=9; lower it"),
        (["seed=3", "seed.low=4"], "setting 'seed.low': 'seed' is not a table, its value is 3"),
    ],
)
def test_a_wrong_nested_value_is_told_its_full_name(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_settings(Nested, overrides=overrides)
    assert str(refused.value) == message
