"""The load of this machine, at this moment."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Final

__all__ = ["delay", "idle_cpu", "running"]

#: How many times longer something may take at most because the CPUs are busy.
_BUSIEST: Final = 4.0

#: How often in a row, and how many seconds apart, a CPU must have been found idle.
_LOOKS: Final = 3
_SOON: Final = 0.01
#: Seconds until the next look at a machine that is busy.
_LATER: Final = 0.1


def delay() -> float:
    """Return how many times longer things take because others keep the CPUs busy.

    That is how many threads want each of them; from 1 to 4, whatever the load.
    """
    each = os.getloadavg()[0] / len(os.sched_getaffinity(0))
    return min(max(1.0, each), _BUSIEST)


def running(file: Path = Path("/proc/loadavg")) -> int:
    """Return how many threads of the machine run or want to, less the one that asks.

    :param file: the kernel's account (proc_loadavg(5)).
    """
    return int(file.read_text().split()[3].partition("/")[0]) - 1


async def idle_cpu() -> None:
    """Wait until this machine has a CPU that nobody uses.

    The averages of its load are of a minute, and so of what has ended long ago.
    """
    cpus, found = len(os.sched_getaffinity(0)), 0
    while found < _LOOKS:
        found = found + 1 if running() < cpus else 0
        await asyncio.sleep(_SOON if found else _LATER)
