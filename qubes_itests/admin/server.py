"""The server: a Unix socket, and the clients that are on it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from typing import TYPE_CHECKING, Final, Self

from qubes_itests.admin.connection import Connection
from qubes_itests.admin.dispatch import Dispatcher, error_name
from qubes_itests.admin.exc import AlreadyServedError, PermissionDenied
from qubes_itests.admin.hangups import Hangups
from qubes_itests.admin.methods import METHODS
from qubes_itests.admin.protocol import encode_exception

if TYPE_CHECKING:
    from pathlib import Path

    from qubes_itests.admin.protocol import Request
    from qubes_itests.admin.streams import EventStream
    from qubes_itests.core.app import Qubes

__all__ = ["AdminServer"]

log = logging.getLogger("qubes.admin")

#: Who may connect: owner and group.
_MODE: Final = 0o660
#: Connections at once; beyond that the one that has been sending for longest goes.
_MOST_CLIENTS: Final = 512
_BACKLOG: Final = 256


class AdminServer:
    """An async context manager that serves the Admin API on a socket.

    Whoever may connect is dom0; calls of VMs come by `qubes_itests.admin.vm_calls`.

    :param app: whom the calls are made to; on the running event loop.
    :param path: of the socket.
    :param debug: whether clients get tracebacks.
    """

    def __init__(self, app: Qubes, path: Path, *, debug: bool = False) -> None:
        self.path = path
        self.dispatcher = Dispatcher(app, METHODS, debug=debug)
        self.hangups: Hangups
        self._clients: set[Connection] = set()
        #: Those whose requests are incomplete, the oldest first.
        self._sending: dict[Connection, None] = {}
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Take the socket and begin.

        :raise AlreadyServedError: when another server answers on it.
        """
        async with contextlib.AsyncExitStack() as stack:
            listening = _listen(self.path)
            stack.callback(self.path.unlink, missing_ok=True)
            stack.callback(listening.close)
            self.hangups = Hangups()
            stack.callback(self.hangups.close)
            stack.push_async_callback(self._end_clients)
            server = await asyncio.get_running_loop().create_unix_server(
                lambda: Connection(self), sock=listening, backlog=_BACKLOG
            )
            stack.callback(server.close)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """Close every connection and remove the socket."""
        await self._stack.aclose()

    async def _end_clients(self) -> None:
        tasks = [client.task for client in self._clients if client.task is not None]
        for client in list(self._clients):
            client.abort()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # what connections ask

    async def answer(self, request: Request, stream: EventStream) -> bytes | None:
        """Do what is asked, and return the reply."""
        if request.source != "dom0":
            log.warning("%s: this socket is dom0's", request)
            reason = f"this socket is dom0's; {request.source} calls by qrexec"
            refusal = PermissionDenied(reason)
            return encode_exception(error_name(refusal), str(refusal))
        return await self.dispatcher.answer(request, stream)

    def opened(self, connection: Connection) -> None:
        """Take note of a new client; if there are too many, one that sends goes."""
        self._clients.add(connection)
        self._sending[connection] = None
        if len(self._clients) > _MOST_CLIENTS:
            log.warning("more than %d clients: one is dropped", _MOST_CLIENTS)
            next(iter(self._sending)).abort()

    def requested(self, connection: Connection) -> None:
        """Take note that its request is complete."""
        self._sending.pop(connection, None)

    def closed(self, connection: Connection) -> None:
        """Take note that it is gone."""
        self._sending.pop(connection, None)
        self._clients.discard(connection)


def _listen(path: Path) -> socket.socket:
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.socket(socket.AF_UNIX))
        # before the bind: at no moment may anybody else connect
        os.fchmod(listening.fileno(), _MODE)
        _remove_stale(path)
        listening.bind(str(path))
        path.chmod(_MODE)
        listening.setblocking(False)
        stack.pop_all()
    return listening


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody serves any more."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            if path.is_socket():
                path.unlink(missing_ok=True)
            return
    raise AlreadyServedError(path)
