"""What a core imports as ``qubesdb``."""

from __future__ import annotations

import weakref
from typing import NoReturn

from qubes_itests.dom0 import modules
from qubes_itests.dom0.stores import QubesDB as Database
from qubes_itests.dom0.stores import Watch

__all__ = ["DisconnectedError", "Error", "QubesDB"]


#: Whether a VM has a database only while a daemon runs for it. Unit tests take one for
#: granted, of VMs of which they just say that they run.
needs_daemon = True


class Error(Exception):
    """It cannot be reached, or what it is asked for cannot be."""


class DisconnectedError(Error):
    """The VM has ended, and its database with it."""


class QubesDB:
    """A connection to the database of a VM.

    :param name: of the VM.
    :raise Error: none runs for it.
    """

    def __init__(self, name: str) -> None:
        found = modules.machine().databases.get(name)
        if found is None:
            if needs_daemon:
                raise Error(2, f"no qubesdb-daemon runs for {name}")
            found = Database()
        self._database = found
        self._watch = Watch()
        found.watches.append(self._watch)
        # as the C binding does: a core drops connections without closing them
        self._close = weakref.finalize(self, _drop, found, self._watch)

    def __getattr__(self, name: str) -> NoReturn:
        modules.missing(f"qubesdb.QubesDB.{name}", name)

    def _connected(self) -> None:
        if self._watch.disconnected:
            raise DisconnectedError

    def read(self, path: str) -> bytes | None:
        self._connected()
        return self._database.read(path)

    def list(self, prefix: str) -> list[str]:
        self._connected()
        return self._database.list(prefix)

    def multiread(self, prefix: str) -> dict[str, bytes]:
        self._connected()
        found = {
            path: self._database.read(path) for path in self._database.list(prefix)
        }
        return {path: value for path, value in found.items() if value is not None}

    def write(self, path: str, value: str | bytes) -> None:
        self._connected()
        self._database.write(path, value.encode() if isinstance(value, str) else value)

    def rm(self, path: str) -> None:
        self._connected()
        self._database.remove(path)

    def watch(self, path: str) -> None:
        self._connected()
        self._watch.paths.add(path)

    def unwatch(self, path: str) -> None:
        self._watch.paths.discard(path)

    def watch_fd(self) -> int:
        return self._watch.reader

    def read_watch(self) -> str:
        """Return what has changed."""
        path = self._watch.take()
        if path is None:
            raise DisconnectedError
        return path

    def close(self) -> None:
        self._close()


def _drop(database: Database, watch: Watch) -> None:
    database.watches.remove(watch)
    watch.close()


def __getattr__(name: str) -> NoReturn:
    modules.missing(f"qubesdb.{name}", name)
