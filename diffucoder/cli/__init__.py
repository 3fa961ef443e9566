"""The command line: one file a command. A command parses its options, calls one function of the package and prints.

Heavy imports happen inside the commands, so that `--help` answers at once. Options are made from the fields of settings
classes where there is one (`diffucoder.options`).
"""

import sys

import typer

from diffucoder.cli.app import app
from diffucoder.errors import DiffuCoderError


def main() -> None:
    """Run the command line. Bad input is one line on standard error and exit code 2, never a traceback."""
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="diffucoder", standalone_mode=False) or 0)
    except typer.TyperException as error:  # an unknown command or option, or a value of another type
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "diffucoder"
        print(f"error: {error.format_message().rstrip('.')}; see {command} --help", file=sys.stderr)
        sys.exit(2)
    except DiffuCoderError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output is gone
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
