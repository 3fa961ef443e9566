"""`diffucoder train STAGE`: one command a stage, whose help lists its settings."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from diffucoder.cli.common import GroupedHelp, naming_extra
from diffucoder.config import all_settings, load_settings
from diffucoder.files import Json
from diffucoder.model_files import read_json
from diffucoder.training.settings import STAGES, TrainSettings

train = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    help="Train a model, stage by stage. The repository's recipes/ has settings to begin with.",
)


def run_stage(
    context: typer.Context,
    recipe: Annotated[Path | None, typer.Argument(help="TOML file of settings")] = None,
    *,
    changes: Annotated[list[str] | None, typer.Option("--set", help="name=value, over the file; repeatable")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="continue from the newest checkpoint of the run folder")
    ] = False,
) -> None:
    """Run the stage that the command is named after."""
    stage = str(context.info_name)
    overrides = list(changes or ())
    if resume:
        overrides.append("resume=true")
    settings = load_settings(STAGES[stage], recipe, overrides, _begun_with(overrides) if resume else None)
    with naming_extra("train", "training needs"):
        function = getattr(import_module(f"diffucoder.training.{stage}"), stage)
    folder = function(settings)
    from diffucoder.training.processes import exit_worker, first_process

    if first_process():  # every process of a distributed run comes here
        following = f"convert {folder} START" if stage == "pretrain" else f"generate --model {folder} ..."
        print(f"model in {folder}; try: diffucoder {following}")
    exit_worker()


def _begun_with(overrides: list[str]) -> Json:
    """The settings that the run in `run=...` began with; none if there is no such run."""
    for override in overrides:
        name, _, folder = override.partition("=")
        if name.strip() == "run":
            return read_json(Path(folder.strip(" \"'")) / "settings.json")
    return {}


def _help(kind: type[TrainSettings]) -> str:
    """Return the summary of a stage, and every setting with its default."""
    lines = []
    for name, field in all_settings(kind):
        default = "" if field.is_required() else f" [{field.default}]"
        lines.append(f"{name}{default}: {field.description}")
    summary = (kind.__doc__ or "").splitlines()[0]
    return f"{summary}\n\nSettings, in RECIPE or as --set name=value:\n\n\b\n" + "\n".join(lines)


for _stage, _kind in STAGES.items():
    train.command(_stage, cls=GroupedHelp, help=_help(_kind), short_help=_help(_kind).partition("\n")[0])(run_stage)
