"""The server: a Unix socket, and the clients that are on it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
from typing import TYPE_CHECKING, Final, Self

from qubes_itests.admin.connection import Connection
from qubes_itests.admin.dispatch import Dispatcher, error_name
from qubes_itests.admin.exc import PermissionDenied
from qubes_itests.admin.hangups import Hangups
from qubes_itests.admin.methods import METHODS
from qubes_itests.admin.protocol import encode_exception
from qubes_itests.exc import HarnessError
from qubes_itests.limited_log import LimitedLog

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
#: How many of them may wait for events; the others are for calls.
_MOST_STREAMS: Final = 256
#: Descriptors that are left to all else: guests, disks, programs.
_OTHER_DESCRIPTORS: Final = 512
_BACKLOG: Final = 256
#: Connections that are accepted in one go, before any that is too many is closed.
_ACCEPTED: Final = 32


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
        self._streams = 0
        #: Those whose requests are incomplete, the oldest first.
        self._sending: dict[Connection, None] = {}
        self._limited = LimitedLog(log)
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Take the socket and begin.

        :raise HarnessError: when another server answers on it.
        """
        async with contextlib.AsyncExitStack() as stack:
            listening = _listen(self.path)
            stack.callback(self.path.unlink, missing_ok=True)
            stack.callback(listening.close)
            self.hangups = Hangups()
            stack.callback(self.hangups.close)
            stack.push_async_callback(self._end_clients)
            server = await asyncio.get_running_loop().create_unix_server(
                lambda: Connection(self), sock=listening, backlog=_ACCEPTED
            )
            # a client that does not wait to be connected would be refused early
            listening.listen(_BACKLOG)
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
            self._limited.warning("", "%s: this socket is dom0's", request)
            reason = f"this socket is dom0's; {request.source} calls by qrexec"
            refusal = PermissionDenied(reason)
            return encode_exception(error_name(refusal), str(refusal))
        method = self.dispatcher.methods.get(request.method)
        if method is None or not method.streams:
            return await self.dispatcher.answer(request, stream)
        if self._streams >= _MOST_STREAMS:
            reason = f"{_MOST_STREAMS} clients wait for events, and no more may"
            self._limited.warning("", "%s: %s", request, reason)
            return encode_exception("QubesException", reason)
        self._streams += 1
        try:
            return await self.dispatcher.answer(request, stream)
        finally:
            self._streams -= 1

    def opened(self, connection: Connection) -> None:
        """Take note of a new client; if there are too many, one that sends goes.

        If none does, it is the new one.
        """
        self._clients.add(connection)
        self._sending[connection] = None
        if len(self._clients) > (most := most_clients()):
            self._limited.warning("", "more than %d clients: one is dropped", most)
            dropped = next(iter(self._sending))
            # at once: the next may come before this one is told that it is gone
            self.closed(dropped)
            dropped.abort()

    def requested(self, connection: Connection) -> None:
        """Take note that its request is complete."""
        self._sending.pop(connection, None)

    def refused(self, reason: str) -> None:
        """Take note that what a client sent is no request."""
        self._limited.warning("", "%s", reason)

    def closed(self, connection: Connection) -> None:
        """Take note that it is gone."""
        self._sending.pop(connection, None)
        self._clients.discard(connection)


def most_clients() -> int:
    """Return how many clients there may be at once, with the descriptors there are."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _MOST_CLIENTS
    return max(1, min(_MOST_CLIENTS, limit - _OTHER_DESCRIPTORS))


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
    raise HarnessError(f"{path} is served already; stop that server, or use another")
