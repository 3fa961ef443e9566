"""The command line: `diffucoder` and `python -m diffucoder`. `app` has the commands."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C ends it with 130 and without a traceback, also while modules are imported."""
    try:
        from diffucoder.cli.app import run

        run()
    except KeyboardInterrupt:
        sys.exit(130)
