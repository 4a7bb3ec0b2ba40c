"""One client's connection: one request, one answer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Protocol, cast

from qubes_itests.admin.exc import FramingError
from qubes_itests.admin.protocol import LONGEST_REQUEST, parse_request
from qubes_itests.admin.streams import EventStream

if TYPE_CHECKING:
    from qubes_itests.admin.hangups import Hangups
    from qubes_itests.admin.protocol import Request

__all__ = ["Connection", "Host"]

#: Seconds that a client has to send its request, and again to read its answer.
CLIENT_TIMEOUT: Final = 30.0


class Host(Protocol):
    """What a connection needs of its server."""

    def opened(self, connection: Connection) -> None:
        """Take note of a new client."""

    def requested(self, connection: Connection) -> None:
        """Take note that its request is complete."""

    def refused(self, reason: str) -> None:
        """Take note that what a client sent is no request."""

    def closed(self, connection: Connection) -> None:
        """Take note that it is gone."""

    @property
    def hangups(self) -> Hangups:
        """Tells of sockets whose other end is closed."""

    async def answer(self, request: Request, stream: EventStream) -> bytes | None:
        """Do what is asked, and return the reply."""


class Connection(asyncio.Protocol):
    """Collects the request, and sends what the server says to it.

    :param host: the server.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()
        self._transport: asyncio.Transport
        self._deadline: asyncio.TimerHandle
        self._stream: _SocketStream
        #: Answers the request.
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Give the client its time."""
        self._transport = cast("asyncio.Transport", transport)
        self._limit_time()
        self._host.opened(self)

    def data_received(self, data: bytes) -> None:
        """Collect; one byte too many ends it."""
        if len(self._received) + len(data) > LONGEST_REQUEST:
            self._host.refused(
                f"a request of more than {LONGEST_REQUEST} bytes is dropped"
            )
            self.abort()
            return
        self._received += data

    def eof_received(self) -> bool | None:
        """Answer: the request is complete."""
        self._deadline.cancel()
        try:
            request = parse_request(bytes(self._received))
        except FramingError as error:
            self._host.refused(str(error))
            self.abort()
            return None
        self._received.clear()
        self._host.requested(self)
        self._stream = _SocketStream(self._transport, self._host.hangups)
        self.task = self._loop.create_task(self._respond(request))
        return True

    def connection_lost(self, error: Exception | None) -> None:
        """Have streams end; other requests are seen through."""
        del error
        self._deadline.cancel()
        if self.task is not None:
            self._stream.close()
        self._host.closed(self)

    def abort(self) -> None:
        """Close at once, whatever is unsent."""
        self._transport.abort()

    async def _respond(self, request: Request) -> None:
        reply = await self._host.answer(request, self._stream)
        if self._transport.is_closing():
            return
        if reply is not None:
            self._transport.write(reply)
        if self._transport.get_write_buffer_size():
            self._limit_time()
        self._transport.close()

    def _limit_time(self) -> None:
        self._deadline = self._loop.call_later(CLIENT_TIMEOUT, self.abort)


class _SocketStream(EventStream):
    def __init__(self, transport: asyncio.Transport, hangups: Hangups) -> None:
        super().__init__()
        self._transport = transport
        self._hangups = hangups

    async def wait_closed(self) -> None:
        if self._transport.is_closing():
            return
        # asyncio looks no more at a socket whose other end has half-closed
        descriptor = self._transport.get_extra_info("socket").fileno()
        with self._hangups.watched(descriptor, self._drop):
            await super().wait_closed()

    def _write(self, data: bytes) -> None:
        self._transport.write(data)

    def _backlog(self) -> int:
        return self._transport.get_write_buffer_size()

    def _drop(self) -> None:
        self._transport.abort()
