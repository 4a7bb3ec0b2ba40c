"""``qvm``: a client tool of Qubes OS, unmodified, against who serves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qubes_itests.host.cache import Cache
from qubes_itests.serve.place import find
from qubes_itests.serve.tools import run_tool

if TYPE_CHECKING:
    from qubes_itests.cli.arguments import Command
    from qubes_itests.run.settings import Settings

__all__ = ["execute"]


def execute(command: Command, _settings: Settings) -> int:
    """Run the tool; the exit status is its own."""
    socket = Path(command.socket) if command.socket else None
    return run_tool(find(Cache(), socket), command.tool, command.words)
