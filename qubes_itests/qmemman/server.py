"""qmemman daemon: the socket that starting VMs ask, and the balancing between them."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qubes_itests.qmemman import protocol
from qubes_itests.qmemman.algorithm import preferred_memory
from qubes_itests.qmemman.exc import QmemmanError
from qubes_itests.qmemman.state import DOM0

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Iterator
    from pathlib import Path
    from types import TracebackType

    from qubes_itests.qmemman.balancer import Balancer

__all__ = ["Server"]

_log = logging.getLogger(__name__)
#: Seconds a client has to send its line.
_REQUEST_TIMEOUT = 10.0
#: Seconds a client may keep the lock: longer than any VM takes to start.
_LONGEST_HOLD = 600.0
_MOST_CLIENTS = 256
#: Seconds without news after which somebody looks anyway.
_IDLE = 1.0


class Server:
    """An async context manager that serves a socket and balances meanwhile.

    :param balancer: does the work.
    :param path: of the Unix socket; a lock file lies beside it.
    """

    def __init__(self, balancer: Balancer, path: Path) -> None:
        self.path = path
        self._balancer = balancer
        # One act at a time: balancing, or one client's request until its VM has taken
        # the memory. Balancing in between would give away what was freed for that VM,
        # and two starts at once would both be granted the same memory.
        self._lock = asyncio.Lock()
        self._news = asyncio.Event()
        self._dom0_reported = asyncio.Event()
        self._clients: set[asyncio.Task[None]] = set()
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Server:  # noqa: PYI034 - subclasses add nothing
        """Take the socket, read the machine, and begin.

        :raise QmemmanError: when another daemon serves the socket.
        :raise QmemmanError: when the machine cannot hold its dom0.
        """
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(_logged_at(self._balancer.policy.log_level))
            _take(self.path, stack)
            stack.callback(self.path.unlink, missing_ok=True)
            await self._balancer.refresh()
            # before the socket is there, or a client that asks for READY at once could
            # miss dom0's report and wait for the next one
            stack.callback(self._balancer.subscribe(self._on_news))
            server = await asyncio.start_unix_server(
                self._serve, self.path, limit=protocol.LONGEST_LINE
            )
            # ended in the reverse order: no more balancing, then no new clients, then
            # those that are connected, then the socket's file, then the lock
            stack.push_async_callback(lambda: _end(self._clients))
            stack.callback(server.close)
            balancing = asyncio.create_task(self._balance_for_ever())
            stack.push_async_callback(_end, [balancing])
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close every connection and remove the socket."""
        await self._stack.aclose()

    def _on_news(self) -> None:
        self._news.set()
        if self._balancer.reported(DOM0):
            self._dom0_reported.set()

    async def _balance_for_ever(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_IDLE):
                    await self._news.wait()
            # before the look at the machine: what comes during it is news again
            self._news.clear()
            async with self._lock:
                try:
                    await self._balancer.balance()
                except Exception:  # noqa: BLE001 - see below
                    # balancing must outlive whatever a domain or a file does
                    _log.exception("balancing failed; it goes on")
            # let one step pass, so that many reports become one decision
            await asyncio.sleep(self._balancer.policy.step)

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a stream's callback runs in a task
        self._clients.add(task)
        try:
            if len(self._clients) <= _MOST_CLIENTS:
                await self._converse(reader, writer)
        except (OSError, ValueError, TimeoutError) as error:
            # ValueError: a line beyond the limit
            _log.debug("a client is dropped: %s", str(error))
        except asyncio.CancelledError:
            pass  # the daemon ends
        except Exception:  # noqa: BLE001 - one request must not spoil the others
            _log.exception("a request failed")
        finally:
            self._clients.discard(task)
            # all was sent, or its reader is too slow: nothing is worth waiting for
            writer.transport.abort()

    async def _converse(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        async with asyncio.timeout(_REQUEST_TIMEOUT):
            line = await reader.readline()
        if line == protocol.STATUS:
            await _answer(writer, json.dumps(self.status()).encode() + b"\n")
        elif line == protocol.READY:
            if await _unless_closed(reader, self._dom0_reported.wait()):
                await _answer(writer, protocol.OK)
        elif line.endswith(b"\n"):
            await self._serve_request(line, reader, writer)

    async def _serve_request(
        self, line: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        request = protocol.parse_request(line)
        if request is None:
            _log.warning("a request is invalid: %r", line)
            await _answer(writer, protocol.INVALID)
            return
        # A client that gave up must not get the lock: nobody would ever close its
        # connection, and all starts would wait for ten minutes.
        if not await _unless_closed(reader, self._lock.acquire()):
            return
        try:
            if isinstance(request, protocol.Balloon):
                granted = await self._balancer.balloon(request.amount)
            else:
                granted = await self._balancer.set_memory(request.wishes)
            await _answer(writer, protocol.OK if granted else protocol.FAIL)
            # Its VM has taken the memory when it closes, and not before: only then may
            # anybody count what is free. Also after FAIL, for clients read STATUS then.
            try:
                async with asyncio.timeout(_LONGEST_HOLD):
                    await _until_closed(reader)
            except TimeoutError:
                _log.error("a client held the lock for %g s", _LONGEST_HOLD)
        finally:
            self._lock.release()
            self._news.set()

    def status(self) -> dict[str, object]:
        """Return the present state, as ``STATUS`` tells it."""
        balancer = self._balancer
        domains = {
            domid: {
                **asdict(state),
                "name": balancer.names.get(domid, ""),
                "preferred": None
                if state.used is None
                else preferred_memory(state, balancer.policy),
            }
            for domid, state in balancer.domains.items()
        }
        refusal = balancer.refusal
        return {
            "total": balancer.total,
            "free": balancer.free,
            "domains": domains,
            "refusal": None if refusal is None else asdict(refusal),
        }


@contextlib.contextmanager
def _logged_at(level: int | None) -> Iterator[None]:
    """Have all of qmemman log from a level on, meanwhile."""
    logger = logging.getLogger("qubes_itests.qmemman")
    before = logger.level
    if level is not None:
        logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


def _take(path: Path, stack: contextlib.ExitStack | contextlib.AsyncExitStack) -> None:
    """Make sure that this is the only daemon; the lock ends with the process."""
    lock = os.open(
        path.with_name(f"{path.name}.lock"),
        os.O_RDWR | os.O_CREAT | os.O_CLOEXEC,
        0o600,
    )
    stack.callback(os.close, lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise QmemmanError(
            f"another qmemman serves {path}: stop it, or choose another socket"
        ) from error
    # Under the lock only: without it this would be the socket of a daemon that lives.
    # The lock's own file stays, for who has it open would lock a file without a name.
    path.unlink(missing_ok=True)


async def _answer(writer: asyncio.StreamWriter, data: bytes) -> None:
    # so that `drain` waits until all is with the kernel: the caller aborts after it
    writer.transport.set_write_buffer_limits(high=0)
    writer.write(data)
    async with asyncio.timeout(_REQUEST_TIMEOUT):
        await writer.drain()


async def _unless_closed(
    reader: asyncio.StreamReader, awaited: Coroutine[Any, Any, bool]
) -> bool:
    """Wait for something; False when the client went away first."""
    goal = asyncio.create_task(awaited)
    closed = asyncio.create_task(_until_closed(reader))
    try:
        await asyncio.wait((goal, closed), return_when=asyncio.FIRST_COMPLETED)
        # asked for the goal and not for `closed`: both may be done, and a lock that was
        # acquired must be released by the caller
        return goal.done()
    finally:
        await _end([closed] if goal.done() else [closed, goal])


async def _until_closed(reader: asyncio.StreamReader) -> None:
    while await reader.read(protocol.LONGEST_LINE):
        _log.warning("a second request on a connection is dropped")


async def _end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    tasks = tuple(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
