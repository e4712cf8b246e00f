"""The comments at the fields of dataclasses, which say what keys mean."""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path

from chattrain.config.own import OwnPart


@cache
def field_comments(schema: type) -> dict[str, str]:
    """The comment of each field of a dataclass and of those that it inherits: behind the field, else in the lines above it."""
    comments: dict[str, str] = {}
    for cls in reversed(schema.__mro__):
        if is_dataclass(cls) and not issubclass(cls, OwnPart):
            comments |= _class_comments(cls)
    return comments


def _class_comments(cls: type) -> dict[str, str]:
    tree, behind, above = _source(inspect.getfile(cls))
    found = {}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or node.name != cls.__name__:
            continue
        for decorator in node.decorator_list:  # a field whose name is a keyword of Python stands in a decorator
            if isinstance(decorator, ast.Call) and decorator.args and isinstance(decorator.args[0], ast.Constant):
                found[str(decorator.args[0].value)] = behind.get(decorator.lineno) or above.get(decorator.lineno, "")
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                found[field.target.id] = behind.get(field.end_lineno or 0) or above.get(field.lineno, "")
    return found


@cache
def _source(path: str) -> tuple[ast.Module, dict[int, str], dict[int, str]]:
    """A module and its comments: behind the code of a line, by its number; in lines of their own, by that of the line below."""
    text = Path(path).read_text()
    behind: dict[int, str] = {}
    above: dict[int, str] = {}
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comment, row = token.string.lstrip("# "), token.start[0]
            if lines[row - 1].lstrip().startswith("#"):
                above[row + 1] = f"{above.pop(row, '')} {comment}".strip()
            else:
                behind[row] = comment
    return ast.parse(text), behind, above
