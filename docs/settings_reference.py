"""The settings page, made from the settings classes: `python docs/settings_reference.py` prints it as Markdown."""

import inspect
import json
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from diffucoder.analysis.settings import Conventions
from diffucoder.config import Settings
from diffucoder.decoding.params import DecodingParams
from diffucoder.evaluation.settings import EvaluateSettings, OrderSettings, RunSettings
from diffucoder.serving.settings import EngineSettings, ScaleSettings, ServerSettings
from diffucoder.training.settings import (
    MAY_CHANGE,
    AdaptSettings,
    DataSettings,
    DiffusionSettings,
    GrpoSettings,
    PretrainSettings,
    RolloutParams,
    SftSettings,
    TextSettings,
    TrainSettings,
)

_RECIPE = "in a recipe or as `--set name=value`"
CLASSES: dict[type[Settings], str] = {
    DecodingParams: "the options of `diffucoder generate`, `infill` and `chat` (`--new-tokens` for `new_tokens`), "
    "`diffucoder serve --set name=value`, the field `decoding` of a request to the server, and Python",
    TrainSettings: f"every `diffucoder train STAGE`, {_RECIPE}",
    DataSettings: "the stages, each of which reads data",
    TextSettings: "the stages that train on text: `pretrain`, `adapt` and `sft`",
    DiffusionSettings: "the stages with the masked objective: `adapt` and `sft`",
    PretrainSettings: f"`diffucoder train pretrain`, {_RECIPE}",
    AdaptSettings: f"`diffucoder train adapt`, {_RECIPE}",
    SftSettings: f"`diffucoder train sft`, {_RECIPE}",
    GrpoSettings: f"`diffucoder train grpo`, {_RECIPE}",
    RolloutParams: "the table `[decoding]` of `diffucoder train grpo`, as in `--set decoding.temperature=0.7`",
    RunSettings: "the options of `diffucoder evaluate` and `diffucoder order`, with those of `DecodingParams`",
    EvaluateSettings: "the options of `diffucoder evaluate`",
    OrderSettings: "the options of `diffucoder order`",
    Conventions: "the options of `diffucoder order`, and `diffucoder.analysis.runs.ar_ness`",
    ServerSettings: "a server that is started from Python",
    EngineSettings: "`diffucoder serve --limit name=value`",
    ScaleSettings: "`serve run diffucoder.serving.scale:app name=value`",
}

_BOUNDS = {
    "ge": "≥ {}",
    "gt": "> {}",
    "le": "≤ {}",
    "lt": "< {}",
    "min_length": "length ≥ {}",
    "multiple_of": "multiple of {}",
}
_NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path", types.NoneType: "none"}
_HEAD = """# Settings

This page is generated from the settings classes, so it is complete. Unknown names and wrong values are errors.
A required setting has no default. The default `none` means that a setting is off, or that the program chooses.
A resumed run may change the settings that are marked *resumable*; they do not affect what is learnt.
"""


def settings_page() -> str:
    """Return the page: a table for each class, in the order of `CLASSES`."""
    parts = [_HEAD]
    for kind, used_by in CLASSES.items():
        summary = (inspect.getdoc(kind) or "").partition("\n")[0]
        parts.append(f"## {kind.__name__}\n\n{summary}\n\n*Where:* {used_by}.{_parent(kind)}\n")
        parts.append("| setting | values | default | meaning |\n| --- | --- | --- | --- |")
        for name, field in own_fields(kind).items():
            cells = (f"`{name}`", values_of(field), default_of(field), meaning_of(field))
            parts.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
        parts.append("")
    return "\n".join(parts)


def own_fields(kind: type[Settings]) -> dict[str, FieldInfo]:
    """Return the fields that a class adds to its parent, or changes."""
    return {name: field for name, field in kind.model_fields.items() if name in kind.__annotations__}


def _parent(kind: type[Settings]) -> str:
    parent = kind.__base__
    if parent is None or parent is Settings:
        return ""
    return f" All settings of [{parent.__name__}](#{parent.__name__.lower()}) can be given too."


def values_of(field: FieldInfo) -> str:
    """Return the type of a field in words, or its choices, and its bounds."""
    bounds = []
    for rule in field.metadata:
        for attribute, text in _BOUNDS.items():
            if hasattr(rule, attribute):
                bounds.append(text.format(_number(getattr(rule, attribute))))
    return ", ".join([_words(field.annotation), *bounds])


def default_of(field: FieldInfo) -> str:
    """Return the default as it is written on a command line."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its defaults"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{json.dumps(value)}`" if value else "empty"
    return f"`{_number(value)}`"


def meaning_of(field: FieldInfo) -> str:
    """Return the help of a field."""
    resumable = " (*resumable*)" if MAY_CHANGE in field.metadata else ""
    nested = _settings_class(field.annotation)
    text = (field.description or "").replace("[", "\\[")  # no link
    if nested is not None:
        text = f"{text}; see [{nested.__name__}](#{nested.__name__.lower()})".removeprefix("; ")
    return text + resumable


def _settings_class(annotation: Any) -> type[Settings] | None:  # Any: a type of Python's typing
    is_settings = isinstance(annotation, type) and issubclass(annotation, Settings)
    return annotation if is_settings else None


def _words(annotation: Any) -> str:  # Any: a type of Python's typing
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(argument) for argument in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_words(arguments[0])}"
        return f"{len(arguments)} × {_words(arguments[0])}"
    nested = _settings_class(annotation)
    if nested is not None:
        return f"table of {nested.__name__}"
    return _NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _number(value: Any) -> str:  # Any: a default or a bound
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    print(settings_page())
