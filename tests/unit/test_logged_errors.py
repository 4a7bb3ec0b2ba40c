"""Errors are logged as text.

pytest keeps the records of a test as long as it runs; one with an error in it keeps the
frames of its traceback, and so the VMs, which then count as left behind.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for package in ("qubes_itests", "storage/qubes_storage")
    for path in (ROOT / package).rglob("*.py")
)
METHODS = {"debug", "info", "warning", "error", "critical", "log"}


def logged_errors(tree):
    """Yield the lines of calls that log what an `except` around them has caught."""
    for handler in ast.walk(tree):
        if not isinstance(handler, ast.ExceptHandler) or handler.name is None:
            continue
        for call in ast.walk(handler):
            if (
                isinstance(call, ast.Call)
                and isinstance(call.func, ast.Attribute)
                and call.func.attr in METHODS
                and any(
                    isinstance(argument, ast.Name) and argument.id == handler.name
                    for argument in call.args
                )
            ):
                yield call.lineno


def test_what_is_looked_for_is_found():
    text = 'try: f()\nexcept E as e:\n log.info("%s", str(e))\n log.info("%s", e)\n'
    assert list(logged_errors(ast.parse(text))) == [4]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_record_has_an_error_in_it(path):
    assert list(logged_errors(ast.parse(path.read_text()))) == []
