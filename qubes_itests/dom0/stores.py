"""XenStore and QubesDB, in memory.

Both are read and written by the core's thread and by that of the event loop: each
operation is one step on a dict, or holds the lock.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["QubesDB", "Watch", "XenStore"]

#: Where a path without a slash in front begins, for dom0.
_HOME: Final = "/local/domain/0/"


class XenStore:
    """A tree of values by path."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._watches: list[tuple[str, Callable[[str], None]]] = []
        self._lock = threading.Lock()

    def watch(self, path: str, call: Callable[[str], None]) -> Callable[[], None]:
        """Have a function called with the path of each change there or below.

        Once at first, as in Xen. It is called in the thread that makes the change.

        :param path: also ``@introduceDomain`` or ``@releaseDomain``.
        :return: ends it.
        """
        entry = path if path.startswith("@") else _full(path), call
        self._watches.append(entry)
        call(path)
        return lambda: self._watches.remove(entry)

    def announce(self, path: str) -> None:
        """Tell who watches a path of a change there."""
        for watched, call in tuple(self._watches):
            if path == watched or path.startswith(f"{watched}/"):
                call(path)

    def read(self, path: str) -> bytes | None:
        """Return a value; empty for a directory, None where there is nothing."""
        path = _full(path)
        with self._lock:
            if path in self._values:
                return self._values[path]
            below = f"{path}/"
            return b"" if any(key.startswith(below) for key in self._values) else None

    def write(self, path: str, value: str | bytes) -> None:
        """Set a value."""
        data = value.encode() if isinstance(value, str) else bytes(value)
        path = _full(path)
        with self._lock:
            self._values[path] = data
        self.announce(path)

    def names(self, path: str) -> list[str] | None:
        """Return the names below a path; None where there is nothing."""
        below = f"{_full(path)}/"
        with self._lock:
            found = [key for key in self._values if key.startswith(below)]
            if not found and _full(path) not in self._values:
                return None
        return list(dict.fromkeys(k.removeprefix(below).split("/")[0] for k in found))

    def remove(self, path: str) -> None:
        """Remove a path, and all below."""
        path = _full(path)
        with self._lock:
            below = f"{path}/"
            gone = [k for k in self._values if k == path or k.startswith(below)]
            for key in gone:
                del self._values[key]
        for key in gone:
            self.announce(key)


def _full(path: str) -> str:
    full = path if path.startswith("/") else _HOME + path
    return full.rstrip("/")


class Watch:
    """Changes that one connection to a QubesDB is told of, by a descriptor."""

    def __init__(self) -> None:
        self.paths: set[str] = set()
        self.disconnected = False
        #: What has changed, in order, and each once: its reader asks what is there now.
        self._changed: dict[str, None] = {}
        # The core drops a connection in its own thread, whenever Python likes: a number
        # that is closed may be that of another file when it is written to. Reentrant,
        # as that may come within what holds it.
        self._lock = threading.RLock()
        self._closed = False
        # Readable, by one byte, for as long as something is to be read: with a byte for
        # each change a guest that makes many would fill it, and hold up who writes.
        self.reader, self._writer = os.pipe()
        os.set_blocking(self.reader, False)

    def note(self, path: str) -> None:
        """Take note of a change, if it is watched."""
        if any(
            path == watched or (watched.endswith("/") and path.startswith(watched))
            for watched in tuple(self.paths)
        ):
            with self._lock:
                self._signal()
                self._changed[path] = None

    def disconnect(self) -> None:
        """Have the reader told that there is no database any more."""
        with self._lock:
            self._signal()
            self.disconnected = True

    def _signal(self) -> None:
        if not (self._closed or self._changed or self.disconnected):
            os.write(self._writer, b"\0")

    def take(self) -> str | None:
        """Return what changed first; None when the database has gone."""
        with self._lock:
            path = next(iter(self._changed), None)
            if path is not None:
                del self._changed[path]
            if path is None or not (self._changed or self.disconnected):
                os.read(self.reader, 1)
            return path

    def close(self) -> None:
        """Close its descriptors."""
        with self._lock:
            self._closed = True
            os.close(self.reader)
            os.close(self._writer)


class QubesDB:
    """The entries of one VM. What dom0 writes reaches the guest while it runs."""

    def __init__(self) -> None:
        self._entries: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self.watches: list[Watch] = []
        #: Passes a change on to the guest, a value of None is a removal; None while
        #: there is no guest.
        self.pass_on: Callable[[str, str | None], None] | None = None

    def texts(self) -> dict[str, str]:
        """Return all entries."""
        with self._lock:
            return {path: value.decode() for path, value in self._entries.items()}

    def read(self, path: str) -> bytes | None:
        """Return an entry, None if there is none."""
        return self._entries.get(path)

    def list(self, prefix: str) -> list[str]:
        """Return the paths that begin so."""
        with self._lock:
            return sorted(path for path in self._entries if path.startswith(prefix))

    def write(self, path: str, value: bytes) -> None:
        """Set an entry."""
        with self._lock:
            self._entries[path] = value
        self._changed(path, value)

    def remove(self, path: str) -> None:
        """Remove an entry; one that ends in a slash stands for all below."""
        gone = self.list(path) if path.endswith("/") else [path]
        for name in gone:
            with self._lock:
                self._entries.pop(name, None)
            self._changed(name, None)

    def take_over(self, path: str, before: bytes | None, value: bytes | None) -> None:
        """Have what a guest has written, or removed if it is None.

        :param before: what was there; what dom0 has written since then stays.
        """
        with self._lock:
            if self._entries.get(path) != before:
                return
            if value is None:
                del self._entries[path]
            else:
                self._entries[path] = value
        self._note(path)

    def _note(self, path: str) -> None:
        for watch in tuple(self.watches):
            watch.note(path)

    def _changed(self, path: str, value: bytes | None) -> None:
        self._note(path)
        if self.pass_on is not None:
            self.pass_on(path, None if value is None else value.decode())

    def disconnect(self) -> None:
        """Tell all connections that the VM has ended."""
        self.pass_on = None
        for watch in tuple(self.watches):
            watch.disconnect()
