"""The database of a VM, as extensions read it: qubesdb."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["OwnQubesDB", "QubesDB"]


class QubesDB:
    """What a guest finds in its database, and what its agent says there of devices.

    :param entries: values by paths.
    """

    def __init__(self, entries: Mapping[str, str]) -> None:
        self._entries = {path: value.encode() for path, value in entries.items()}

    def read(self, path: str) -> bytes | None:
        """Return an entry, None if there is none."""
        return self._entries.get(path)

    def list(self, prefix: str) -> list[str]:
        """Return the paths that begin so."""
        return [path for path in self._entries if path.startswith(prefix)]

    def multiread(self, prefix: str) -> dict[str, bytes]:
        """Return the entries whose paths begin so."""
        return {path: self._entries[path] for path in self.list(prefix)}


class OwnQubesDB(QubesDB):
    """A database that is written to by who has it, as dom0's.

    :param changed: called with each path that is written or removed.
    """

    def __init__(self, changed: Callable[[str], object]) -> None:
        super().__init__({})
        self._changed = changed

    def write(self, path: str, value: str | bytes) -> None:
        """Set an entry."""
        self._entries[path] = value.encode() if isinstance(value, str) else value
        self._changed(path)

    def rm(self, path: str) -> None:
        """Remove an entry, or with a ``/`` at its end all below it."""
        for known in list(self._entries):
            if known == path or (path.endswith("/") and known.startswith(path)):
                del self._entries[known]
                self._changed(known)
