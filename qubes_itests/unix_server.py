"""Servers on Unix sockets: the file, the clients, and what bounds them."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import fcntl
import logging
import os
import resource
import select
import socket
import time
from typing import TYPE_CHECKING, Final, Self

from qubes_itests.exc import DeadlineError, HarnessError
from qubes_itests.limited_log import LimitedLog

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

__all__ = ["Client", "UnixServer"]

log = logging.getLogger(__name__)

#: Who may connect: owner and group.
_MODE: Final = 0o660
_BACKLOG: Final = 256
#: Connections that are accepted in one go, before any that is too many is closed.
_ACCEPTED: Final = 32
#: Seconds that others may take to begin in the same directory, and between two looks.
_TURN_TIMEOUT: Final = 10.0
_TURN_PAUSE: Final = 0.02


class Client:
    """One connection.

    :param server: whose client it is.
    :param reader: what it sends.
    :param writer: what it is sent; ``drain`` waits until the kernel has all of that.
    """

    def __init__(
        self,
        server: UnixServer,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.reader = reader
        self.writer = writer
        # Else ``drain`` would return with 64 KiB unsent, and they would be lost when
        # the connection is closed, or kept for ever for a client that does not read.
        writer.transport.set_write_buffer_limits(high=0)
        self.task = asyncio.get_running_loop().create_task(server.talk(self))
        self._server = server

    @contextlib.asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Read its request within; it may be dropped for the sake of others meanwhile.

        :raise TimeoutError: when that takes longer than the server gives it.
        """
        try:
            async with asyncio.timeout(self._server.timeout):
                yield
        finally:
            # also if the end of the stream was the end of the request, which raises
            self._server.sending.pop(self, None)

    async def answer(self, data: bytes) -> None:
        """Send something that it has to read at once.

        :raise TimeoutError: when it does not in the time that the server gives it.
        """
        self.writer.write(data)
        if self.writer.transport.get_write_buffer_size():
            async with asyncio.timeout(self._server.timeout):
                await self.writer.drain()

    @contextlib.contextmanager
    def watched(self, gone: Callable[[], object]) -> Iterator[None]:
        """Have `gone` called once when it closes its end altogether.

        asyncio looks no more at a socket whose other end has half-closed, as one does
        that has sent its request and waits.  epoll tells of hang-ups unasked; but not
        of those that asyncio has found first, in a write: it closes our end then.
        """
        if self.writer.transport.is_closing():
            gone()  # and its socket has no number any more
            yield
            return
        watch, descriptor = self._server, self.writer.get_extra_info("socket").fileno()
        watch.epoll.register(descriptor, 0)
        watch.watched[descriptor] = gone

        async def closed_by_asyncio() -> None:
            with contextlib.suppress(OSError):
                await self.writer.wait_closed()
            watch.hung_up(descriptor, gone)

        ending = asyncio.create_task(closed_by_asyncio())
        try:
            yield
        finally:
            ending.cancel()
            watch.unwatch(descriptor, gone)


class UnixServer(abc.ABC):
    """An async context manager that serves a Unix socket.

    A client has a task each, which `converse` runs in; it ends with the server.

    :param path: of the socket, in a directory that only its owner writes to.
    """

    #: Clients at once.  Beyond that the one that has been sending its request for
    #: longest goes; if all requests are complete, it is the new one.
    most = 256
    #: Seconds that a client has to send its request, and to read an answer.
    timeout = 30.0
    #: Bytes that a line may have, and that are read ahead.
    limit = 1 << 16
    #: What one too many is sent.
    farewell = b""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clients: set[Client] = set()
        #: Those whose requests are incomplete, the oldest first.
        self.sending: dict[Client, None] = {}
        #: Of sockets, what is called when their other end is closed.
        self.watched: dict[int, Callable[[], object]] = {}
        self.epoll: select.epoll
        self._limited = LimitedLog(log)
        self._exit = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Take the socket and begin.

        :raise HarnessError: when another server answers on it.
        """
        loop = asyncio.get_running_loop()
        async with contextlib.AsyncExitStack() as stack:
            self.epoll = stack.enter_context(select.epoll())
            loop.add_reader(self.epoll.fileno(), self._hung_up)
            stack.callback(loop.remove_reader, self.epoll.fileno())
            stack.push_async_callback(self._end_clients)
            async with _turn(self.path.parent):
                listening = _listen(self.path)
            # Before the clients end, which may take long: once nobody listens, another
            # server may take the path, and it is that one's socket then.
            stack.callback(self.path.unlink, missing_ok=True)
            stack.callback(listening.close)
            # asyncio accepts as many as the backlog in one go, and only then has each
            # of them come to `_connected`: descriptors could run out in between.  So
            # it gets a small one, and the kernel a large one, as a client that does
            # not block would be refused.
            server = await asyncio.start_unix_server(
                self._connected, sock=listening, limit=self.limit, backlog=_ACCEPTED
            )
            listening.listen(_BACKLOG)
            stack.callback(server.close)
            self._exit = stack.pop_all()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """Close every connection and remove the socket."""
        await self._exit.aclose()

    @abc.abstractmethod
    async def converse(self, client: Client) -> None:
        """Serve a client; its connection is closed when this returns or raises."""

    def capacity(self) -> int:
        """Return how many clients there may be, with half of the descriptors there are.

        The others are left to all else: guests, disks, programs.
        """
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limit == resource.RLIM_INFINITY:
            return self.most
        return min(self.most, limit // 2)

    # what clients do

    def _connected(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        # No coroutine, whose task would begin later: others could connect before.
        client = Client(self, reader, writer)
        if len(self.clients) >= (most := self.capacity()):
            self._limited.warning(
                "", "%s: more than %d clients: one is dropped", self.path, most
            )
            dropped = next(iter(self.sending), client)
            # at once: the next may connect before its task learns of it
            self._forget(dropped)
            dropped.writer.write(self.farewell)
            dropped.writer.close()
            dropped.task.cancel()
            if dropped is client:
                return
        self.clients.add(client)
        self.sending[client] = None

    async def talk(self, client: Client) -> None:
        """Have a client served, and close its connection, whatever happens."""
        try:
            await self.converse(client)
        except asyncio.CancelledError:
            pass  # the client is gone, or the server ends
        except OSError as error:
            log.debug("%s: a client is dropped: %s", self.path, str(error))
        except Exception:
            log.exception("%s: a request failed", self.path)
        finally:
            self._forget(client)
            # What a client has not read by now it was given time for.
            client.writer.transport.abort()

    def _forget(self, client: Client) -> None:
        self.sending.pop(client, None)
        self.clients.discard(client)

    async def _end_clients(self) -> None:
        clients = list(self.clients)
        for client in clients:
            client.task.cancel()
        await asyncio.gather(*(each.task for each in clients), return_exceptions=True)
        for client in clients:
            # a task that was cancelled before its first step has run no `finally`
            client.writer.transport.abort()

    # whose other end is closed

    def _hung_up(self) -> None:
        for descriptor, _events in self.epoll.poll(0):
            if (gone := self.watched.get(descriptor)) is not None:
                self.hung_up(descriptor, gone)

    def hung_up(self, descriptor: int, gone: Callable[[], object]) -> None:
        """Call what is to be called when the other end of a socket is closed, once."""
        if self.watched.get(descriptor) is gone:
            # first: epoll would tell of it again and again
            self.unwatch(descriptor, gone)
            gone()

    def unwatch(self, descriptor: int, gone: Callable[[], object]) -> None:
        """Call `gone` no more when the other end of a socket is closed."""
        # a connection that asyncio has closed left its number to the next one, which
        # may be watched, too
        if self.watched.get(descriptor) is gone:
            del self.watched[descriptor]
            with contextlib.suppress(OSError):
                self.epoll.unregister(descriptor)


def _listen(path: Path) -> socket.socket:
    """Make the socket, in place of one that nobody serves any more."""
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.socket(socket.AF_UNIX))
        # before the bind: at no moment may anybody else connect
        os.fchmod(listening.fileno(), _MODE)
        _remove_stale(path)
        listening.bind(str(path))
        path.chmod(_MODE)
        # at once: until then it looks as if nobody served it
        listening.listen(_BACKLOG)
        listening.setblocking(False)
        stack.pop_all()
    return listening


@contextlib.asynccontextmanager
async def _turn(directory: Path) -> AsyncIterator[None]:
    """Keep other processes from taking a socket of a directory meanwhile.

    Of two that find the same stale socket, the second would remove what the first one
    has put there.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        end = time.monotonic() + _TURN_TIMEOUT
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise DeadlineError(
                        f"lock of {directory}, which another process has",
                        _TURN_TIMEOUT,
                    ) from None
                # not waited for in the call: other tasks of this loop may not stand
                await asyncio.sleep(_TURN_PAUSE)
        yield
    finally:
        os.close(descriptor)


def _remove_stale(path: Path) -> None:
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
        except BlockingIOError:
            pass  # it is served, and more clients wait than it has accepted
    raise HarnessError(f"{path} is served already; stop that server, or use another")
