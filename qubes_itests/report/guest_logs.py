"""The logs of the VMs of one test: consoles, agents."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from qubes_itests.report.artifacts import tail

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["GuestLogs"]

_PANIC = re.compile(rb"Kernel panic - not syncing[^\r\n]{0,200}")
_SEARCHED = 1 << 20


class GuestLogs:
    """Tells which logs have been written since a test began.

    :param directory: the run's directory of VMs; None as long as there is none.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._before = self._sizes()

    def found(self, directory: Path) -> None:
        """Take note of the run's directory, which came after the test began."""
        self._directory = directory

    def written(self) -> list[Path]:
        """Return the logs of the VMs that have started, or said anything, since then.

        An empty console is worth having too: it says that the kernel was silent.
        """
        sizes = self._sizes()
        new = {p.parent for p, size in sizes.items() if size > self._before.get(p, -1)}
        return [path for path in sizes if path.parent in new]

    def all(self) -> list[Path]:
        """Return all logs that are there."""
        return list(self._sizes())

    def panics(self) -> list[str]:
        """Return what the kernels of guests said when they gave up, with VM names."""
        found = []
        for path in self.written():
            new = max(path.stat().st_size - self._before.get(path, 0), 0)
            if said := _PANIC.search(tail(path, min(new, _SEARCHED))):
                text = said[0].decode("ascii", "replace")
                found.append(f"VM {path.parent.name}: {text}")
        return found

    def _sizes(self) -> dict[Path, int]:
        if self._directory is None:
            return {}
        logs = sorted(self._directory.glob("apps/*/vms/*/*.log"))
        return {path: path.stat().st_size for path in logs if path.is_file()}
