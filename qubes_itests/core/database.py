"""The database of a VM, as extensions read it: qubesdb."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["QubesDB"]


class QubesDB:
    """What a guest finds in its database; the guest adds nothing to it.

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
