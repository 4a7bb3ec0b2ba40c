"""Host descriptors as ends of a channel: pipes, sockets, terminals, files.

They are never made non-blocking: that would show wherever else they are open. They are
used when the loop says that they are ready, by so little that it does not block.
"""

from __future__ import annotations

import asyncio
import os
import select
from typing import TYPE_CHECKING, Final, Protocol

from qubes_itests.guest.exc import GuestGoneError
from qubes_itests.guest.link.streams import LosableReader

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qubes_itests.guest.link.streams import GuestWriter

__all__ = ["InputDescriptor", "MergedReader", "OutputDescriptor", "Readable"]

_CHUNK: Final = 65_536


class Readable(Protocol):
    """Source of the bytes for a descriptor: a stream's reader, for one."""

    async def read(self, n: int, /) -> bytes:
        """Return some bytes, at most so many; none at the end."""


class _Descriptor:
    """A descriptor of our own for what the caller has open, and may close.

    :param descriptor: the caller's.
    """

    def __init__(self, descriptor: int) -> None:
        # The caller may close its own at any time, and the kernel give the number to
        # another file; and the loop knows descriptors by number, so one that is
        # watched twice, by us and by the caller, would lose a watcher.
        self._own = os.dup(descriptor)
        self._loop = asyncio.get_running_loop()

    async def _ready(
        self,
        watch: Callable[..., None],
        forget: Callable[[int], bool],
    ) -> None:
        ready = self._loop.create_future()

        def take_note() -> None:
            if not ready.done():
                ready.set_result(None)

        try:
            watch(self._own, take_note)
        except PermissionError:
            return  # a file, which is ready always
        try:
            await ready
        finally:
            # also when cancelled: a number that is closed and still watched would
            # report what another file does
            forget(self._own)


class InputDescriptor(_Descriptor):
    """What a process of a guest reads."""

    async def give(self, writer: GuestWriter) -> None:
        """Send what comes, and the end of it; until the process reads no more."""
        try:
            while data := await self._read():
                writer.write(data)
                await writer.drain()
        except (BrokenPipeError, GuestGoneError):
            return
        finally:
            os.close(self._own)
            if not writer.is_closing():
                writer.write_eof()

    async def _read(self) -> bytes:
        while True:
            await self._ready(self._loop.add_reader, self._loop.remove_reader)
            try:
                return os.read(self._own, _CHUNK)
            except BlockingIOError:
                continue  # of the caller's making; somebody else was faster
            except OSError:
                return b""  # as a terminal that has gone says it


class OutputDescriptor(_Descriptor):
    """Where what a process of a guest writes goes."""

    async def take(self, reader: Readable) -> None:
        """Write what comes until its end; what nobody takes any more is dropped."""
        try:
            while data := await reader.read(_CHUNK):
                await self._write(memoryview(data))
        finally:
            os.close(self._own)

    async def _write(self, data: memoryview) -> None:
        while data:
            await self._ready(self._loop.add_writer, self._loop.remove_writer)
            try:
                # so much a pipe that is ready has room for
                data = data[os.write(self._own, data[: select.PIPE_BUF]) :]
            except BlockingIOError:
                continue
            except OSError:
                return


class _Gate(asyncio.ReadTransport):
    """Flow control of a `MergedReader`, for which asyncio wants a transport."""

    def __init__(self) -> None:
        super().__init__()
        self.open = asyncio.Event()
        self.open.set()

    def pause_reading(self) -> None:
        """Close."""
        self.open.clear()

    def resume_reading(self) -> None:
        """Open again."""
        self.open.set()


class MergedReader(LosableReader):
    """What comes from several readers.

    :param readers: nobody else reads from them.
    """

    def __init__(self, readers: Sequence[asyncio.StreamReader]) -> None:
        super().__init__()
        self._gate = _Gate()
        self.set_transport(self._gate)
        self._sources = tuple(readers)

    async def run(self) -> None:
        """Pass on what comes until all have ended."""
        # Each to its end: when the guest went away, one may have nothing more while the
        # reader of this holds up what the other has.
        ends = await asyncio.gather(*map(self._pass_on, self._sources))
        lost = next((error for error in ends if error is not None), None)
        if lost is None:
            self.feed_eof()
        else:
            self.lose(lost)

    async def _pass_on(self, source: asyncio.StreamReader) -> GuestGoneError | None:
        try:
            while data := await source.read(_CHUNK):
                # asyncio's own pause has nobody to tell but this gate; without it a
                # slow reader of the merged output would have us collect it all here
                await self._gate.open.wait()
                self.feed_data(data)
        except GuestGoneError as error:
            return error
        return None
