"""``completion``: what has a shell complete the command lines of this program."""

from __future__ import annotations

import argparse
import enum
import functools
import re
from typing import TYPE_CHECKING, Any, Final

import shtab

from qubes_itests.cli.arguments import ALL_OPTIONS, COMMANDS
from qubes_itests.exit_codes import ExitCode
from qubes_itests.program import NAME
from qubes_itests.run.settings import ConfigurationError

if TYPE_CHECKING:
    from qubes_itests.cli.arguments import Command
    from qubes_itests.run.options import Option
    from qubes_itests.run.settings import Settings

__all__ = ["execute"]

#: What is a file, by its placeholder.
_FILES: Final = {"DIR": shtab.DIRECTORY} | dict.fromkeys(
    ("FILE", "PATH", "SVG"), shtab.FILE
)


def execute(command: Command, _settings: Settings) -> int:
    """Print a script for the shell.

    :raise ConfigurationError: for a shell that is not known.
    """
    shells = shtab.SUPPORTED_SHELLS
    if command.target not in shells:
        problem = f"expected one of {', '.join(shells)}, got {command.target!r}"
        raise ConfigurationError("completion", problem)
    print(shtab.complete(_parser(), command.target))
    return ExitCode.OK


def _parser() -> argparse.ArgumentParser:
    """Return a parser of all sub-commands; that of a command line has only its own."""
    parser = argparse.ArgumentParser(NAME, description="Run Qubes OS integration tests")
    _add_options(parser, "run")
    commands = parser.add_subparsers()
    for name, command in COMMANDS.items():
        own = commands.add_parser(
            name, help=command.meaning, description=command.meaning
        )
        _add_options(own, name)
        for dest, number, metavar, meaning in command.words:
            action = own.add_argument(dest, nargs=number, metavar=metavar, help=meaning)
            for kind in _FILES.keys() & set(re.findall("[A-Z]+", metavar)):
                action.complete = _FILES[kind]  # type: ignore[attr-defined]
    return parser


def _add_options(parser: argparse.ArgumentParser, name: str) -> None:
    for option in ALL_OPTIONS:
        if name in option.commands:
            option.offer(functools.partial(_add, parser, option))


def _add(
    parser: argparse.ArgumentParser, option: Option, *words: str, **details: Any
) -> None:
    action = parser.add_argument(*words, **details)
    if isinstance(option.default, enum.Enum):
        action.choices = [kind.value for kind in type(option.default)]
    elif option.metavar in _FILES:
        action.complete = _FILES[option.metavar]  # type: ignore[attr-defined]
