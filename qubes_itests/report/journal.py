"""The journal of a guest that systemd runs, as long as it answers."""

from __future__ import annotations

import contextlib
import subprocess
from typing import TYPE_CHECKING, Final

from qubes_itests.core.exc import QubesException
from qubes_itests.exc import HarnessError

if TYPE_CHECKING:
    from qubes_itests.core.vm.qubesvm import QubesVM
    from qubes_itests.portal import Portal

__all__ = ["read_journal"]

#: Bytes, of which the guest sends the last.
_LIMIT: Final = 1 << 20
_COMMAND: Final = (
    f"journalctl --boot --no-pager --output=short-monotonic | tail -c {_LIMIT}"
)
#: Seconds. A failed test may have left a guest that does not answer any more.
_TIMEOUT: Final = 10.0


def read_journal(portal: Portal, vm: QubesVM) -> bytes | None:
    """Return the end of a VM's journal; None if it has none, or does not tell.

    Blocking, for some seconds at most.

    :param portal: the loop that the VM is on.
    :param vm: a VM of the core, in any state.
    """
    if vm.agent is None or vm.is_paused():
        return None
    if vm.features.check_with_template("init", "agent") != "systemd":
        return None
    asked = vm.commands.ask(
        _COMMAND, "show its journal", timeout=_TIMEOUT, limit=_LIMIT
    )
    with contextlib.suppress(
        HarnessError, QubesException, OSError, subprocess.CalledProcessError
    ):
        output: tuple[bytes, bytes] = portal.run(asked)
        return output[0]
    return None
