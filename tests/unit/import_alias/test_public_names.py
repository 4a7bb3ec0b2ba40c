"""The page that lists the public names says what the table of aliases does."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from qubes_itests.import_alias import install, uninstall
from qubes_itests.import_alias.table import ALIASES

PAGE = Path(__file__).parents[3] / "docs" / "public-names.md"


@pytest.fixture
def _installed():
    install()
    yield
    uninstall()


def rows():
    row = re.compile(r"^\| `([\w.]+)` \| (provided|missing) \| (.*) \|$", re.MULTILINE)
    found = row.findall(PAGE.read_text())
    return {name: (status, rest) for name, status, rest in found}


@pytest.mark.usefixtures("_installed")
def test_the_page_lists_each_provided_name():
    """Both ways: nothing on the page that is not there, nothing there unlisted."""
    on_page = {
        name: re.findall(r"`(\w+)`", rest)
        for name, (status, rest) in rows().items()
        if status == "provided"
    }
    real = {name: importlib.import_module(name).__all__ for name in ALIASES}
    assert on_page == real


@pytest.mark.usefixtures("_installed")
def test_what_the_page_calls_missing_raises_the_sentence():
    missing = [name for name, (status, _) in rows().items() if status == "missing"]
    assert missing
    for name in missing:
        with pytest.raises(ImportError, match=f"does not provide {name}"):
            importlib.import_module(name)
