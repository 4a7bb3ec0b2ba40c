"""The memory of this machine that is there to be taken, and who may take how much."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qubes_itests.exc import UsageError

__all__ = ["LEAST", "available", "for_vms", "kills", "share"]

#: MiB without which no worker is worth its start.
LEAST = 512

_MIB = 1 << 20
#: The hundredths of it that VMs may take: QEMU itself takes some, and tests do.
_FOR_VMS = 80


@dataclass(frozen=True, slots=True)
class _Version:
    """Names in the control groups of one version; see cgroups(7)."""

    mounted: str
    limit: str
    used: str
    reclaimed: tuple[str, ...]


#: By what /proc/self/cgroup has as their controllers.
_VERSIONS: Final = {
    "": _Version("", "memory.max", "memory.current", ("inactive_file", "active_file")),
    "memory": _Version(
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
}
_AVAILABLE = re.compile(r"^MemAvailable:\s+([0-9]+) kB$", re.MULTILINE)


def available(
    proc: Path = Path("/proc/meminfo"),
    groups: Path = Path("/sys/fs/cgroup"),
    own: Path = Path("/proc/self/cgroup"),
) -> int:
    """Return how much memory processes can still take without swapping, MiB.

    A container, or a service, is told of the whole machine's memory; what it may use is
    the limit of its control group, or of one above that.

    :param proc: the kernel's account of the machine.
    :param groups: where control groups are mounted.
    :param own: the kernel's account of which ones this process is in.
    """
    found = _AVAILABLE.search(proc.read_text())
    left = [int(found[1]) * 1024 if found else 0]
    # a kernel that has none has no account of them
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, name = line.split(":", 2)
        version = _VERSIONS.get(controllers)
        if version is None:
            continue
        place = groups / version.mounted
        # A container may be shown its own group as the root, whatever that is called.
        directory = place / name.lstrip("/")
        while True:
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                left.append(_left(directory, version))
            if directory == place:
                break
            directory = directory.parent
    return max(min(left), 0) // _MIB


def _left(directory: Path, version: _Version) -> int:
    """Return how many bytes the processes of a control group may still take."""
    limit = int((directory / version.limit).read_text())
    used = int((directory / version.used).read_text())
    lines = (directory / "memory.stat").read_text().splitlines()
    account = {key: int(value) for key, value in (line.split() for line in lines)}
    # What it has read of files counts as used, but goes when memory is wanted.
    return limit - used + sum(account.get(key, 0) for key in version.reclaimed)


def kills(account: Path = Path("/proc/vmstat")) -> int:
    """Return how many processes the kernel has killed for want of memory, ever.

    In whatever control group; it says nowhere else which ones, but in its log.

    :param account: the kernel's counts of events.
    """
    found = re.search(r"^oom_kill ([0-9]+)$", account.read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def for_vms() -> int:
    """Return how much of what is available VMs may take, MiB."""
    return available() * _FOR_VMS // 100


def share(total: int, workers: int, most: int = 0) -> int:
    """Return what each of some workers may give to its VMs, MiB.

    :param total: what all of them may.
    :param workers: how many there are.
    :param most: what the VMs of one test may take, if that is known.
    :raise UsageError: when that is too little.
    """
    needed = max(LEAST, most)
    if total // workers < needed:
        raise UsageError(
            f"{workers} workers share {total} MiB of this machine's memory, and each"
            f" needs {needed} MiB for its VMs: -n {max(total // needed, 1)} is the"
            " most; --host-memory says how much there is"
        )
    return total // workers
