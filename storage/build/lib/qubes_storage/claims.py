"""What processes hold between their operations: started volumes, imports, exports.

A claim is a lock on a byte of the pool's lock file (see `lock`), held through an open
file for as long as the claim lasts.  The kernel drops it when the process dies, so a
claim is never stale; and two pools over one directory exclude each other even within
one process.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING

from qubes_storage import lock

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Claims"]


class Claims:
    """The claims of one pool object; for use by several threads.

    :param directory: the directory of the pool.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._mutex = threading.Lock()
        self._held: dict[str, int] = {}
        self._fd: int | None = None

    def __del__(self) -> None:
        self.close()

    def take(self, subject: str, *, shared: bool = False) -> bool:
        """Claim something, or claim it once more.

        :param subject: what; any text.
        :param shared: whether others may share the claim.
        :return: False when somebody else's claim is in the way.
        :raise OSError: when the lock file cannot be opened.
        """
        with self._mutex:
            if subject not in self._held:
                return self._take_first(subject, shared=shared)
            self._held[subject] += 1
            return True

    def drop(self, subject: str) -> None:
        """Undo one `take`; no error when there was none."""
        with self._mutex:
            count = self._held.pop(subject, 0)
            if count > 1:
                self._held[subject] = count - 1
            elif count and self._fd is not None:
                lock.unlock(self._fd, subject)
            self._close_if_idle()

    def is_held(self, subject: str) -> bool:
        """Tell whether this object has the claim."""
        return subject in self._held

    def is_elsewhere(self, subject: str) -> bool:
        """Tell whether somebody else has a claim, shared or not.

        :raise OSError: when the lock file cannot be opened.
        """
        with self._mutex:
            try:
                return lock.is_locked(self._open(), subject)
            finally:
                self._close_if_idle()

    def close(self) -> None:
        """Drop all claims."""
        with self._mutex:
            self._held.clear()
            self._close_if_idle()

    def _take_first(self, subject: str, *, shared: bool) -> bool:
        try:
            taken = lock.try_lock(self._open(), subject, shared=shared)
            if taken:
                self._held[subject] = 1
            return taken
        finally:
            self._close_if_idle()

    def _open(self) -> int:
        if self._fd is None:
            self._fd = lock.open_lock_file(self._directory)
        return self._fd

    def _close_if_idle(self) -> None:
        # An open file would keep the pool's filesystem from being unmounted.
        if not self._held and self._fd is not None:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = None
