"""``run``: the tests of all installed plugins."""

from __future__ import annotations

import dataclasses
import importlib
import secrets
from typing import TYPE_CHECKING

import qubes_itests

if TYPE_CHECKING:
    from qubes_itests.cli.arguments import Command
    from qubes_itests.run.settings import Settings

__all__ = ["check", "execute"]


def check(command: Command, settings: Settings) -> None:
    """Refuse what cannot work, before anything is set up.

    :raise NoTerminalError: for a shell without anybody to use it.
    """
    if command.in_sandbox and settings.shell_on_failure:
        from qubes_itests.shell import require_terminal  # noqa: PLC0415

        require_terminal("--shell-on-failure")


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
