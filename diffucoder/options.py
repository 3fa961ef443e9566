"""Options of commands, made from the fields of a settings class: names, defaults and help are written there, once."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from diffucoder.config import Settings, all_settings, put
from diffucoder.decoding.params import DecodingParams


def with_options(
    command: Callable[..., None],
    *,
    of: type[Settings] = DecodingParams,
    into: str = "params",
    without: tuple[str, ...] = (),
    argument: str = "",
) -> Callable[..., None]:
    """Give `command` an option for each field of `of`; the command gets the settings as its parameter `into`.

    Settings inside the settings become options too; of two with one name the outer one. `without` names fields that
    mean nothing to the command, which then rejects them. `argument` names the field that is given by position.
    """
    parameters = dict(inspect.signature(command).parameters)
    del parameters[into]
    full_names: dict[str, str] = {}
    for full_name, field in sorted(all_settings(of), key=lambda setting: "." in setting[0]):
        tables_and_name = full_name.split(".")
        name = tables_and_name[-1]
        if name not in full_names and not set(tables_and_name).intersection(without):
            full_names[name] = full_name
            parameters[name] = _parameter(name, field, positional=name == argument)
    ordered = sorted(parameters.values(), key=lambda parameter: parameter.kind)

    def wrapped(**options: Any) -> None:  # Any: whatever typer parsed
        values: dict[str, Any] = {}
        for name, full_name in full_names.items():
            value = options.pop(name)
            if value not in (None, []):
                put(values, full_name, value)
        command(**{into: of(**values)}, **options)

    wrapped.__name__ = command.__name__
    wrapped.__doc__ = command.__doc__
    wrapped.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]  # PEP 362: typer reads it
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
    return wrapped


def _parameter(name: str, field: FieldInfo, *, positional: bool) -> inspect.Parameter:
    """Return the parameter of a command for one field, as typer reads it; None or an empty list if it is not given."""
    kind: Any = field.annotation  # Any: annotations are not all plain types
    parts = get_args(kind)
    text = str(field.description)
    if get_origin(kind) is tuple:
        kind = list[Path] if parts[0] is Path else list[str]
        text += "; repeatable"
    elif any(get_origin(part) is Literal for part in (kind, *parts)):
        kind = str  # the settings class names the choices when a value is wrong
    if positional:
        default = inspect.Parameter.empty if field.is_required() else None
        argument = Annotated[kind, typer.Argument(help=text)]
        place = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Parameter(name, place, default=default, annotation=argument)
    if not any(field.default is value for value in (None, False, ())):
        text += f" [default: {field.default}]"
    names = [f"--{name}"] if kind is bool else []  # else typer adds --no-...
    option = Annotated[kind | None, typer.Option(*names, help=text, show_default=False)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option)
