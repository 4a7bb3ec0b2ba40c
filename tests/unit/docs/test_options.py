"""The page of options is what the table of options says.

`python tests/unit/docs/test_options.py` writes it.
"""

from __future__ import annotations

import re
from pathlib import Path

from qubes_itests.cli.arguments import Command
from qubes_itests.run.options import options
from qubes_itests.run.settings import OPTIONS

PAGE = Path(__file__).parents[3] / "docs" / "options.md"
ROWS = re.compile(r"(?<=---\|\n)(?:\| `.*\n)*")


def table(declared):
    rows = []
    for option in declared:
        words = "`, `".join(option.spellings())
        where = [f"`{option.name}`", f"`{option.variable}`"] if option.read else []
        commands = ", ".join(option.commands)
        name = f"`{words} {option.metavar}".rstrip() + "`"
        rows.append(" | ".join([name, *where, commands, option.help]))
    return "".join(f"| {row} |\n" for row in rows)


def expected():
    tables = iter([table(OPTIONS.values()), table(options(Command))])
    return ROWS.sub(lambda _: next(tables), PAGE.read_text())


def test_the_page_has_all_options_as_they_are():
    assert PAGE.read_text() == expected(), f"run {Path(__file__).name} to write it"


def test_no_option_has_two_defaults():
    for option in (*OPTIONS.values(), *options(Command)):
        assert option.help.count("(default:") <= 1, option.name


if __name__ == "__main__":
    PAGE.write_text(expected())
