"""`diffucoder fix`: find what is wrong in a file, and write that again."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from diffucoder.cli.common import AsJson, Device, DType, Model, load_model, with_options
from diffucoder.cli.generate import BYTE_ORDER_MARK, as_models_know, note, read_text, with_line_ends_of
from diffucoder.decoding.params import DecodingParams
from diffucoder.errors import ConfigError, printable
from diffucoder.files import write_text


@partial(with_options, without=("new_tokens", "num_samples", "stop"))
def fix(
    path: Annotated[str, typer.Argument(help="a file of Python; - for standard input", show_default=False)],
    *,
    tests: Annotated[Path | None, typer.Option(help="file of asserts that the program has to pass")] = None,
    passes: Annotated[int, typer.Option(min=1, help="forward passes of a row that it may take")] = 1024,
    write: Annotated[bool, typer.Option("--write", help="write the repaired text to the file")] = False,
    model: Model = None,
    as_json: AsJson = False,
    dtype: DType = None,
    device: Device = None,
    params: DecodingParams,
) -> None:
    """Find what is wrong in a file, and write that again.

    The place is found by Python's parser, by names that nothing defines, and by the model: it masks each token and
    compares. Candidates are tried until one passes the tests, which run in the sandbox. Without tests, until the file
    parses and its names are defined. It prints a diff. The exit code is 1 if nothing better was found.
    """
    if write and path == "-":
        raise ConfigError("--write needs a file to write to, and '-' is standard input; give a path")
    given = read_text(path)
    asserts = _asserts_of(tests)
    coder = load_model(model, dtype, device)
    from diffucoder.decoding.diffs import unified_diff
    from diffucoder.progress import progress

    spent = 0
    with progress("repair", passes, unit="pass", transient=True) as report:

        def on_round(more: int) -> None:
            nonlocal spent
            spent += more
            report(spent)

        repair = coder.repair(as_models_know(given), params, tests=asserts, passes=passes, on_round=on_round)
    text = given
    if repair.changed:
        text = given[: given.startswith(BYTE_ORDER_MARK)] + with_line_ends_of(given, repair.text)
    diff = unified_diff(given, text)
    if as_json:
        print(json.dumps({"text": text, "diff": diff, "changed": repair.changed, **repair.figures()}))
    else:
        print(printable(diff), end="")
    if write and repair.changed:
        write_text(Path(path).resolve(), text)
    where = f"line {repair.given.line}: " if repair.given.line else ""
    if repair.given.passed:
        note("nothing is wrong; give --tests with what the program should do" if not asserts else "all tests pass")
    elif not repair.changed:
        note(f"nothing better was found in {repair.passes} passes ({where}{repair.given.fault}); raise --passes")
        raise typer.Exit(1)
    else:
        left = f"; still wrong: {repair.judgement.fault}" if repair.judgement.fault else ""
        note(f"{where}{repair.given.fault}: written again in {repair.passes} passes{left}")


def _asserts_of(path: Path | None) -> list[str]:
    """The asserts of a file of tests; a file with other statements too is one test. Raises ConfigError."""
    if path is None:
        return []
    import ast

    from diffucoder.grading.syntax import statements_of

    text = read_text(str(path))
    statements = statements_of(text) or []
    are_asserts = [isinstance(statement, ast.Assert) for statement in statements]
    if not any(are_asserts):
        raise ConfigError(f"file {str(path)!r} has no assert; write some, such as: assert double(2) == 4")
    if all(are_asserts):
        return [ast.unparse(statement) for statement in statements]
    return [text]
