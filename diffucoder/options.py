"""Options of commands, made from the fields of a settings class: names, defaults and help are written there, once.

For: `cli`. Not for: what the settings mean, or the commands.
"""

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from diffucoder.config import Settings, nested_settings
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

    Settings inside the settings become options too. `without` names fields that mean nothing to the command, which then
    rejects them. `argument` names the field that is given by position.
    """
    parameters = dict(inspect.signature(command).parameters)
    del parameters[into]
    fields = _flat_fields(of, without)
    for name, field in fields.items():
        parameters[name] = _parameter(name, field, positional=name == argument)
    ordered = sorted(parameters.values(), key=lambda parameter: parameter.kind)

    def wrapped(**options: Any) -> None:  # Any: whatever typer parsed
        settings = _build(of, {name: options.pop(name) for name in fields})
        command(**{into: settings}, **options)

    wrapped.__name__ = command.__name__
    wrapped.__doc__ = command.__doc__
    wrapped.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]  # PEP 362: typer reads it
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
    return wrapped


def _flat_fields(kind: type[Settings], without: tuple[str, ...]) -> dict[str, FieldInfo]:
    """Return the fields of `kind` and of the settings inside it; of two with one name the outer one."""
    fields: dict[str, FieldInfo] = {}
    inner_fields: dict[str, FieldInfo] = {}
    for name, field in kind.model_fields.items():
        inner = nested_settings(field)
        if name in without:
            continue
        if inner is None:
            fields[name] = field
        else:
            inner_fields |= _flat_fields(inner, (*without, *kind.model_fields))
    return fields | inner_fields


def _build(kind: type[Settings], options: dict[str, Any]) -> Settings:
    """Make `kind` of the options that were given, and take them out; the class decides about the others."""
    values = {}
    for name, field in kind.model_fields.items():
        if nested_settings(field) is None:
            value = options.pop(name, None)
            if value not in (None, []):
                values[name] = value
    for name, field in kind.model_fields.items():
        inner = nested_settings(field)
        if inner is not None:
            values[name] = _build(inner, options)
    return kind(**values)


def _parameter(name: str, field: FieldInfo, *, positional: bool) -> inspect.Parameter:
    """Return the parameter of a command for one field, as typer reads it; None or an empty list if it is not given."""
    kind: Any = field.annotation  # Any: annotations are not all plain types
    parts = get_args(kind)
    text = str(field.description)
    names = [f"--{name}"] if kind is bool else []  # else typer adds --no-...
    if get_origin(kind) is tuple:
        item: Any = get_args(parts[0])[0] if get_origin(parts[0]) is Annotated else parts[0]
        kind = list[item]
        text += "; repeatable"
    elif any(get_origin(part) is Literal for part in (kind, *parts)):
        kind = str  # the settings class names the choices when a value is wrong
    if positional:
        default = inspect.Parameter.empty if field.is_required() else None
        about: Any = typer.Argument(help=text)
        place = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Parameter(name, place, default=default, annotation=Annotated[kind, about])
    if not any(field.default is value for value in (None, False, ())):
        text += f" [default: {field.default}]"
    about = typer.Option(*names, help=text, show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, about]
    )
