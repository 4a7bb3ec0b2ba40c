"""Sockets whose other end is closed, although nobody reads or writes."""

from __future__ import annotations

import asyncio
import contextlib
import select
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Hangups"]


class Hangups:
    """Watches sockets for nothing but hang-ups, which epoll tells of unasked.

    Made on the running event loop.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._epoll = select.epoll()
        self._watched: dict[int, Callable[[], None]] = {}
        self._loop.add_reader(self._epoll.fileno(), self._poll)

    def close(self) -> None:
        """Watch no more."""
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    @contextlib.contextmanager
    def watched(self, descriptor: int, gone: Callable[[], None]) -> Iterator[None]:
        """Have `gone` called once when the other end is closed.

        :param descriptor: of an open socket.
        """
        self._epoll.register(descriptor, 0)
        self._watched[descriptor] = gone
        try:
            yield
        finally:
            self._forget(descriptor, gone)

    def _forget(self, descriptor: int, gone: Callable[[], None]) -> None:
        # its number may be another socket's by now
        if self._watched.get(descriptor) is not gone:
            return
        del self._watched[descriptor]
        if not self._epoll.closed:
            with contextlib.suppress(OSError):
                self._epoll.unregister(descriptor)

    def _poll(self) -> None:
        for descriptor, _events in self._epoll.poll(0):
            if (gone := self._watched.get(descriptor)) is not None:
                self._forget(descriptor, gone)
                gone()
