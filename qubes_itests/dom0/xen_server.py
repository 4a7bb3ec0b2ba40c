"""Calls of `xen.lowlevel` out of another process, which has a daemon of the core."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from qubes_itests.exc import HarnessError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from qubes_itests.dom0.xen import Xen

__all__ = ["Clock", "XenServer"]

log = logging.getLogger("qubes_itests.dom0")

#: Bytes of one call.
_LONGEST: Final = 1 << 20


class Clock(Protocol):
    """A virtual time."""

    def stand_still(self) -> None:
        """Have time stand still, until `go_on` has been called as often."""

    def go_on(self) -> None:
        """Let time pass again."""


class XenServer:
    """Serves the calls on a Unix socket: an asynchronous context manager.

    One connection is one handle of ``xs`` or ``xc``, and a call is a line of JSON: a
    list of its name and its arguments. The answer is an object with ``value`` or
    ``error``; bytes are an object with ``bytes``, in Latin 1.

    :param xen: that it works on.
    :param path: of the socket.
    :param on_state: called with what the daemon says of itself, for `Xen` has no part
        in that: a domain's fields by its number.
    :param clock: has its time stand still while the daemon does not wait, and has it
        wait by that time; None for a daemon in real time.
    """

    def __init__(
        self,
        xen: Xen,
        path: Path,
        on_state: Callable[[dict[str, dict[str, Any]]], Awaitable[None]],
        clock: Clock | None = None,
    ) -> None:
        self._xen = xen
        self._path = path
        self._on_state = on_state
        self._clock = clock
        self._lock = asyncio.Lock()
        self._closing = 0
        self._server: asyncio.Server | None = None
        self._handles: set[asyncio.Task[None]] = set()
        #: Set when the daemon waits for what happens for the first time.
        self.ready = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(
            self._serve, self._path, limit=_LONGEST
        )
        if self._clock is not None:
            self._clock.stand_still()  # from its start to its first wait
        return self

    async def __aexit__(self, *_exc: object) -> None:
        if self._server is not None:
            self._server.close()
        for task in tuple(self._handles):
            task.cancel()
        await asyncio.gather(*self._handles, return_exceptions=True)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Have time stand still while the daemon answers a request, as it works."""
        if self._clock is not None:
            self._clock.stand_still()
        try:
            yield
        finally:
            if self._clock is not None:
                self._clock.go_on()

    def client_leaves(self) -> None:
        """Have time stand still until the daemon has noticed that a client has left.

        It holds its lock for the client, and lets go of it then.
        """
        if self._clock is not None:
            self._clock.stand_still()
            self._closing += 1

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Let time pass while a thread of the daemon waits."""
        if self._clock is not None:
            self._clock.go_on()
        try:
            yield
        finally:
            if self._clock is not None:
                self._clock.stand_still()

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - it is one
        self._handles.add(task)
        handle = _Handle(self, self._xen)
        try:
            while line := await reader.readline():
                writer.write(json.dumps(await self._answer(handle, line)).encode())
                writer.write(b"\n")
        except asyncio.CancelledError:
            pass  # of this server: asyncio of Python 3.11 logs a task that ends so
        except (OSError, ValueError) as error:
            log.warning("a handle of Xen is closed: %s", str(error))
        finally:
            handle.close()
            writer.close()
            self._handles.discard(task)

    async def _answer(self, handle: _Handle, line: bytes) -> dict[str, object]:
        name, *arguments = json.loads(line)
        call = handle.calls.get(name)
        if call is None:
            said = f"qubes_itests has no xen.lowlevel.{name}"
            return {"error": f"{said}: no qmemman called this before"}
        try:
            value = await call(*arguments)
        except (HarnessError, TypeError, ValueError) as error:
            return {"error": f"{name}{tuple(arguments)}: {error}"}
        if isinstance(value, bytes):
            return {"bytes": value.decode("latin-1")}
        return {"value": value}

    async def state(self, domains: dict[str, dict[str, Any]]) -> None:
        """Hear what the daemon knows of domains."""
        await self._on_state(domains)

    async def sleep(self, seconds: float) -> None:
        """Have a thread wait."""
        with self._waiting():
            await asyncio.sleep(seconds)

    async def acquire(self) -> None:
        """Have a thread wait for the lock of the daemon."""
        with self._waiting():
            await self._lock.acquire()

    async def release(self) -> None:
        """Let go of that lock."""
        self._lock.release()
        if self._closing and self._clock is not None:
            self._closing -= 1
            self._clock.go_on()

    async def take(self, events: asyncio.Queue[list[object]]) -> list[object]:
        """Have a thread wait for a change that it watches: its path and token."""
        self.ready.set()
        with self._waiting():
            return await events.get()


class _Handle:
    """One connection: the calls that there are, and what it watches."""

    def __init__(self, server: XenServer, xen: Xen) -> None:
        self._server = server
        self._store = xen.store
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[list[object]] = asyncio.Queue()
        self._watches: dict[tuple[str, int], Callable[[], None]] = {}
        self.calls: dict[str, Callable[..., Awaitable[object]]] = {
            "xc.physinfo": xen.physinfo,
            "xc.domain_getinfo": xen.domain_getinfo,
            "xc.domain_setmaxmem": xen.domain_setmaxmem,
            "xc.domain_set_target_mem": xen.domain_set_target_mem,
            "xs.read": self._read,
            "xs.ls": self._ls,
            "xs.write": lambda _transaction, path, value: xen.write(path, value),
            "xs.watch": self._watch,
            "xs.unwatch": self._unwatch,
            "xs.read_watch": lambda: server.take(self._events),
            "state": server.state,
            "sleep": server.sleep,
            "acquire": server.acquire,
            "release": server.release,
        }

    async def _read(self, _transaction: str, path: str) -> bytes | None:
        return self._store.read(path)

    async def _ls(self, _transaction: str, path: str) -> list[str] | None:
        return self._store.names(path)

    async def _watch(self, path: str, token: int) -> None:
        def note(changed: str) -> None:
            event: list[object] = [changed, token]
            # a core in this process writes into the store in its own thread
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._watches[path, token] = self._store.watch(path, note)

    async def _unwatch(self, path: str, token: int) -> None:
        if end := self._watches.pop((path, token), None):
            end()

    def close(self) -> None:
        for end in self._watches.values():
            end()
        self._watches.clear()
