"""Options of commands, made from the fields of a settings class: names, defaults and help are written there, once.

For: `cli`. Not for: what the settings mean, or the commands.
"""

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from diffucoder.config import Settings
from diffucoder.decoding.params import DecodingParams


def with_options(
    command: Callable[..., None],
    *,
    of: type[Settings] = DecodingParams,
    into: str = "params",
    without: tuple[str, ...] = (),
) -> Callable[..., None]:
    """Give `command(*, params, **own)` one option for each field of `of`, gathered into `params`, or what `into` names.

    `without` names the fields that mean nothing to the command, which then refuses them.
    """
    own = [p for p in inspect.signature(command).parameters.values() if p.name != into]
    fields = {name: field for name, field in of.model_fields.items() if name not in without}
    made = []
    for name, field in fields.items():
        kind: Any = list[str] if name == "stop" else field.annotation  # Any: annotations are not all plain types
        if any(get_origin(part) is Literal for part in (kind, *get_args(kind))):
            kind = str | None  # pydantic knows the choices and names them when one is wrong
        annotation = Annotated[kind, typer.Option(help=field.description, show_default=field.default not in (None, ()))]
        default = [] if name == "stop" else field.default
        made.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation))

    def wrapped(**options: Any) -> None:  # Any: whatever typer parsed
        chosen = {name: options.pop(name) for name in fields}
        command(**{into: of(**chosen)}, **options)

    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    signature = inspect.Signature([*own, *made])
    wrapped.__signature__ = signature  # type: ignore[attr-defined]  # PEP 362: what typer reads
    wrapped.__annotations__ = {p.name: p.annotation for p in (*own, *made)}
    return wrapped
