"""The server of the Admin API's socket."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from qubes_itests.admin.dispatch import Dispatcher, error_name
from qubes_itests.admin.methods import METHODS
from qubes_itests.admin.protocol import (
    LONGEST_REQUEST,
    encode_exception,
    parse_request,
)
from qubes_itests.admin.streams import EventStream
from qubes_itests.core.exc import PermissionDenied
from qubes_itests.limited_log import LimitedLog
from qubes_itests.unix_server import UnixServer

if TYPE_CHECKING:
    from pathlib import Path

    from qubes_itests.admin.protocol import Request
    from qubes_itests.core.app import Qubes
    from qubes_itests.unix_server import Client

__all__ = ["AdminServer"]

log = logging.getLogger("qubes.admin")

#: How many clients may wait for events; the others are for calls.
_MOST_STREAMS: Final = 256


class AdminServer(UnixServer):
    """An async context manager that serves the Admin API on a socket.

    A client of this socket counts as dom0; calls of VMs come by
    `qubes_itests.admin.vm_calls`.

    :param app: whom the calls are made to; on the running event loop.
    :param path: of the socket.
    :param debug: whether clients get tracebacks.
    """

    most = 512

    def __init__(self, app: Qubes, path: Path, *, debug: bool = False) -> None:
        super().__init__(path)
        self.dispatcher = Dispatcher(app, METHODS, debug=debug)
        self._streams = 0
        self._admin_log = LimitedLog(log)

    async def converse(self, client: Client) -> None:
        """Answer the one request of a connection, which ends with the stream."""
        try:
            async with client.request():
                await client.reader.readexactly(LONGEST_REQUEST + 1)
        except asyncio.IncompleteReadError as error:
            data = error.partial
        else:
            self._admin_log.warning(
                "", "a request of more than %d bytes is dropped", LONGEST_REQUEST
            )
            return
        try:
            request = parse_request(data)
        except ValueError as error:
            told = "no request of the Admin API: %s"
            self._admin_log.warning("", told, str(error))
            return
        # From here on a client that goes ends no more than its own stream of events:
        # a change that was asked for is seen through.
        reply = await self._answer(request, _SocketStream(client))
        if reply is not None:
            await client.answer(reply)

    async def _answer(self, request: Request, stream: EventStream) -> bytes | None:
        if request.source != "dom0":
            self._admin_log.warning("", "%s: this socket is dom0's", request)
            reason = f"this socket is dom0's; {request.source} calls by qrexec"
            refusal = PermissionDenied(reason)
            return encode_exception(error_name(refusal), str(refusal))
        method = self.dispatcher.methods.get(request.method)
        if method is None or not method.streams:
            return await self.dispatcher.answer(request, stream)
        if self._streams >= _MOST_STREAMS:
            reason = f"{_MOST_STREAMS} clients wait for events, and no more may"
            self._admin_log.warning("", "%s: %s", request, reason)
            return encode_exception("QubesException", reason)
        self._streams += 1
        try:
            return await self.dispatcher.answer(request, stream)
        finally:
            self._streams -= 1


class _SocketStream(EventStream):
    def __init__(self, client: Client) -> None:
        super().__init__()
        self._client = client
        self._transport = client.writer.transport

    async def wait_closed(self) -> None:
        with self._client.watched(self._drop):
            await super().wait_closed()

    def _write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)

    def _backlog(self) -> int:
        return self._transport.get_write_buffer_size()

    def _drop(self) -> None:
        self._transport.abort()
        self.close()
