"""``qvm``: a client tool of Qubes OS, unmodified, against a running server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qubes_itests.exit_codes import ExitCode
from qubes_itests.host.cache import Cache
from qubes_itests.serve.environment import CONSOLE
from qubes_itests.serve.place import find
from qubes_itests.serve.tools import run_tool

if TYPE_CHECKING:
    from qubes_itests.cli.arguments import Command
    from qubes_itests.run.settings import Settings

__all__ = ["execute"]


def execute(command: Command, _settings: Settings) -> int:
    """Run the tool; the exit status is its own."""
    place = find(Cache(), Path(command.socket) if command.socket else None)
    if command.tool not in (CONSOLE, CONSOLE.removeprefix("qvm-")):
        return run_tool(place, command.tool, command.words)
    if len(command.words) != 1:
        sys.stderr.write(f"{CONSOLE}: expected the name of a VM, got {command.words}\n")
        return ExitCode.USAGE_ERROR
    # what other tools do not need: an event loop
    from qubes_itests.serve.console import open_console

    return open_console(place.relay_socket, command.words[0], CONSOLE)
