"""The directory of a server's sockets and programs, and the search for servers."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qubes_itests.exc import UsageError
from qubes_itests.host import rundir
from qubes_itests.program import typed
from qubes_itests.serve.wire import connectable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qubes_itests.host.cache import Cache

__all__ = ["VARIABLE", "Place", "find"]

#: Names the directory of the server to call.
VARIABLE: Final = "QUBES_ITESTS_SERVE"
_BEGIN: Final = f"begin with `{typed('serve')}`."

_NAME: Final = "serve"


@dataclass(frozen=True, slots=True)
class Place:
    """The directory of a server.

    :param directory: it.
    """

    directory: Path

    @classmethod
    def of_run(cls, run: Path) -> Place:
        """Return the place in the directory of a run."""
        return cls(run / _NAME)

    @property
    def admin_socket(self) -> Path:
        """The socket of the Admin API."""
        return self.directory / "qubesd.sock"

    def answers(self) -> bool:
        """Tell whether a server has its socket there: one that was killed left it."""
        # by datagrams nothing connects to it, and the server hears nothing: an error
        # tells a socket of another type from one that nobody has any more; see unix(7)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(connectable(str(self.admin_socket)))
            except OSError as error:
                return error.errno == errno.EPROTOTYPE
        return True

    @property
    def relay_socket(self) -> Path:
        """The socket that `programs` connect to."""
        return self.directory / "qrexec.sock"

    @property
    def programs(self) -> Path:
        """The programs that the client tools call, and those tools by their names."""
        return self.directory / "bin"

    @property
    def dom0_programs(self) -> Path:
        """Programs of dom0 that the tools, and nobody else, find before others."""
        return self.directory / "dom0"

    @property
    def services(self) -> Path:
        """What the client tools look for in ``/etc/qubes-rpc``."""
        return self.directory / "qubes-rpc"


def find(
    cache: Cache,
    admin_socket: Path | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Place:
    """Return the place of the server to call.

    :param cache: where runs have their directories.
    :param admin_socket: of the Admin API, if it was named.
    :param environment: may name the directory of one that lives; else the newest
        server is taken.
    :raise UsageError: when there is none.
    """
    if admin_socket is not None:
        place = Place(admin_socket.absolute().parent)
        if not place.answers():
            raise UsageError(f"Nothing serves on {place.admin_socket}: {_BEGIN}")
        return place
    # a shell may have the variables of a server that has ended since
    if (name := environment.get(VARIABLE, "")) and Place(Path(name)).answers():
        return Place(Path(name))
    found = []
    for run in rundir.under_way(cache):
        path = Place.of_run(run).admin_socket
        # the run may end meanwhile
        with contextlib.suppress(OSError):
            if path.is_socket():
                found.append((path.stat().st_mtime, path))
    if not found:
        raise UsageError(f"Nothing serves: {_BEGIN}")
    return Place(max(found)[1].parent)
