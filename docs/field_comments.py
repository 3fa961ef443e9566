"""A griffe extension: the comment behind a field of a class is its description in the API reference."""

import ast
from typing import Any

import griffe


class FieldComments(griffe.Extension):
    """Read `name: type  # meaning`; fields that have a docstring keep it."""

    def on_attribute_instance(self, *, node: ast.AST | griffe.ObjectNode, attr: griffe.Attribute, **_: Any) -> None:
        """Give a field of a class its comment."""
        if attr.docstring is not None or attr.parent is None or not attr.parent.is_class or attr.endlineno is None:
            return
        line = attr.lines_collection[attr.filepath][attr.endlineno - 1]
        _, found, comment = line.partition("  # ")
        if found:
            attr.docstring = griffe.Docstring(f"{comment[:1].upper()}{comment[1:]}.", parent=attr)
