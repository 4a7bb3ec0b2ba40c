"""``run``: the tests of all installed plugins."""

from __future__ import annotations

import dataclasses
import importlib
import secrets
import sys
from typing import TYPE_CHECKING

import qubes_itests
from qubes_itests.configuration import ConfigurationError

if TYPE_CHECKING:
    from qubes_itests.cli.arguments import Command
    from qubes_itests.configuration import Settings

__all__ = ["check", "execute"]


def check(command: Command, settings: Settings) -> None:
    """Refuse what cannot work, before anything is set up.

    :raise ConfigurationError: for a shell without anybody to use it.
    """
    if command.in_sandbox and settings.shell_on_failure:
        require_terminal("--shell-on-failure")


def require_terminal(what: str) -> None:
    """Raise ConfigurationError unless a person sits at a terminal."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigurationError(
            what, "opens a shell, and there is no terminal to use it on"
        )


def execute(command: Command, settings: Settings) -> int:
    """Run the tests, and return the exit status."""
    import pytest  # noqa: PLC0415 - only in the sandbox, see the package

    from qubes_itests.host.cache import Cache  # noqa: PLC0415
    from qubes_itests.pytest_plugin.job import (  # noqa: PLC0415
        Job,
        JobParts,
        pytest_arguments,
    )

    if settings.seed is None:
        settings = dataclasses.replace(settings, seed=secrets.randbits(32))
    cache = Cache().root
    job = Job(settings, cache)
    # As modules, not by -p, which would have pytest rewrite the asserts in all of ours.
    plugins = [
        job,
        JobParts(),
        *map(importlib.import_module, qubes_itests.pytest_plugins),
    ]
    return int(pytest.main(pytest_arguments(command.rest, cache), plugins))
