"""``run``: the tests of all installed plugins."""

from __future__ import annotations

import dataclasses
import importlib
import secrets
from typing import TYPE_CHECKING

import qubes_itests
from qubes_itests.cli.arguments import resembled
from qubes_itests.run.settings import ConfigurationError

if TYPE_CHECKING:
    from qubes_itests.cli.arguments import Command
    from qubes_itests.run.settings import Settings

__all__ = ["check", "execute"]


def check(command: Command, settings: Settings) -> None:
    """Refuse what cannot work, before anything is set up.

    :raise UsageError: for a shell without anybody to use it.
    :raise ConfigurationError: for a misspelt sub-command.
    """
    # tests of apps are not known before they are installed
    if command.misspelt and not settings.app:
        _check_spelling(command.misspelt)
    if command.in_sandbox and settings.shell_on_failure:
        from qubes_itests.shell import require_terminal

        require_terminal("--shell-on-failure")


def _check_spelling(word: str) -> None:
    """Raise ConfigurationError if no test can be meant, but a sub-command may be."""
    from importlib.metadata import entry_points

    from qubes_itests.discovery import GROUP, GROUP_FOR_TEMPLATE
    from qubes_itests.run.plugins import node_name

    groups = (entry_points(group=group) for group in (GROUP, GROUP_FOR_TEMPLATE))
    names = [node_name(entry.name) for group in groups for entry in group]
    if not any(name.startswith(word) for name in names):
        raise ConfigurationError(
            word,
            "expected a sub-command or the beginning of a test's id;"
            f" did you mean `{resembled(word)}`?",
        )


def execute(command: Command, settings: Settings) -> int:
    """Run the tests, and return the exit status."""
    import pytest

    from qubes_itests.host.cache import Cache
    from qubes_itests.pytest_plugin.job import (
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
