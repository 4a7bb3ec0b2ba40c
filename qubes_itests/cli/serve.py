"""``serve``: the core as a daemon, for the client tools of Qubes OS."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qubes_itests.exit_codes import ExitCode
from qubes_itests.program import typed

if TYPE_CHECKING:
    from qubes_itests.cli.arguments import Command
    from qubes_itests.run.settings import Settings
    from qubes_itests.serve.daemon import Serving

__all__ = ["execute"]


def execute(command: Command, settings: Settings) -> int:
    """Serve until told to end, or print how to call a server."""
    if command.print_env:
        from qubes_itests.host.cache import Cache
        from qubes_itests.serve.environment import exports
        from qubes_itests.serve.place import find

        sys.stdout.write(exports(find(Cache())))
        return ExitCode.OK
    from qubes_itests.run.app_templates import plugins_for
    from qubes_itests.serve.daemon import serving, wait_for_end

    directory = Path(command.directory) if command.directory else None
    with serving(settings, plugins_for(settings), directory) as server:
        print(_ready(server), flush=True)
        wait_for_end()
        print("ending: the VMs shut down", flush=True)
    return ExitCode.OK


def _ready(server: Serving) -> str:
    state = server.state
    keeps = "kept" if server.kept else "gone when this ends; --directory=DIR keeps it"
    return f"""\
ready
  socket       {server.place.admin_socket}
  log          {server.place.directory / "log"}
  state        {state.directory} ({keeps})
  filesystems  {state.mount_point("btrfs")} and {state.mount_point("xfs")}
in another terminal:
  {typed("qvm", "qvm-ls")}
or, for the tools by themselves:
  eval "$({typed("serve", "--print-env")})"
Ctrl-C ends it."""
