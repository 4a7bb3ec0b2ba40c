"""The page that lists the public names says what the table of aliases does.

`python tests/unit/import_alias/test_public_names.py` writes the rows of that table.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from qubes_itests.import_alias import install, uninstall
from qubes_itests.import_alias.table import ALIASES

PAGE = Path(__file__).parents[3] / "docs" / "public-names.md"
ROW = re.compile(r"^\| `([\w.]+)` \| (provided|missing) \| (.*) \|$", re.MULTILINE)


@pytest.fixture
def _installed():
    install()
    yield
    uninstall()


def provided():
    """Return a row for each module of ours, with all names that it really has."""
    rows = []
    for name in sorted(ALIASES):
        module = importlib.import_module(name)
        names = [n for n in module.__all__ if hasattr(module, n)]
        listed = ", ".join(f"`{n}`" for n in names) or "its modules"
        rows.append(f"| `{name}` | provided | {listed} |")
    return rows


def missing():
    return [m[0] for m in ROW.finditer(PAGE.read_text()) if m[2] == "missing"]


def write():
    text = PAGE.read_text()
    first, last = (f(m.span() for m in ROW.finditer(text)) for f in (min, max))
    rows = "\n".join([*provided(), *missing()])
    PAGE.write_text(text[: first[0]] + rows + text[last[1] :])


@pytest.mark.usefixtures("_installed")
def test_the_page_lists_each_provided_name():
    """Both ways: nothing on the page that is not there, nothing there unlisted."""
    on_page = [m[0] for m in ROW.finditer(PAGE.read_text()) if m[2] == "provided"]
    assert on_page == provided(), f"run {Path(__file__).name} to write them"


@pytest.mark.usefixtures("_installed")
def test_what_the_page_calls_missing_raises_the_sentence():
    names = [ROW.fullmatch(row)[1] for row in missing()]
    assert names
    for name in names:
        with pytest.raises(ImportError, match=f"does not provide {name}"):
            importlib.import_module(name)


if __name__ == "__main__":
    install()
    write()
