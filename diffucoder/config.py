"""Settings: frozen, validated, filled from TOML and `key=value` overrides; unknown keys are refused with a hint.

A settings class is the one place where a setting, its default and its help are written. Subclass `Settings`, give every
field a `Field(description=...)`, and read it with `load_settings`.
"""

import tomllib
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from diffucoder.errors import ConfigError


class Settings(BaseModel):
    """Base of every settings class: unknown keys and later changes are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    if not TYPE_CHECKING:  # mypy then keeps the signature that pydantic makes from the fields

        def __init__(self, **settings: object) -> None:
            """Validate. Raises ConfigError, one line, in place of pydantic's own error."""
            try:
                super().__init__(**settings)
            except ValidationError as error:
                raise ConfigError(_explain(type(self), error)) from None


S = TypeVar("S", bound=Settings)


def load_settings(kind: type[S], path: Path | None = None, overrides: Iterable[str] = ()) -> S:
    """Build `kind` from a TOML file and then `key=value` overrides. Raises ConfigError naming value, rule, way out."""
    values: dict[str, Any] = {}
    if path is not None:
        values |= _read_toml(path)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"setting {override!r} is not of the form key=value; write for example lr=1e-5")
        values[key.strip()] = _parse(text.strip())
    return kind(**values)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"settings file {str(path)!r} cannot be read ({error.strerror}); check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"settings file {str(path)!r} is not TOML: {error}") from None


def _parse(text: str) -> Any:  # Any: a TOML value
    """A TOML value where `text` is one, else the text itself, so that strings need no quotes on a command line."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(kind: type[Settings], error: ValidationError) -> str:
    # a misspelt name first: it may be why another setting is missing
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        close = get_close_matches(key, kind.model_fields, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(kind.model_fields))}"
        return f"unknown setting {key!r}; {hint}"
    if first["type"] == "missing":
        return f"setting {key!r} is missing; give it in the settings file or as {key}=..."
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:  # a rule over several settings names them itself
        return message
    field = kind.model_fields.get(key)
    about = f" ({field.description})" if field is not None and field.description else ""
    return f"{key}={first['input']!r}: {message[:1].lower()}{message[1:]}{about}"
