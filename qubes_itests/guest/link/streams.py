"""Ends of a channel, as asyncio has them: a reader and a writer.

Credit is all the flow control there is. A reader gives back what its consumer has
taken, never before, so what it holds is bounded by a window; a writer keeps what it has
no credit for, and `drain` has who writes wait. No stream can hold up another: they
share a transport, whose room is given out in turns (`Link.has_room`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from qubes_itests.guest.link.protocol import HostProtocol

__all__ = ["GuestReader", "GuestWriter", "Link", "LosableReader"]

#: Where a reader stops giving back credit at once; `readline` takes lines up to it.
_LIMIT: Final = 65_536
#: Credit smaller than this is given back later, together.
_CREDIT_STEP: Final = 32_768
#: Bytes of what came last that a reader remembers.
_LAST: Final = 2000
#: `GuestWriter.drain` waits while more than this is waiting for credit.
_HIGH_WATER: Final = 65_536


class Link(Protocol):
    """What a channel needs of its connection."""

    protocol: HostProtocol

    def send(self, data: bytes) -> None:
        """Hand bytes to the transport; dropped when the connection has ended."""

    def has_room(self, writer: GuestWriter) -> bool:
        """Tell whether DATA may be sent now; if not, `writer.flush` is called later."""

    def forget(self, stream: int) -> None:
        """Drop a call that has ended."""

    def hold_up(self) -> None:
        """Take note that a call was refused."""


class _Throttle(asyncio.ReadTransport):
    """Transport in the eyes of `asyncio.StreamReader`, which pauses and resumes it."""

    def __init__(self, reader: GuestReader) -> None:
        super().__init__()
        self._reader = reader

    def pause_reading(self) -> None:
        """Do nothing: without credit the guest pauses by itself."""

    def resume_reading(self) -> None:
        """Give credit back."""
        self._reader.give_credit()


class LosableReader(asyncio.StreamReader):
    """A reader whose source may go away before its end.

    What had come until then is read as always; who asks for more gets the error.
    """

    _lost: Exception | None = None
    _buffer: bytearray

    def lose(self, error: Exception) -> None:
        """Take note that the rest will never come."""
        # `set_exception` would not do: asyncio raises what it set before it looks into
        # the buffer, and the last words of a guest that crashed would be gone
        self._lost = error
        super().feed_eof()

    async def read(self, n: int = -1) -> bytes:
        """Read as `asyncio.StreamReader` does; what was lost is no end.

        To read to an end that will never come leaves all that had come.
        """
        taken: list[bytes] = []
        try:
            while data := await super().read(n if n >= 0 else _LIMIT):
                if n >= 0:
                    return data
                taken.append(data)
            if self._lost is not None and n:
                raise self._lost  # noqa: TRY301 - as a wait that is cancelled does
        except BaseException:
            # asyncio has taken it out of the buffer
            self._buffer[:0] = b"".join(taken)
            raise
        return b"".join(taken)

    async def readexactly(self, n: int) -> bytes:
        """Read so many bytes; when fewer are left, `read` still returns those."""
        try:
            return await super().readexactly(n)
        except asyncio.IncompleteReadError as left:
            raise self._keep(left) from None

    async def readuntil(self, separator: bytes = b"\n") -> bytes:  # type: ignore[override]  # a tuple, since 3.13
        """Read up to a separator; when none is left, `read` returns what is."""
        try:
            return await super().readuntil(separator)
        except asyncio.IncompleteReadError as left:
            raise self._keep(left) from None

    def _keep(self, left: asyncio.IncompleteReadError) -> Exception:
        if self._lost is None:
            return left
        # asyncio has taken it out of the buffer
        self._buffer += left.partial
        return self._lost


class GuestReader(LosableReader):
    """What the guest writes on one channel.

    Credit goes back to the guest as the consumer takes bytes, so that the buffer holds
    at most one window; only `readexactly` of more than a window lets it grow, to the
    size asked for.

    :param link: the connection.
    :param stream: number of the stream.
    :param channel: number of the channel.
    """

    def __init__(self, link: Link, stream: int, channel: int) -> None:
        super().__init__(limit=_LIMIT)
        self._link = link
        self._address = (stream, channel)
        self._owed = 0
        self._stopped = False
        self._complete = False
        #: How many bytes have come, and the last of them, for the timeline.
        self.received = 0
        self.last = b""
        self.set_transport(_Throttle(self))

    def feed_data(self, data: bytes | memoryview) -> None:  # type: ignore[override]  # asyncio: iterables
        """Take bytes of the guest."""
        if self._complete:
            # It was on its way when STOP was sent. No credit for it: the guest must
            # run out of credit, should it go on for ever. Or it is why a command did
            # not start, of which the guest has closed the output.
            return
        self._owed += len(data)
        self.received += len(data)
        self.last = (self.last + data[-_LAST:])[-_LAST:]
        super().feed_data(data)
        # What the consumer took since the last time it shows only now: asyncio tells
        # of it (`give_credit`) only if it had paused us, with twice `_LIMIT` in the
        # buffer. Below that a guest still has credit, so its next DATA brings us here.
        if self._owed - self._buffered() >= _CREDIT_STEP:
            self._give(self._owed - self._buffered())

    def give_credit(self) -> None:
        """Give back what the consumer has taken.

        When it waits for more than a window while all is in the buffer (`readexactly`),
        what the buffer holds is given back too, or it would wait for ever.
        """
        buffered = self._buffered()
        self._give(self._owed - (buffered if buffered <= _LIMIT else 0))

    def stop(self) -> None:
        """Tell the guest that nobody reads this any more; what comes is dropped."""
        if self._stopped:
            return
        self._stopped = True
        # A guest that has sent EOF has closed its end, and forgotten the channel.
        if self._link.protocol.is_open(self._address[0]) and not self._complete:
            self._link.send(self._link.protocol.stop(*self._address))
        self.feed_eof()

    def feed_eof(self) -> None:
        """Take note that nothing more comes."""
        self._complete = True
        super().feed_eof()

    def lose(self, error: Exception) -> None:
        """Take note that the rest will never come, unless its end has come."""
        if not self._complete:
            super().lose(error)

    def _give(self, size: int) -> None:
        if size <= 0 or not self._link.protocol.is_open(self._address[0]):
            return
        self._owed -= size
        self._link.send(self._link.protocol.give_credit(*self._address, size))

    def _buffered(self) -> int:
        return len(self._buffer)


class GuestWriter:
    """What the guest reads on one channel: the writing half of `asyncio.StreamWriter`.

    :param link: the connection.
    :param stream: number of the stream.
    :param channel: number of the channel.
    """

    def __init__(self, link: Link, stream: int, channel: int) -> None:
        self._link = link
        self._address = (stream, channel)
        self._waiting: deque[memoryview] = deque()
        self._size = 0
        self._eof = False
        self._eof_sent = False
        self._error: BaseException | None = None
        self._changed: asyncio.Future[None] | None = None
        self._on_broken: Callable[[], object] | None = None

    def when_broken(self, callback: Callable[[], object]) -> None:
        """Have a function called when nobody reads this any more; at once if so now."""
        if self._error is not None:
            callback()
        else:
            self._on_broken = callback

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes, now or as the guest takes them.

        :raise RuntimeError: after `write_eof`.
        """
        if self._eof:
            raise RuntimeError("write() after write_eof()")
        if not data or self._error is not None:
            return
        # bytes never change, so they need no copy; others may
        view = memoryview(data if isinstance(data, bytes) else bytes(data))
        self._waiting.append(view)
        self._size += len(view)
        self.flush()

    def writelines(self, data: Iterable[bytes | bytearray | memoryview]) -> None:
        """Send several pieces."""
        self.write(b"".join(data))

    async def drain(self) -> None:
        """Wait until little is left to be taken by the guest.

        :raise BrokenPipeError: the guest has stopped reading.
        :raise GuestGoneError: the connection has ended.
        """
        await self._until(lambda: self._size <= _HIGH_WATER)
        if self._error is not None:
            raise self._error

    async def flushed(self) -> None:
        """Wait until all is sent, or nobody reads it any more."""
        await self._until(lambda: not self._size)

    @property
    def backlog(self) -> int:
        """How many bytes wait to be taken by the guest."""
        return self._size

    def can_write_eof(self) -> bool:
        """Tell that it can be closed; as asyncio has it."""
        return True

    def write_eof(self) -> None:
        """Close the channel after what was written; a second call does nothing."""
        self._eof = True
        self.flush()

    def close(self) -> None:
        """Close the channel; the same as `write_eof`."""
        self.write_eof()

    def is_closing(self) -> bool:
        """Tell whether it is closed, or was by the guest."""
        return self._eof or self._error is not None

    async def wait_closed(self) -> None:
        """Wait until all is sent and the channel is closed, or the guest does not read.

        :raise GuestGoneError: the connection has ended.
        """
        await self._until(lambda: self._eof_sent)
        if isinstance(self._error, ConnectionError) and not isinstance(
            self._error, BrokenPipeError
        ):
            raise self._error

    def get_extra_info(self, name: str, default: object = None) -> object:
        """Return `default`: there is nothing to tell about `name`."""
        del name
        return default

    # for the connection

    def flush(self) -> None:
        """Send what credit and the connection allow."""
        protocol = self._link.protocol
        if self._error is not None or not protocol.is_open(self._address[0]):
            return
        # asked for room only with something to send: `has_room` puts who gets none in
        # the queue
        if self._waiting and self._link.has_room(self):
            self._send_waiting(protocol)
        # A half-close follows the last byte. EOF at once would close the channel before
        # what waits for credit, and the guest would take the rest for a breach.
        if self._eof and not self._size and not self._eof_sent:
            self._eof_sent = True
            self._link.send(protocol.eof(*self._address))
        self._wake()

    def _send_waiting(self, protocol: HostProtocol) -> None:
        frames = []
        while self._waiting and (credit := protocol.credit(*self._address)):
            part = self._waiting.popleft()
            if len(part) > credit:
                self._waiting.appendleft(part[credit:])
                part = part[:credit]
            self._size -= len(part)
            frames.append(protocol.data(*self._address, part))
        if frames:
            self._link.send(b"".join(frames) if len(frames) > 1 else frames[0])

    def break_off(self, error: BaseException) -> None:
        """Take it that nobody reads this any more, and why."""
        if self._error is None:
            self._error = error
        self._waiting.clear()
        self._size = 0
        # nobody reads EOF either; `wait_closed` must not wait for it
        self._eof_sent = True
        self._wake()
        # once, and cleared first: it may come back here by what it closes
        callback, self._on_broken = self._on_broken, None
        if callback is not None:
            callback()

    def _wake(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition() and self._error is None:
            if self._changed is None or self._changed.done():
                self._changed = asyncio.get_running_loop().create_future()
            # one future for all who wait; one that is cancelled leaves it to the others
            await asyncio.shield(self._changed)
