"""Client of qmemman, by which the start of a VM asks for memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING

from qubes_itests.exc import DeadlineError, HarnessError
from qubes_itests.qmemman import protocol
from qubes_itests.qmemman.exc import MemoryRefusedError
from qubes_itests.qmemman.sizes import MIB

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

__all__ = ["Client"]

_LONGEST_STATUS = 64 * MIB


class Client:
    """Asks the daemon.

    :param path: of its Unix socket.
    :param timeout: seconds that an answer may take.
    :param plain: it is a daemon of Qubes OS, which knows the requests of VMs alone.
    """

    def __init__(
        self, path: Path, *, timeout: float = 60.0, plain: bool = False
    ) -> None:
        self.path = path
        self.timeout = timeout
        self._plain = plain

    @contextlib.asynccontextmanager
    async def memory(self, amount: int) -> AsyncIterator[None]:
        """Have `amount` bytes free inside: start the VM there, and only then leave.

        Waits until dom0 has reported: before, it sits on all it was booted with, and
        the first VMs would find no memory.

        :raise MemoryRefusedError: when they cannot be freed.
        :raise HarnessError: when there is no daemon, or it does not understand.
        :raise DeadlineError: when no answer comes in time.
        """
        # On another connection, as the daemon drops a second request on one; before the
        # lock is asked for, as nothing is balanced while it is held.
        if not self._plain:
            await self._ask(protocol.READY, "report of dom0's memory usage")
        async with self._connection() as (reader, writer):
            writer.write(b"%d\n" % amount)
            answer = await self._line(reader, "answer from qmemman")
            if answer == protocol.FAIL:
                # still connected, so the daemon's last refusal is this one
                raise await self._refusal(amount)
            if answer != protocol.OK:
                raise self._silent(f"it answered {answer!r}")
            # the connection is the lock: nothing is balanced until it is closed
            yield

    async def status(self) -> dict[str, object]:
        """Return the daemon's view of all memory.

        :raise HarnessError: when there is no daemon.
        """
        status = json.loads(await self._ask(protocol.STATUS, "status of qmemman"))
        if not isinstance(status, dict):
            raise self._silent("its status is not understood")
        return status

    async def _refusal(self, amount: int) -> MemoryRefusedError:
        # while a client is connected, a plain one answers no other
        refusal = None if self._plain else (await self.status()).get("refusal")
        if not isinstance(refusal, dict):
            return MemoryRefusedError(amount, None, {})
        return MemoryRefusedError(amount, refusal["obtainable"], refusal["holders"])

    def _silent(self, reason: str) -> HarnessError:
        return HarnessError(
            f"no answer from qmemman at {self.path}: {reason}; is it running?"
        )

    async def _ask(self, line: bytes, what: str) -> bytes:
        async with self._connection() as (reader, writer):
            writer.write(line)
            return await self._line(reader, what)

    async def _line(self, reader: asyncio.StreamReader, what: str) -> bytes:
        try:
            async with asyncio.timeout(self.timeout):
                line = await reader.readline()
        except TimeoutError as error:
            raise DeadlineError(what, self.timeout) from error
        except (OSError, ValueError) as error:
            raise self._silent(str(error)) from error
        if not line.endswith(b"\n"):
            raise self._silent("it closed the connection")
        return line

    @contextlib.asynccontextmanager
    async def _connection(
        self,
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        try:
            reader, writer = await asyncio.open_unix_connection(
                self.path, limit=_LONGEST_STATUS
            )
        except OSError as error:
            raise self._silent(str(error)) from error
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
