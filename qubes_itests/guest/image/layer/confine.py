"""The last step before a command runs in a root image: nothing of the host is left.

A separate program (``confine.py ROOT COMMAND…``), started in fresh mount, PID, IPC,
UTS and cgroup namespaces, that uses the standard library alone. The host's root is
unmounted, not only out of sight as after chroot(2), which a process of root leaves
(``nsenter --target 1 --mount`` is enough).

What of ``/proc`` is masked or read-only is what container engines choose (OCI runtime
specification, "maskedPaths" and "readonlyPaths"): root owns these files, and may write
them without any capability.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import sys
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

NOT_CONFINED = 125
NOT_FOUND = 127

# linux/mount.h, linux/prctl.h, linux/capability.h
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND = 0x20, 0x1000
MNT_DETACH = 2
PR_CAPBSET_READ, PR_CAPBSET_DROP = 23, 24
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
CAPABILITY_VERSION_3 = 0x20080522

#: What scripts of packages do: own files, change users, signal, set capabilities of
#: files. So no mounts, devices, modules, times, raw sockets, nor traces of others.
CAPABILITIES = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_FOWNER": 3,
    "CAP_FSETID": 4,
    "CAP_KILL": 5,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_SETFCAP": 31,
}
MASKED = (
    *("acpi", "asound", "config.gz", "kallsyms", "kcore", "keys", "key-users"),
    *("kmsg", "latency_stats", "sched_debug", "scsi", "timer_list", "vmallocinfo"),
)
READ_ONLY = ("bus", "driver", "fs", "irq", "mtrr", "sys", "sysrq-trigger")

libc = ctypes.CDLL(None, use_errno=True)


def main(root: str, command: list[str]) -> NoReturn:
    """Make a directory, which is a mount, the root of all, and run a command there."""
    os.chdir(root)
    check(libc.pivot_root(b".", b"."), "change the root")
    # the host's root lies over ours now
    check(libc.umount2(b".", MNT_DETACH), "unmount the host's root")
    os.chdir("/")
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    for name in MASKED:
        mask(Path("/proc", name))
    for name in READ_ONLY:
        make_read_only(Path("/proc", name))
    mount("none", "/sys", "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
    # packages write it down
    socket.sethostname("localhost")
    drop_capabilities()
    try:
        os.execvp(command[0], command)  # noqa: S606
    except OSError as error:
        fail(f"{command[0]}: {error.strerror}", NOT_FOUND)


def mask(path: Path) -> None:
    """Show nothing at a path, if it is there."""
    if path.is_dir():
        mount("none", str(path), "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
    elif path.exists():
        mount("/dev/null", str(path), None, MS_BIND)


def make_read_only(path: Path) -> None:
    """Let nobody write at a path or below it, if it is there."""
    if path.exists():
        mount(str(path), str(path), None, MS_BIND)
        kept = MS_NOSUID | MS_NODEV | MS_NOEXEC
        mount("none", str(path), None, MS_BIND | MS_REMOUNT | MS_RDONLY | kept)


def drop_capabilities() -> None:
    """Keep those that scripts of packages need, for what is executed as well."""
    for number in range(64):
        known = libc.prctl(PR_CAPBSET_READ, number, 0, 0, 0) >= 0
        if known and number not in CAPABILITIES.values():
            check(libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0), "drop capabilities")
    with contextlib.suppress(OSError):
        libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    kept = sum(1 << number for number in CAPABILITIES.values())
    # effective, permitted, inheritable: of the lower 32 capabilities, then the upper
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    data = struct.pack("=6I", kept, kept, 0, 0, 0, 0)
    check(libc.capset(header, data), "set capabilities")


# As in host/sandbox_init.py, and not shared with it: each runs as one file, by itself,
# where our package cannot be imported, and each ends in its way.
def mount(source: str, target: str, kind: str | None, flags: int) -> None:
    """Mount, or say why not and exit."""
    result = libc.mount(
        source.encode(),
        target.encode(),
        kind and kind.encode(),
        ctypes.c_ulong(flags),
        None,
    )
    check(result, f"mount {target}")


def check(result: int, act: str) -> None:
    """Exit with one sentence if a system call failed."""
    if result != 0:
        reason = os.strerror(ctypes.get_errno())
        fail(f"the commands could not be confined: {act}: {reason}", NOT_CONFINED)


def fail(sentence: str, status: int) -> NoReturn:
    """Say why and exit."""
    sys.stderr.write(f"{sentence}\n")
    sys.exit(status)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
