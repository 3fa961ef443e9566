"""The commands, and what holds for all of them: errors in one line, the user's defaults, `--version`.

A command parses its options, calls one function of the package and prints. Its module is imported when it is called,
and heavy imports happen inside it, so that `--help` answers at once. Options are made from the fields of settings
classes where there is one (`with_options`).
"""

import io
import os
import sys
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from diffucoder import __version__
from diffucoder.errors import ConfigError, DiffuCoderError, printable
from diffucoder.files import disk_is_full

_COMMANDS = {  # as --help lists them: the module, and the summary that the command's own help begins with
    "generate": ("generate", "Answer a request with code."),
    "infill": ("generate", "Fill every hole of a file, all of them jointly."),
    "edit": ("generate", "Write some lines of a file again while the rest stays as it is."),
    "fix": ("fix", "Find what is wrong in a file, and write that again."),
    "chat": ("chat", "Talk to a model."),
    "serve": ("serve", "Serve a model over HTTP."),
    "models": ("models", "List the models that load by name."),
    "convert": ("models", "Turn a causal model into a denoiser."),
    "evaluate": ("evaluate", "Measure a model on a benchmark."),
    "order": ("evaluate", "Analyse the order in which a model writes."),
    "bench": ("models", "Measure the speed of a model on this machine."),
    "train": ("train", "Train a model, stage by stage."),
}
_LONGEST_ERROR = 1000  # characters of a message
_OUT_OF_MEMORY = ("can't allocate memory", "Cannot allocate memory", "out of memory")  # of torch and the system


class Commands(TyperGroup):
    """The group of all commands. Each is imported when it is called: the group's own help needs none of them."""

    def get_command(self, ctx: Any, name: str) -> Any:  # Any: typer does not export these types
        return _command(name) if name in _COMMANDS else None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in _COMMANDS.items()])


@cache
def _command(name: str) -> Any:  # Any: as above
    from diffucoder.cli.common import GroupedHelp

    command = getattr(import_module(f"diffucoder.cli.{_COMMANDS[name][0]}"), name)
    if not isinstance(command, typer.Typer):  # train is one, with a command for each stage
        alone = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings=_CONTEXT)
        alone.command(name, cls=GroupedHelp)(command)
        return typer.main.get_command(alone)
    return typer.main.get_command(command)


_CONTEXT = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    cls=Commands,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=_CONTEXT,
    help="Write code in any order with masked-diffusion language models.",
    epilog='Start here: diffucoder generate "Write a function that reverses the string." --watch',
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"diffucoder {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Only `--version`: settings belong to the commands."""


def run() -> None:
    """Run the command line. Bad input is one line on standard error and exit code 2, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # characters that the terminal does not have
    try:
        group = typer.main.get_command(app)
        assert isinstance(group, TyperGroup)
        group.commands = dict.fromkeys(_COMMANDS)  # type: ignore[assignment]  # their names alone
        arguments = sys.argv[1:] or ["--help"]
        defaults = _users_defaults()
        code = group(arguments, prog_name="diffucoder", standalone_mode=False, default_map=defaults) or 0
        sys.stdout.flush()  # here, where a full disk is an error of ours
        sys.exit(code)
    except typer.TyperException as error:  # an unknown command or option, or a value of another type
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "diffucoder"
        message = error.format_message().rstrip(".")
        if "extra argument" in message:
            message += "; quote a text that has spaces"
        _refuse(f"{message}; see {command} --help")
    except DiffuCoderError as error:
        _refuse(str(error))
    except BrokenPipeError:  # the reader of our output is gone
        _drop_output()
        sys.exit(1)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        if isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY):
            _refuse("memory ran out; give smaller files, a smaller batch or a smaller model")
        if disk_is_full(error):
            again = "continue with --resume" if "train" in sys.argv[1:2] else "run it again"
            _refuse(f"the disk is full ({error}); free some space and {again}")
        if isinstance(error, OSError):
            name = error.filename2 or error.filename
            _refuse(f"{str(name)!r} cannot be used ({error.strerror}); check the path" if name else str(error))
        raise


def _refuse(message: str) -> NoReturn:
    """Print one line, which may quote a file of anybody's, and exit with 2."""
    line = " ".join(message.split())
    if len(line) > _LONGEST_ERROR:
        line = f"{line[: _LONGEST_ERROR // 2]} ... {line[-_LONGEST_ERROR // 2 :]}"
    with suppress(OSError):
        print(f"error: {printable(line)}", file=sys.stderr)
    _drop_output()
    sys.exit(2)


def _drop_output() -> None:
    """Write what is left of the output, or drop it: else Python tries again when it ends, and prints a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _users_defaults() -> dict[str, Any]:
    """The defaults of each command's options, from the user's file of settings. Raises ConfigError.

    The file is $DIFFUCODER_CONFIG, else diffucoder/config.toml in the user's folder of settings. A setting at the top
    is for every command that has it, one in [generate] for this command alone.
    """
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    path = Path(os.environ.get("DIFFUCODER_CONFIG") or Path(home, "diffucoder", "config.toml"))
    if not path.exists():
        return {}
    from diffucoder.config import read_toml, suggestion

    content = read_toml(path)
    names: dict[str, list[str]] = {}
    for name in _COMMANDS:
        command = _command(name)
        if isinstance(command, TyperCommand):  # not train, which has recipes
            names[name] = [str(parameter.name) for parameter in command.params]
    shared = {name: value for name, value in content.items() if not isinstance(value, dict)}
    known = sorted({name for options in names.values() for name in options})
    defaults: dict[str, Any] = {}
    for name in [*shared, *(name for name in content if name not in shared)]:
        if name not in (known if name in shared else names):
            raise ConfigError(f"{str(path)!r} has {name!r}; {suggestion(name, [*known, *names])}")
    for command_name, options_of in names.items():
        given = content.get(command_name, {})
        for name in given:
            if name not in options_of:
                raise ConfigError(f"{str(path)!r} has {name!r} in [{command_name}]; {suggestion(name, options_of)}")
        defaults[command_name] = {name: value for name, value in shared.items() if name in options_of} | given
    return defaults
