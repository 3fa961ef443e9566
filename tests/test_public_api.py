"""The public API has not changed unnoticed: its names and signatures are those in `public_api.txt`.

`python tests/test_public_api.py` records it again.
"""

import ast
import inspect
import re
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import BaseModel

import diffucoder

_MODULES = re.compile(r"\b(?:[a-z_]+\.)+(?=[a-zA-Z])")  # module names before a type
RECORD = Path(__file__).with_name("public_api.txt")
_HOW = (
    "The public API differs from tests/public_api.txt. If that is meant: add a line on it to CHANGELOG.md, "
    "and run `python tests/test_public_api.py`."
)


def public_api() -> str:
    """Return a line for each public name and each public member of a class, in order of the names."""
    lines = []
    for name in diffucoder.__all__:
        value = getattr(diffucoder, name)
        lines.append(f"{name}{_signature(value)}")
        if inspect.isclass(value):
            lines += [f"{name}.{member}" for member in _members(value)]
    return "\n".join(lines) + "\n"


def _members(kind: type) -> list[str]:
    """Return the public fields, properties and methods that a class defines itself, in order of their names."""
    found = {}
    types = get_type_hints(kind) if is_dataclass(kind) or issubclass(kind, BaseModel) else {}
    if is_dataclass(kind):
        for field in fields(kind):
            default = "" if field.default is MISSING else f" = {field.default!r}"
            found[field.name] = f": {_plain(types[field.name])}{default}"
    if issubclass(kind, BaseModel):
        for name, info in kind.model_fields.items():
            default = "" if info.is_required() else f" = {info.default!r}"
            found[name] = f": {_plain(types[name])}{default}"
    for name, value in vars(kind).items():
        if name.startswith(("_", "model_")) or name in found:
            continue
        if isinstance(value, property):
            found[name] = " (property)"
        elif isinstance(value, classmethod | staticmethod) or inspect.isfunction(value):
            found[name] = _signature(getattr(kind, name))
    return [f"{name}{rest}" for name, rest in sorted(found.items())]


def _signature(value: Any) -> str:
    if inspect.isclass(value) and (is_dataclass(value) or issubclass(value, BaseModel | Exception)):
        return ""  # its fields say it
    return _MODULES.sub("", str(inspect.signature(value, eval_str=True)))


def _plain(annotation: Any) -> str:
    return _MODULES.sub("", inspect.formatannotation(annotation))


def test_the_public_api_is_the_recorded_one() -> None:
    recorded = set(RECORD.read_text(encoding="utf-8").splitlines())
    present = set(public_api().splitlines())
    changes = [f"- {line}" for line in sorted(recorded - present)] + [
        f"+ {line}" for line in sorted(present - recorded)
    ]
    assert not changes, "\n".join([_HOW, *changes])


def test_type_checkers_see_the_public_names() -> None:
    source = Path(diffucoder.__file__)
    assert source.with_name("py.typed").is_file()
    imports = [node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.ImportFrom)]
    seen = {node.names[0].name: node.module for node in imports if node.names[0].asname}
    assert seen == diffucoder._HOME


if __name__ == "__main__":
    RECORD.write_text(public_api(), encoding="utf-8")
