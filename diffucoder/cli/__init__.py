"""The command line. A command parses its options, calls one function of the package and prints.

Heavy imports happen inside the commands, so that `--help` answers at once. Options are made from the fields of settings
classes where there is one (`with_options`).
"""

import sys

import typer

from diffucoder.cli.evaluate import evaluate, order
from diffucoder.cli.generate import chat, generate, infill
from diffucoder.cli.models import bench, convert, models
from diffucoder.cli.serve import serve
from diffucoder.cli.train import stages
from diffucoder.errors import DiffuCoderError
from diffucoder.files import disk_is_full

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
    except Exception as error:
        if not disk_is_full(error):
            raise
        reason = " ".join(str(error).split())[:200]
        print(
            f"error: the disk is full ({reason}); free some space and run it again, train with --resume",
            file=sys.stderr,
        )
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output is gone
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
