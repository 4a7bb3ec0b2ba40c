"""Ending a QEMU process at once.

libvirt asks QEMU to go and looks again after 0.2 s; what is told to stop like pulling
the plug need not be asked.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from pathlib import Path

__all__ = ["kill_qemu"]

#: Seconds until a killed process must be gone.
_GONE = 5.0


def kill_qemu(pid_file: Path, domain: str) -> None:
    """Kill a domain's QEMU and wait until it is gone. Blocking.

    :param pid_file: where libvirt wrote its number. If that is missing, or it names
        another process by now, nothing happens: libvirt then finds out by itself.
    """
    with contextlib.suppress(OSError, ValueError):
        pid = int(pid_file.read_text())
        handle = os.pidfd_open(pid)
        try:
            # The handle is opened first: so it is this process that is killed.
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if f"guest={domain},".encode() in command:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
                poll = select.poll()  # its number may be beyond what select() takes
                poll.register(handle, select.POLLIN)
                poll.poll(_GONE * 1000)
        finally:
            os.close(handle)
