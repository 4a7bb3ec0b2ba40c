"""``attach``: a shell in a VM of a run under way."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from qubes_itests.exc import HarnessError, UsageError
from qubes_itests.host.cache import Cache
from qubes_itests.serve.console import open_console
from qubes_itests.serve.reach import under_way
from qubes_itests.shell import require_terminal
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from qubes_itests.cli.arguments import Command
    from qubes_itests.run.settings import Settings

__all__ = ["check", "execute"]


def check(_command: Command, _settings: Settings) -> None:
    """Refuse to start without a terminal."""
    require_terminal("attach")


def execute(command: Command, _settings: Settings) -> int:
    """Open the shell; the exit status is the shell's."""
    name = command.target
    there = {}
    for reached in under_way(Cache()):
        with contextlib.suppress(HarnessError):  # it has just ended, or is stuck
            for vm in reached.status()["vms"]:
                there[f"{reached.name}/{vm['name']}"] = reached.socket, vm["name"]
    found = [full for full in there if f"/{full}".endswith(f"/{name}")]
    if len(found) != 1:
        known = safe_text(", ".join(found or there) or "none")
        many = "more than one VM" if found else "no running VM"
        raise UsageError(f"there is {many} {name!r} in the runs under way: {known}")
    socket, vm = there[found[0]]
    return open_console(socket, vm, "attach")
