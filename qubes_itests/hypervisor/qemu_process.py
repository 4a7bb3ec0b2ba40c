"""A domain's QEMU as a process: its memory, and its end.

That is so quick that libvirt need not wait for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
import signal
import time
from pathlib import Path
from typing import Final

__all__ = ["have_killed_first", "kill_qemu", "memory_of"]

#: Seconds until a killed process must be gone.
_GONE: Final = 5.0
#: Seconds between looks whether an ended process has been waited for.
_UNTIL_REAPED: Final = 0.001
#: The number of pidfd_getfd(2), the same on all architectures.
_PIDFD_GETFD: Final = 438

#: Of the kernel's account of a process: KiB that it shares with no file, or no more.
_OWN: Final = re.compile(r"^RssAnon:\s+([0-9]+) kB$", re.MULTILINE)
#: Of 1000; as if it had that part of the machine's memory more than it has.
_KILLED_FIRST: Final = "500"

_libc = ctypes.CDLL(None)


def have_killed_first(pid_file: Path) -> None:
    """Have a domain's QEMU killed before others when memory runs out. Blocking.

    What starts VMs is to outlast them, and say who held the memory; so is whatever else
    runs on this machine.

    :param pid_file: where libvirt wrote its number; nothing happens if it has gone.
    """
    with contextlib.suppress(OSError, ValueError):
        place = Path(f"/proc/{int(pid_file.read_text())}")
        (place / "oom_score_adj").write_text(_KILLED_FIRST)


def memory_of(pid_file: Path) -> int:
    """Return how many MiB a domain's QEMU has for itself; 0 if it has gone.

    :param pid_file: where libvirt wrote its number.
    """
    with contextlib.suppress(OSError, ValueError):
        status = Path(f"/proc/{int(pid_file.read_text())}/status").read_text()
        if own := _OWN.search(status):
            return int(own[1]) >> 10
    return 0


def kill_qemu(pid_file: Path, domain: str) -> None:
    """Kill a domain's QEMU and wait until nothing is left of it. Blocking.

    libvirt signals a process that is to go, and if it finds one, it looks again after
    0.2 s, in which the domain is locked.  What is stopped as if its plug were pulled
    need not be asked; and libvirt learns of it, by the end of the connection to QEMU's
    monitor, when there is no process to be found any more.

    :param pid_file: where libvirt wrote its number. If that is missing, or it names
        another process by now, nothing happens: libvirt then finds out by itself.
    """
    with contextlib.suppress(OSError, ValueError), contextlib.ExitStack() as stack:
        pid = int(pid_file.read_text())
        handle = os.pidfd_open(pid)
        stack.callback(os.close, handle)
        # The handle is opened first: so it is this process that is killed.
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if f"guest={domain},".encode() not in command:
            return
        _keep_connections(pid, handle, stack)
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        poll = select.poll()  # its number may be beyond what select() takes
        poll.register(handle, select.POLLIN)
        poll.poll(_GONE * 1000)
        # It has ended, but can be signalled until its parent, the sandbox's PID 1, has
        # waited for it; then this raises, and nothing else tells.
        gone_by = time.monotonic() + _GONE
        while time.monotonic() < gone_by:
            signal.pidfd_send_signal(handle, 0)
            time.sleep(_UNTIL_REAPED)


def _keep_connections(pid: int, handle: int, stack: contextlib.ExitStack) -> None:
    """Keep the sockets of a process open until the stack is closed.

    The kernel closes the files of a process that is killed some milliseconds before it
    has ended.  Where it may not be asked for them, libvirt waits for 0.2 s, as above.
    """
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if str(entry.readlink()).startswith("socket:"):
                kept = _libc.syscall(_PIDFD_GETFD, handle, int(entry.name), 0)
                if kept >= 0:
                    stack.callback(os.close, kept)
