"""``thaw``: the VMs of a failed test, where they were when it failed."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from qubes_itests.exc import UsageError
from qubes_itests.exit_codes import ExitCode
from qubes_itests.shell import WAY_OUT, open_shell, require_terminal
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from qubes_itests.cli.arguments import Command
    from qubes_itests.frozen.folder import Folder
    from qubes_itests.run.settings import Settings
    from qubes_itests.run.testbed import Testbed

__all__ = ["check", "execute"]


def check(command: Command, _settings: Settings) -> None:
    """Refuse to start without a terminal, or without a folder that may be thawed."""
    from qubes_itests.frozen.folder import Folder

    require_terminal("thaw")
    Folder.read(_place(command))


def execute(command: Command, settings: Settings) -> int:
    """Thaw the VMs, open shells; the exit status is that of the last one."""
    # not before: the command line begins without what the sandbox needs
    from qubes_itests.frozen.folder import Folder
    from qubes_itests.run.app_templates import plugins_for
    from qubes_itests.run.context import RunContext
    from qubes_itests.serve.calls import CallServer
    from qubes_itests.serve.place import Place

    folder = Folder.read(_place(command))
    context = RunContext(settings, plugins_for(settings))
    try:
        testbed = context.testbed
        # For `attach`, in other terminals: one can be in several of the VMs at once.
        socket = Place.of_run(context.directory).relay_socket
        socket.parent.mkdir(mode=0o700)
        doing = {"directory": f"thaw {folder.path}"}
        server = CallServer(lambda: testbed.apps, socket, lambda: doing)
        testbed.portal.run(server.__aenter__())
        try:
            return _open(testbed, folder, command.words[1:])
        finally:
            testbed.portal.run(server.__aexit__())
    finally:
        for problem in context.close():
            print(f"left behind: {problem}", file=sys.stderr)


def _place(command: Command) -> Path:
    """Return the folder that is meant: also by that of the test."""
    from qubes_itests.frozen.folder import NAME

    place = Path(command.words[0]).absolute()
    return place / NAME if (place / NAME).is_dir() else place


def _open(testbed: Testbed, folder: Folder, wanted: tuple[str, ...]) -> int:
    from qubes_itests.frozen.thawing import thaw

    run, manifest = testbed.portal.run, folder.manifest
    app = run(thaw(testbed, folder, wanted))
    vms = {vm.name: vm for vm in app.domains.startable()}
    for name in wanted:
        if name not in vms:
            raise UsageError(f"there is no VM {name!r}: there are {', '.join(vms)}")
        if vms[name].is_halted():
            run(vms[name].start())
    moment = datetime.fromtimestamp(manifest.time).astimezone()
    print(f"{safe_text(manifest.test)}, as it was at {moment:%Y-%m-%d %H:%M:%S}:")
    print(f"{folder}")
    for name, vm in vms.items():
        if vm.klass != "TemplateVM" or vm.is_running():
            mute = vm.get_power_state() == "Running" and vm.agent is None
            state = f"{vm.get_power_state()}{', without an agent that answers' * mute}"
            print(f"  {safe_text(name)} ({vm.klass}): {state}")
    status: int = ExitCode.OK
    for name, vm in vms.items():
        if vm.agent is None or name not in (wanted or vms):
            continue
        print(
            f"\nA root shell in {safe_text(name)}; exit ends it. {WAY_OUT}.", flush=True
        )
        status = open_shell(testbed.portal, vm.agent)
    return status
