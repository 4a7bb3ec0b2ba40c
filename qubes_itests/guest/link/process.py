"""Commands, services and terminals that run in a guest, and their answers."""

from __future__ import annotations

import asyncio
import contextlib
import reprlib
import signal
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.exc import DeadlineError
from qubes_itests.guest.exc import GuestError
from qubes_itests.guest.link.descriptors import (
    InputDescriptor,
    MergedReader,
    OutputDescriptor,
)
from qubes_itests.guest.link.frames import GONE, Channel, ExitKind
from qubes_itests.guest.link.streams import GuestReader, GuestWriter
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from qubes_itests.guest.exc import GuestGoneError
    from qubes_itests.guest.link.frames import Ended
    from qubes_itests.guest.link.streams import Link
    from qubes_itests.timeline import Span

__all__ = ["LONGEST_ANSWER", "Answer", "GuestProcess", "GuestTerminal", "answer_of"]

_CHUNK: Final = 65536

#: Bytes of each output that `communicate` takes by default.  Tests
#: collect megabytes; who wants more reads from the streams.
_LONGEST_OUTPUT: Final = 256 << 20
#: Bytes of each output: what is asked for here is said in a few lines.
LONGEST_ANSWER: Final = 65_536
#: Of what a guest said when its time was up, so many characters are shown.
_EVIDENCE: Final = 500


class GuestProcess:
    """A command or service in a guest, used as `asyncio.subprocess.Process` is.

    Its three streams are pipes unless they are connected otherwise. It comes from
    `GuestAgent.spawn` or `spawn_service`.
    """

    def __init__(
        self, link: Link, stream: int, vm: str, command: str, span: Span
    ) -> None:
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
        self._span = span
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
        # EXIT follows the last byte, but what goes to a descriptor may still be on its
        # way there; who waited expects to find it
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
        # what a descriptor feeds is closed at the descriptor's end, not before
        if self._feeding is None and not self.stdin.is_closing():
            self.stdin.write_eof()
        # Both at once: read one after the other, a process that fills the second's
        # window would wait for us, and we for the end of the first.
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

        async def read_all(reader: asyncio.StreamReader) -> None:
            # read, so that credit goes back; STOP would break the process's pipe
            while await reader.read(_CHUNK):
                pass

        self._take_over(self._output(channel), read_all)

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

        self._feeding = task
        # the descriptor may have nothing to read for ever: nothing else would end this
        self.stdin.when_broken(task.cancel)
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
        # EXIT ends the channels, with or without EOF: something in the background may
        # hold an output open, and who reads it would wait for that
        self.stdin.break_off(BrokenPipeError(f"{self.command!r} has ended"))
        for reader in self._readers.values():
            reader.feed_eof()
        self._report_end()
        # last, since it wakes those who look at all the above
        self._ended.set()

    def lose(self, error: GuestGoneError) -> None:
        """Take note that the guest went away."""
        self._error = error
        self._returncode = GONE
        self.stdin.break_off(error)
        for reader in self._readers.values():
            reader.lose(error)
        self._report_end(error=str(error))
        self._ended.set()

    def _report_end(self, **fields: str) -> None:
        stdout, stderr = self._readers[Channel.STDOUT], self._readers[Channel.STDERR]
        self._span.end(
            status=self._returncode,
            stderr=stderr.last.decode("utf-8", "backslashreplace"),
            stdout_bytes=stdout.received,
            **fields,
        )


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


@dataclass(frozen=True, slots=True)
class Answer:
    """How a command or service ended, and all that it wrote.

    :param status: as `GuestProcess.returncode`.
    """

    status: int
    stdout: bytes
    stderr: bytes

    def check(self, command: str) -> Answer:
        """Return this; CalledProcessError when the status is not 0.

        :param command: what the error names.
        """
        if self.status:
            raise subprocess.CalledProcessError(
                self.status, command, self.stdout, self.stderr
            )
        return self


async def answer_of(
    process: GuestProcess,
    what: str,
    *,
    timeout: float,
    input: bytes = b"",  # noqa: A002 - as `GuestProcess.communicate` has it
    limit: int = LONGEST_ANSWER,
) -> Answer:
    """See a command or service through; it is killed unless it ends by itself.

    :param process: just started, with both outputs to be read.
    :param what: what the guest is to do, in words that follow "to".
    :param timeout: seconds.
    :param input: what it reads.
    :param limit: bytes that it may write to each output.
    :raise DeadlineError: it has not ended in time.
    :raise GuestError: it wrote more than that, or the guest went away.
    """
    try:
        async with asyncio.timeout(timeout):
            stdout, stderr = await process.communicate(input, limit=limit)
            status = await process.wait()
    except TimeoutError:
        said = bytes((process.taken[1] or process.taken[0])[-_EVIDENCE:])
        raise DeadlineError(
            f"answer of VM {process.vm}, which was to {what},",
            timeout,
            safe_text(said.strip(), lines=True),
        ) from None
    finally:
        # also when it only left something behind that goes on writing
        process.hang_up()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    return Answer(status, stdout or b"", stderr or b"")
