"""Events on their way to one client."""

from __future__ import annotations

import abc
import asyncio
import logging
from typing import Final

__all__ = ["EventStream"]

log = logging.getLogger("qubes.admin")

#: Bytes that wait for a client; one that leaves more unread is dropped.
LONGEST_BACKLOG: Final = 1 << 20


class EventStream(abc.ABC):
    """Takes events for one client, and makes nobody wait for it."""

    def __init__(self) -> None:
        #: Whether an event was sent.
        self.begun = False
        self._closed = asyncio.Event()

    def send(self, event: bytes) -> None:
        """Send an event, unless the client is gone.

        :param event: its bytes.
        """
        if self._closed.is_set():
            return
        self.begun = True
        # Nobody waits for a client, so what it does not read is held here: up to a
        # bound, then it goes. To leave out events instead would have it believe what is
        # not so.
        if self._backlog() > LONGEST_BACKLOG:
            log.warning("a client that does not read its events is dropped")
            self._drop()
            self.close()
            return
        self._write(event)

    async def wait_closed(self) -> None:
        """Wait until the client is gone."""
        await self._closed.wait()

    def close(self) -> None:
        """Take note that the client is gone."""
        self._closed.set()

    @abc.abstractmethod
    def _write(self, data: bytes) -> None:
        """Begin to send."""

    @abc.abstractmethod
    def _backlog(self) -> int:
        """Return how many bytes wait to be sent."""

    @abc.abstractmethod
    def _drop(self) -> None:
        """End the connection, and drop what waits."""
