"""qmemman daemon: the socket that starting VMs ask, and the balancing between them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Self

from qubes_itests.qmemman import protocol
from qubes_itests.qmemman.state import DOM0
from qubes_itests.unix_server import UnixServer

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Iterator
    from pathlib import Path

    from qubes_itests.qmemman.balancer import Balancer
    from qubes_itests.unix_server import Client

__all__ = ["Server"]

_log = logging.getLogger(__name__)
#: Seconds a client may keep the lock: longer than any VM takes to start.
_LONGEST_HOLD = 600.0
#: Seconds without news after which somebody looks anyway.
_IDLE = 1.0


class Server(UnixServer):
    """An async context manager that serves a socket and balances meanwhile.

    :param balancer: does the work.
    :param path: of the Unix socket.
    """

    #: Longer requests have no meaning.
    limit = protocol.LONGEST_LINE
    timeout = 10.0

    def __init__(self, balancer: Balancer, path: Path) -> None:
        super().__init__(path)
        self._balancer = balancer
        # One act at a time: balancing, or one client's request until its VM has taken
        # the memory. Balancing in between would give away what was freed for that VM,
        # and two starts at once would both be granted the same memory.
        self._lock = asyncio.Lock()
        self._news = asyncio.Event()
        self._dom0_reported = asyncio.Event()
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Read the machine, take the socket, and begin.

        :raise HarnessError: when another daemon serves the socket.
        :raise HarnessError: when the machine cannot hold its dom0.
        """
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(_logged_at(self._balancer.policy.log_level))
            await self._balancer.refresh()
            # before the socket is there, or a client that asks for READY at once could
            # miss dom0's report and wait for the next one
            stack.callback(self._balancer.subscribe(self._on_news))
            # ended in the reverse order: no more balancing, then the clients
            await super().__aenter__()
            stack.push_async_exit(super().__aexit__)
            balancing = asyncio.create_task(self._balance_for_ever())
            stack.push_async_callback(_end, [balancing])
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_exc: object) -> None:
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

    async def converse(self, client: Client) -> None:
        """Answer the one line of a connection."""
        try:
            async with client.request():
                line = await client.reader.readline()
        except ValueError:
            return  # it is longer than any request
        if line == protocol.STATUS:
            await client.answer(json.dumps(self.status()).encode() + b"\n")
        elif line == protocol.READY:
            if await _unless_closed(client.reader, self._dom0_reported.wait()):
                await client.answer(protocol.OK)
        elif line.endswith(b"\n"):
            await self._serve_request(line, client)

    async def _serve_request(self, line: bytes, client: Client) -> None:
        request = protocol.parse_request(line)
        if request is None:
            _log.warning("a request is invalid: %r", line)
            await client.answer(protocol.INVALID)
            return
        # A client that gave up must not get the lock: nobody would ever close its
        # connection, and all starts would wait for ten minutes.
        if not await _unless_closed(client.reader, self._lock.acquire()):
            return
        try:
            if isinstance(request, protocol.Balloon):
                granted = await self._balancer.balloon(request.amount)
            else:
                granted = await self._balancer.set_memory(request.wishes)
            await client.answer(protocol.OK if granted else protocol.FAIL)
            # Its VM has taken the memory when it closes, and not before: only then may
            # anybody count what is free. Also after FAIL, for clients read STATUS then.
            try:
                async with asyncio.timeout(_LONGEST_HOLD):
                    await _until_closed(client.reader)
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
                "preferred": balancer.preferred(state),
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
