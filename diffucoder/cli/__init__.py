"""The command line. A command parses its options, calls one function of the package and prints.

Heavy imports happen inside the commands, so that `--help` answers at once. Options are made from the fields of settings
classes where there is one (`with_options`).
"""

import io
import sys
from typing import NoReturn

import typer

from diffucoder.cli.evaluate import evaluate, order
from diffucoder.cli.generate import chat, generate, infill
from diffucoder.cli.models import bench, convert, models
from diffucoder.cli.serve import serve
from diffucoder.cli.train import stages
from diffucoder.errors import DiffuCoderError, printable
from diffucoder.files import disk_is_full

_LONGEST_ERROR = 1000  # characters of a message
_OUT_OF_MEMORY = ("can't allocate memory", "Cannot allocate memory", "out of memory")  # of torch and the system

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Write code in any order with masked-diffusion language models.",
    epilog='Start here: diffucoder generate "Write a function that reverses the string." --watch',
)
for command in (generate, infill, chat, serve, models, convert, evaluate, order, bench):  # as --help lists them
    app.command()(command)
app.add_typer(stages, name="train")


def main() -> None:
    """Run the command line. Bad input is one line on standard error and exit code 2, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # characters that the terminal does not have
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="diffucoder", standalone_mode=False) or 0)
    except typer.TyperException as error:  # an unknown command or option, or a value of another type
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "diffucoder"
        _fail(f"{error.format_message().rstrip('.')}; see {command} --help")
    except DiffuCoderError as error:
        _fail(str(error))
    except BrokenPipeError:  # the reader of our output is gone
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:
        if isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY):
            _fail("memory ran out; give smaller files, a smaller batch or a smaller model")
        if disk_is_full(error):
            again = "continue with --resume" if "train" in sys.argv[1:2] else "run it again"
            _fail(f"the disk is full ({error}); free some space and {again}")
        if isinstance(error, OSError) and error.filename:  # such as a folder in the place of a file
            _fail(f"{str(error.filename2 or error.filename)!r} cannot be used ({error.strerror}); name another folder")
        raise


def _fail(message: str) -> NoReturn:
    """Print one line, which may quote a file of anybody's, and exit with 2."""
    line = " ".join(message.split())
    if len(line) > _LONGEST_ERROR:
        line = f"{line[: _LONGEST_ERROR // 2]} ... {line[-_LONGEST_ERROR // 2 :]}"
    print(f"error: {printable(line)}", file=sys.stderr)
    sys.exit(2)
