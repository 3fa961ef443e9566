"""Settings: frozen, validated, filled from TOML and `key=value` overrides; unknown keys are errors with a hint.

A settings class is the only place with a setting, its default and its help. Subclass `Settings`, give every field
a `Field(description=...)`, and read it with `load_settings`. A field may be a settings class itself: it is a table in
TOML, and its settings have full names such as `decoding.steps`.
"""

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from diffucoder.errors import ConfigError
from diffucoder.files import DEEPEST, decode_text, is_deeper, read_bytes


class Settings(BaseModel):
    """Base of every settings class: unknown keys and later changes are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    if not TYPE_CHECKING:  # mypy then keeps the signature that pydantic makes from the fields

        def __init__(self, /, **settings: object) -> None:
            """Validate. Raises ConfigError, one line, instead of pydantic's own error."""
            try:
                super().__init__(**settings)
            except ValidationError as error:
                raise ConfigError(_explain(type(self), error)) from None

        # pydantic then validates a nested class without calling this, and its error names the whole path
        __init__.__pydantic_base_init__ = True


S = TypeVar("S", bound=Settings)


def load_settings(
    kind: type[S], path: Path | None = None, overrides: Iterable[str] = (), start: Mapping[str, Any] | None = None
) -> S:
    """Build `kind` from `start`, a TOML file and then `key=value` overrides. Raises ConfigError."""
    values = dict(start or {})
    if path is not None:
        values |= read_toml(path)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"setting {override!r} is not of the form key=value; write for example lr=1e-5")
        put(values, key.strip(), _parse(text.strip()))
    if is_deeper(values, DEEPEST):
        raise ConfigError(f"settings are tables over {DEEPEST} deep; write names such as lr or decoding.steps")
    return kind(**values)


def put(values: dict[str, Any], key: str, value: Any) -> None:  # Any: TOML values
    """Store a value under its full name: `a.b` is the key `b` of the table `a`. Raises ConfigError."""
    *tables, name = key.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise ConfigError(f"setting {key!r}: {table!r} is not a table, its value is {values!r}")
    values[name] = value


def all_settings(kind: type[Settings], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every setting with its full name, such as `decoding.steps` for a nested class."""
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            yield from all_settings(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def read_toml(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file. Raises ConfigError."""
    try:
        content = tomllib.loads(decode_text(read_bytes(path)))
        if is_deeper(content, DEEPEST):
            raise ValueError(f"tables over {DEEPEST} deep")
        return content
    except OSError as error:
        raise ConfigError(f"settings file {str(path)!r} cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError) as error:  # also integers of thousands of digits, and brackets as deep
        raise ConfigError(f"settings file {str(path)!r} is not TOML: {error}") from None


def _parse(text: str) -> Any:  # Any: a TOML value
    """Return a TOML value if `text` is one, else the text, so that strings need no quotes on a command line."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def _explain(kind: type[Settings], error: ValidationError) -> str:
    # a misspelt name first: it may be the reason why another setting is missing
    first = min(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in first["loc"])
    settings = dict(all_settings(kind))
    if first["type"] == "extra_forbidden":
        return f"unknown setting {_shown(key)}; {suggestion(key, sorted({*settings, *kind.model_fields}))}"
    if first["type"] == "missing":
        return _name_missing(error)
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:  # a rule over several settings names them itself
        return message
    if first["type"] == "value_error" and key in kind.model_fields and key not in settings:
        return f"in [{key}]: {message}"
    field = settings.get(key)
    description = f" ({field.description})" if field and field.description else ""
    shown = f"{key}={_shown(first['input'])}"
    if field and not field.repr:  # a secret
        shown = key
    return f"{shown}: {message[:1].lower()}{message[1:]}{description}"


def _shown(value: object) -> str:
    """Return the repr of a value, cut if it is long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _name_missing(error: ValidationError) -> str:
    missing = [".".join(map(str, detail["loc"])) for detail in error.errors() if detail["type"] == "missing"]
    if len(missing) == 1:
        return f"setting {missing[0]!r} is missing; give it in the settings file or as --set {missing[0]}=..."
    return f"settings {', '.join(missing)} are missing; give them in the settings file or as --set {missing[0]}=..."


def suggestion(key: str, known: list[str]) -> str:
    """Return a known name for an unknown one: the same name in a table, or a similar one."""
    likely = [name for name in known if name.endswith(f".{key}")] or get_close_matches(key, known, n=1)
    return f"did you mean {likely[0]!r}?" if likely else f"known: {', '.join(known)}"
