"""A command or service that runs in a guest."""

from __future__ import annotations

import asyncio
import reprlib
import signal
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.guest.exc import GuestError
from qubes_itests.guest.link.descriptors import (
    InputDescriptor,
    MergedReader,
    OutputDescriptor,
)
from qubes_itests.guest.link.exit_status import GONE
from qubes_itests.guest.link.frames import Channel, ExitKind
from qubes_itests.guest.link.streams import GuestReader, GuestWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from qubes_itests.guest.exc import GuestGoneError
    from qubes_itests.guest.link.events import Ended
    from qubes_itests.guest.link.streams import Link

__all__ = ["GuestProcess", "GuestTerminal"]

#: What `returncode` says when the guest went away before the process ended.

_CHUNK: Final = 65536

#: Bytes of each output that `communicate` takes unless it is told otherwise.  Tests
#: collect megabytes; who wants more reads from the streams.
_LONGEST_OUTPUT: Final = 256 << 20


class GuestProcess:
    """A command or service in a guest, used as `asyncio.subprocess.Process` is.

    Its three streams are pipes unless they are connected otherwise. It comes from
    `GuestAgent.spawn` or `spawn_service`.
    """

    def __init__(self, link: Link, stream: int, vm: str, command: str) -> None:
        #: Name of the VM.
        self.vm = vm
        #: The command line, or the service.
        self.command = command
        #: What the process reads.
        self.stdin = GuestWriter(link, stream, Channel.STDIN)
        #: Why it did not start, in the guest's words; empty when it did.
        self.failure = ""
        #: What `communicate` has read so far, of stdout and stderr.
        self.taken = (bytearray(), bytearray())
        self._link = link
        self._stream = stream
        self._returncode: int | None = None
        self._error: GuestGoneError | None = None
        self._ended = asyncio.Event()
        self._passed_on: list[asyncio.Task[None]] = []
        self._feeding: asyncio.Task[None] | None = None
        self._readers = {
            Channel.STDOUT: GuestReader(link, stream, Channel.STDOUT),
            Channel.STDERR: GuestReader(link, stream, Channel.STDERR),
        }
        #: What it writes.
        self.stdout: asyncio.StreamReader = self._readers[Channel.STDOUT]
        #: What it writes about its troubles.
        self.stderr: asyncio.StreamReader = self._readers[Channel.STDERR]
        #: Outputs that go elsewhere; the loop has only weak references to tasks.
        self._elsewhere: dict[asyncio.StreamReader, asyncio.Task[None]] = {}

    def __repr__(self) -> str:
        return (
            f"<GuestProcess {self.command!r} in {self.vm} returncode={self.returncode}>"
        )

    @property
    def pid(self) -> int:
        """Number of its stream, unique within one start of the VM."""
        return self._stream

    @property
    def returncode(self) -> int | None:
        """Exit status; minus the number of the signal that killed it; None before.

        126: it was not allowed to start; 127: there is no such command, service or
        user; 255 also when the guest went away before it ended.
        """
        return self._returncode

    async def wait(self) -> int:
        """Wait until it has ended, and return `returncode`.

        As with any process: one that writes more than a window waits for a reader.

        :raise GuestGoneError: the guest went away before.
        """
        await self._ended.wait()
        if self._passed_on:
            await asyncio.wait(self._passed_on)
        if self._error is not None:
            raise self._error
        assert self._returncode is not None  # noqa: S101 - set with the event
        return self._returncode

    async def communicate(
        self,
        input: bytes | bytearray | memoryview | None = None,  # noqa: A002
        *,
        limit: int = _LONGEST_OUTPUT,
    ) -> tuple[bytes | None, bytes | None]:
        """Write `input`, close stdin, read both outputs to their ends, wait.

        :param limit: bytes of each output.
        :return: stdout and stderr; None for one that is dropped.
        :raise GuestError: it wrote more than that; nobody reads from it any more.
        :raise GuestGoneError: the guest went away before.
        """
        if input:
            self.stdin.write(input)
        if self._feeding is None and not self.stdin.is_closing():
            self.stdin.write_eof()
        stdout, stderr = await asyncio.gather(
            self._take(self.stdout, self.taken[0], limit),
            self._take(self.stderr, self.taken[1], limit),
        )
        await self.wait()
        return stdout, stderr

    async def _take(
        self, reader: asyncio.StreamReader, taken: bytearray, limit: int
    ) -> bytes | None:
        if reader in self._elsewhere:
            return None
        while part := await reader.read(min(_CHUNK, limit + 1 - len(taken))):
            taken += part
            if len(taken) > limit:
                # the other output ends with this, and so does who reads that
                self.hang_up()
                command = reprlib.repr(self.command)
                raise GuestError(self.vm, f"{command} wrote more than {limit} bytes")
        return bytes(taken)

    def drop(self, channel: Channel) -> None:
        """Throw away what comes from an output; the process is not slowed down."""
        self._take_over(self._output(channel), _read_all)

    def merge(self) -> None:
        """Have stderr come with stdout, in the order in which it arrives."""
        merged = MergedReader((self.stdout, self.stderr))
        self._take_over(self.stderr, lambda _stderr: merged.run())
        self.stdout = merged

    def pass_on(self, channel: Channel, descriptor: int) -> None:
        """Write what comes from an output to a descriptor, which the caller may close.

        `wait` returns when all of it is written.
        """
        target = OutputDescriptor(descriptor)
        task = self._take_over(self._output(channel), target.take)
        self._passed_on.append(task)

    def read_from(self, descriptor: int) -> None:
        """Have it read what comes from a descriptor, which the caller may close."""
        task = asyncio.ensure_future(InputDescriptor(descriptor).give(self.stdin))

        def stop() -> None:
            task.cancel()

        self._feeding = task
        self.stdin.when_broken(stop)
        task.add_done_callback(_see)

    def _output(self, channel: Channel) -> asyncio.StreamReader:
        return self.stdout if channel == Channel.STDOUT else self.stderr

    def _take_over(
        self,
        reader: asyncio.StreamReader,
        take: Callable[[asyncio.StreamReader], Coroutine[Any, Any, None]],
    ) -> asyncio.Task[None]:
        task = asyncio.ensure_future(take(reader))
        self._elsewhere[reader] = task
        task.add_done_callback(_see)
        return task

    def send_signal(self, number: int) -> None:
        """Send a signal to it and its children.

        :raise ProcessLookupError: it has ended.
        """
        if not self._link.protocol.is_open(self._stream) or self._ended.is_set():
            raise ProcessLookupError
        self._link.send(self._link.protocol.signal(self._stream, number))

    def terminate(self) -> None:
        """Send SIGTERM; see `send_signal`."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL; see `send_signal`."""
        self.send_signal(signal.SIGKILL)

    def hang_up(self) -> None:
        """Close its stdin and stop reading from it, as a peer that dies does."""
        if self._feeding is not None:
            self._feeding.cancel()
        if not self.stdin.is_closing():
            self.stdin.write_eof()
        for reader in self._readers.values():
            reader.stop()

    # for the connection

    def reader(self, channel: int) -> GuestReader:
        """Return the reader of a channel."""
        return self._readers[Channel(channel)]

    def writer(self) -> GuestWriter:
        """Return the writer of its only channel to the guest."""
        return self.stdin

    def end(self, event: Ended) -> None:
        """Take note that it has ended."""
        killed = event.kind is ExitKind.KILLED
        self._returncode = -event.value if killed else event.value
        if event.kind is ExitKind.NOT_STARTED:
            self.failure = event.text
            text = f"{self.vm}: {event.text}\n".encode()
            self._readers[Channel.STDERR].feed_data(text)
        self.stdin.break_off(BrokenPipeError(f"{self.command!r} has ended"))
        for reader in self._readers.values():
            reader.feed_eof()
        self._ended.set()

    def lose(self, error: GuestGoneError) -> None:
        """Take note that the guest went away."""
        self._error = error
        self._returncode = GONE
        self.stdin.break_off(error)
        for reader in self._readers.values():
            reader.lose(error)
        self._ended.set()


class GuestTerminal(GuestProcess):
    """A command in a guest on a terminal, which are its stdin and its stdout.

    Whatever it writes comes by `stdout`. To close `stdin`, or to stop reading, hangs
    the terminal up. It comes from `GuestAgent.open_terminal`.
    """

    def leave(self) -> None:
        """Kill what runs on it, if it has not ended, and hang it up."""
        if self.returncode is None:
            # in this order: a terminal that is hung up has no foreground to kill
            self.kill()
            self.hang_up()

    def resize(self, columns: int, rows: int) -> None:
        """Give the terminal another size; does nothing when the command has ended.

        :raise ValueError: for a size that no terminal has.
        """
        if self._link.protocol.is_open(self._stream) and not self._ended.is_set():
            self._link.send(self._link.protocol.resize(self._stream, columns, rows))


def _see(done: asyncio.Task[None]) -> None:
    """Take note of how a task ended: that the guest went is for those who wait."""
    if not done.cancelled():
        done.exception()


async def _read_all(reader: asyncio.StreamReader) -> None:
    while await reader.read(_CHUNK):
        pass
