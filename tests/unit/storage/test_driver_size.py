"""The driver stays small: its source lines are counted."""

from __future__ import annotations

import ast
import tokenize
from pathlib import Path

import qubes_storage

PACKAGE = Path(qubes_storage.__file__).parent

#: Source lines of what is file-reflink's own, and of all that keeps images as files.
OWN = ("reflink", "preparation")
LIMIT = 400
WITH_BASE = (*OWN, "image_pool", "image_volume", "image_content", "history")
LIMIT_WITH_BASE = 700

NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def source_lines(module):
    """Return the number of lines with code; comments and docstrings have none."""
    path = PACKAGE / f"{module}.py"
    with path.open("rb") as file:
        tokens = [t for t in tokenize.tokenize(file.readline) if t.type not in NO_CODE]
    lines = {n for t in tokens[1:] for n in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_the_driver_is_small():
    assert 50 < sum(map(source_lines, OWN)) <= LIMIT


def test_so_is_what_it_shares_with_the_driver_file():
    assert sum(map(source_lines, WITH_BASE)) <= LIMIT_WITH_BASE
