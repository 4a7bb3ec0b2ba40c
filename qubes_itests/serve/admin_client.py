"""A call of the Admin API from the command line, where the client tools have none."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Final

from qubes_itests.admin.protocol import Request, encode_request
from qubes_itests.exc import UsageError
from qubes_itests.serve.wire import connectable

if TYPE_CHECKING:
    from qubes_itests.serve.place import Place

__all__ = ["call"]

#: Seconds that an answer may take: that of a method which copies volumes.
_TIMEOUT: Final = 600.0
_OK: Final = b"0\0"
_REFUSED: Final = b"2\0"


def call(place: Place, request: Request) -> str:
    """Return what a server answers.

    :param place: of the server.
    :param request: what is asked for.
    :raise UsageError: when that fails, with what the server says, or when there is
        no answer.
    """
    try:
        reply = _exchange(place, encode_request(request))
    except OSError as error:
        raise UsageError(f"{place.admin_socket}: {error}") from error
    if reply.startswith(_OK):
        return reply[len(_OK) :].decode()
    if not reply.startswith(_REFUSED):
        raise UsageError(f"{place.admin_socket} has not answered")
    _type, _traceback, message, *_rest = reply[len(_REFUSED) :].split(b"\0")
    raise UsageError(message.decode(errors="replace").replace("%%", "%"))


def _exchange(place: Place, data: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_TIMEOUT)
        connection.connect(connectable(str(place.admin_socket)))
        connection.sendall(data)
        # it may have answered already, and be gone
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))
