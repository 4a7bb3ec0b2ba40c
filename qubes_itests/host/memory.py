"""The memory of this machine that is there to be taken, and who may take how much."""

from __future__ import annotations

import re
from pathlib import Path

from qubes_itests.exc import UsageError

__all__ = ["LEAST", "available", "for_vms", "share"]

#: MiB without which no worker is worth its start.
LEAST = 512

_MIB = 1 << 20
#: The hundredths of it that VMs may take: QEMU itself takes some, and tests do.
_FOR_VMS = 80
_AVAILABLE = re.compile(r"^MemAvailable:\s+([0-9]+) kB$", re.MULTILINE)


def available(
    proc: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")
) -> int:
    """Return how much memory processes can still take without swapping, MiB.

    A container is told of the whole machine's memory; what it may use is the limit of
    its control group (cgroup v2), which a machine of its own has not.

    :param proc: the kernel's account of the machine.
    :param group: where control groups are mounted.
    """
    found = _AVAILABLE.search(proc.read_text())
    free = int(found[1]) * 1024 if found else 0
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return free // _MIB
    return max(min(free, limit - used), 0) // _MIB


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
