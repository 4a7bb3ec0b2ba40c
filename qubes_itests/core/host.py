"""The machine that the VMs of an app are on, as the core shows it."""

from __future__ import annotations

import os

__all__ = ["QubesHost"]


class QubesHost:
    """What there is for the VMs of an app to share."""

    def __init__(self) -> None:
        #: The memory that is shared out among VMs, bytes; None for that of the machine.
        self.budget: int | None = None

    @property
    def no_cpus(self) -> int:
        """The number of CPUs."""
        return os.cpu_count() or 1

    @property
    def memory_total(self) -> int:
        """The memory, in KiB."""
        if self.budget is not None:
            return self.budget // 1024
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 1024
