"""The logs of the VMs of one test: consoles, agents."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from qubes_itests.report.artifacts import tail
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

__all__ = ["GuestLogs", "panic_words"]

_PANIC: Final = re.compile(rb"Kernel panic - not syncing[^\r\n]{0,200}")
_SEARCHED: Final = 1 << 20


class GuestLogs:
    """Tells which logs have been written since a test began.

    :param directory: the run's directory of VMs; None as long as there is none.
    :param open_apps: the directories of the apps whose VMs may write still. Those of
        all tests before are there, too, and a test must not take longer for it.
    """

    def __init__(
        self, directory: Path | None, open_apps: Collection[Path] | None = None
    ) -> None:
        self._directory = directory
        there = self._apps()
        self._closed = there - set(there if open_apps is None else open_apps)
        self._before = self._sizes(there - self._closed)

    def found(self, directory: Path) -> None:
        """Take note of the run's directory, which came after the test began."""
        self._directory = directory

    def written(self) -> list[Path]:
        """Return the logs of the VMs that have started, or said anything, since then.

        An empty console is worth having too: it says that the kernel was silent.
        """
        sizes = self._sizes(self._apps() - self._closed)
        new = {p.parent for p, size in sizes.items() if size > self._before.get(p, -1)}
        return [path for path in sizes if path.parent in new]

    def all(self) -> list[Path]:
        """Return all logs that are there."""
        return list(self._sizes(self._apps()))

    def _apps(self) -> set[Path]:
        return set() if self._directory is None else {*self._directory.glob("apps/*")}

    @staticmethod
    def _sizes(apps: Collection[Path]) -> dict[Path, int]:
        logs = sorted(path for app in apps for path in app.glob("vms/*/*.log"))
        return {path: path.stat().st_size for path in logs if path.is_file()}


def panic_words(console: Path) -> str:
    """Return what the kernel of a guest said last when it panicked, as one line.

    That it did is certain; the words are the guest's.
    """
    try:
        said = _PANIC.findall(tail(console, _SEARCHED))
    except OSError:
        said = []
    return safe_text(said[-1]) if said else "its kernel panicked without a word"
