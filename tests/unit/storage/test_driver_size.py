"""The driver stays small: its source lines are counted."""

from __future__ import annotations

import ast
import tokenize
from pathlib import Path

import qubes_storage

PACKAGE = Path(qubes_storage.__file__).parent

#: Source lines of what file-reflink alone needs, and of all that it needs.
LIMIT = 150
LIMIT_WITH_BASE = 2000

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


def imported(module):
    """Return the modules of the package that one imports, itself and theirs too."""
    found, left = set(), [module]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom):
                left += names_of(node)
    return found


def names_of(node):
    package, _, module = node.module.partition(".")
    if package != PACKAGE.name:
        return []
    return [module] if module else [alias.name for alias in node.names]


def test_all_of_the_package_is_counted():
    """Except for how drivers are found by their names."""
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    assert imported("reflink") | imported("file") == modules - {"__init__", "drivers"}


def test_the_driver_is_small():
    own = imported("reflink") - imported("file")
    assert "reflink" in own
    assert 50 < sum(map(source_lines, own)) <= LIMIT


def test_so_is_all_that_it_needs():
    assert sum(map(source_lines, imported("reflink"))) <= LIMIT_WITH_BASE
