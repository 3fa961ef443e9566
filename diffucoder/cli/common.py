"""What several commands share: their options and help, loading a model, naming the extra that is not installed."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from diffucoder.config import Settings, all_settings, put
from diffucoder.decoding.params import DecodingParams
from diffucoder.errors import ConfigError, install

if TYPE_CHECKING:
    import torch

    from diffucoder.decoding.coder import DiffuCoder

_DTYPES = ("float32", "bfloat16", "float16")
_DEVICES = ("cpu", "cuda", "mps")
_VARIABLES = ("model", "dtype", "device", "host", "port")  # options with a variable, such as $DIFFUCODER_MODEL

# Decoding settings under the headings of --help; the rest is under Options
_GROUPS = {
    "Sampling": ("temperature", "top_p", "top_k", "num_samples", "seed", "stop", "syntax"),
    "Order": ("policy", "policy_temperature", "block", "end_last", "end_penalty"),
    "Speed": ("preset", "steps", "threshold", "factor", "entropy_bound", "stable", "revoke", "cache", "eps"),
}

Model = Annotated[
    str | None,
    typer.Option(
        help="folder, Hub id, or name from `diffucoder models`; if left out, the shipped model",
        envvar="DIFFUCODER_MODEL",
        show_envvar=False,
    ),
]


def _choice(name: str, choices: tuple[str, ...], text: str) -> Any:  # Any: as typer has it
    """The option with a variable, such as $DIFFUCODER_DTYPE, that takes one of `choices`."""
    return typer.Option(
        help=text,
        metavar="|".join(choices),
        autocompletion=lambda: list(choices),
        envvar=f"DIFFUCODER_{name}",
        show_envvar=False,
    )


DType = Annotated[str | None, _choice("DTYPE", _DTYPES, "dtype of the weights; if left out, the fastest on the device")]
Device = Annotated[str | None, _choice("DEVICE", _DEVICES, "if left out, the best on this machine")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object per result instead of text")]


class GroupedHelp(TyperCommand):
    """A command whose help lists its options under headings, those of `rich_help_panel`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:  # Any: typer does not export these types
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            heading = getattr(parameter, "rich_help_panel", None) or "Options"
            if parameter.param_type_name == "argument":
                heading = "Arguments"
            record = parameter.get_help_record(ctx)
            if record is not None:
                name = record[0].replace("list[str]", "str").replace("int range", "int")
                groups.setdefault(heading, []).append((name, record[1]))
        for heading, records in groups.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


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
    choices = _choices(kind)
    metavar = "|".join(choices) or None
    if get_origin(kind) is tuple:
        kind = list[Path] if parts[0] is Path else list[str]
        metavar = "<path>" if parts[0] is Path else "<str>"
        text += "; repeatable"
    elif choices:
        kind = str  # the settings class names the choices when a value is wrong
    if positional:
        default = inspect.Parameter.empty if field.is_required() else None
        argument = Annotated[kind, typer.Argument(help=text)]
        place = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Parameter(name, place, default=default, annotation=argument)
    if not any(field.default is value for value in (None, False, ())):
        text += f" [default: {field.default}]"
    names = [f"--{name.replace('_', '-')}"] if kind is bool else []  # else typer adds --no-...
    option = typer.Option(
        *names,
        help=text,
        show_default=False,
        metavar=metavar,
        autocompletion=(lambda: choices) if choices else None,
        rich_help_panel=next((group for group, members in _GROUPS.items() if name in members), None),
        envvar=f"DIFFUCODER_{name.upper()}" if name in _VARIABLES else None,
        show_envvar=False,
    )
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _choices(kind: Any) -> list[str]:  # Any: as above
    """The values of a Literal, alone or with None."""
    for part in (kind, *get_args(kind)):
        if get_origin(part) is Literal:
            return list(map(str, get_args(part)))
    return []


def load_model(model: str | None, dtype: str | None, device: str | None) -> "DiffuCoder":
    """Load a model; None is the shipped one. A terminal shows that it is being loaded."""
    from diffucoder.models.hub import SHIPPED

    folder = SHIPPED if model in (None, "tiny") else Path(str(model))
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    note = f"Loading {model or 'tiny'}{f' ({size / 1e6:,.0f} MB)' * bool(size)}..."
    if sys.stderr.isatty():
        print(note, end="\r", file=sys.stderr, flush=True)
    from diffucoder.decoding.coder import DiffuCoder

    coder = DiffuCoder.load(model, dtype=torch_dtype(dtype), device=device)
    if sys.stderr.isatty():
        print(" " * len(note), end="\r", file=sys.stderr, flush=True)
    return coder


def torch_dtype(name: str | None) -> "torch.dtype | None":
    """Return the dtype of this name. Raises ConfigError."""
    import torch

    if name is None:
        return None
    if name not in _DTYPES:
        raise ConfigError(f"dtype={name!r} is not known; use one of {', '.join(_DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


@contextmanager
def naming_extra(extra: str, subject: str) -> Iterator[None]:
    """Around imports: raise ConfigError with the extra to install where a module is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "a package").partition(".")[0]
        raise ConfigError(f"{subject} {package}; {install(extra)}") from None
