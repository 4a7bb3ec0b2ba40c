"""``man``: the manual page, made of the tables of commands, options and statuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qubes_itests import __version__
from qubes_itests.cli.arguments import ALL_OPTIONS, COMMANDS
from qubes_itests.exit_codes import ExitCode
from qubes_itests.program import NAME
from qubes_itests.run.options import PYTEST

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qubes_itests.cli.arguments import Command
    from qubes_itests.run.settings import Settings

__all__ = ["execute"]

_DESCRIPTION: Final = """\
Runs the tests of apps of Qubes OS, and of its core, in real VMs under QEMU. It takes
the options of pytest besides its own; a SELECTOR is the id of a test as "list" shows
it, or the beginning of one. Sub-commands may stand before and after the options.
"""


def execute(_command: Command, _settings: Settings) -> int:
    """Print it, as man(7) has it."""
    print("\n".join(_page()))
    return ExitCode.OK


def _page() -> Iterator[str]:
    yield f'.TH {NAME.upper()} 1 "" "{NAME} {__version__}" "Qubes OS integration tests"'
    yield ".nh"  # a name that is broken is not found
    yield ".SH NAME"
    yield f"{NAME} \\- run Qubes OS integration tests against real VMs"
    yield ".SH SYNOPSIS"
    yield f".B {NAME}"
    yield _text("[COMMAND] [OPTION]... [SELECTOR]...")
    yield ".SH DESCRIPTION"
    yield _text(_DESCRIPTION)
    yield ".SH COMMANDS"
    for name, command in COMMANDS.items():
        words = " ".join(metavar for _, _, metavar, _ in command.words)
        yield ".TP"
        yield f"\\fB{_text(name)}\\fR {_text(words)}".rstrip()
        yield _text(f"{command.meaning[0].upper()}{command.meaning[1:]}.")
        for _, _, metavar, meaning in command.words:
            yield _text(f"{metavar}: {meaning}.")
    yield ".SH OPTIONS"
    for option in ALL_OPTIONS:
        words = ", ".join(f"\\fB{_text(word)}\\fR" for word in option.spellings())
        yield ".TP"
        yield f"{words} \\fI{_text(option.metavar)}\\fR" if option.metavar else words
        yield _text(f"{option.help[0].upper()}{option.help[1:]}.")
        commands = (name for name in option.commands if name != PYTEST)
        yield _text(f"Of: {', '.join(commands)}.")
        if option.variable:
            yield _text(f"Variable: {option.variable}.")
    yield ".SH EXIT STATUS"
    for status in ExitCode:
        yield ".TP"
        yield str(status.value)
        yield _text(status.name.lower().replace("_", " "))
    yield ".SH FILES"
    yield _text(
        "Settings are read from [tool.qubes_itests] in pyproject.toml, or from"
        " [qubes_itests] in setup.cfg; variables of the environment override them, and"
        " the command line those. The cache is ~/.cache/qubes_itests, or what"
        " QUBES_ITESTS_CACHE names."
    )


def _text(text: str) -> str:
    """Return text in which nothing is a request, or a hyphen that is no minus."""
    return "\n".join(
        f"\\&{line}" if line.startswith((".", "'")) else line
        for line in text.strip().replace("\\", "\\e").replace("-", "\\-").split("\n")
    )
