"""Connection to a guest's agent: the protocol, fed by a transport of asyncio.

What a guest may cost is bounded here. *Memory*: DATA waits while more than a window
lies in the transport, and nothing more is heard of a guest that makes us answer without
reading the answers. *Time*: what has come is acted upon for a few milliseconds, then
all others have their turn; each call that is refused holds up its VM a little.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
from datetime import UTC, datetime
from itertools import chain
from typing import IO, TYPE_CHECKING, Any, Final, TypeVar

from qubes_itests.guest.exc import (
    GuestError,
    GuestGoneError,
    GuestRefusedError,
    ProtocolViolation,
)
from qubes_itests.guest.link.calls import CallHandler, ServiceCall, refusal
from qubes_itests.guest.link.frames import (
    HEADER,
    PAYLOAD_MAX,
    REFUSED,
    STREAMS_MAX,
    WINDOW,
    Called,
    Credited,
    DatabaseChanged,
    Done,
    Ended,
    Event,
    ExitKind,
    Failed,
    FrameType,
    Logged,
    Ready,
    Received,
    ReceivedEof,
    Stopped,
    encode,
)
from qubes_itests.guest.link.process import GuestProcess
from qubes_itests.guest.link.protocol import HostProtocol
from qubes_itests.timeline import Span, called_by_guest, command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from qubes_itests.guest.link.streams import GuestWriter

__all__ = ["AgentConnection", "AgentLog"]

_P = TypeVar("_P", bound=GuestProcess)

log = logging.getLogger("qubes_itests.guest")

#: Seconds until HELLO is sent again for the first time.
_HELLO_INTERVAL: Final = 0.2
#: Bytes that a step gathers before it hands them to the transport.
_GATHERED: Final = WINDOW // 4
#: Bytes in the transport above which no DATA is added, and at which it goes on. What a
#: step has gathered is not in there yet, so the two together make a window.
_HIGH_WATER: Final = WINDOW - _GATHERED
_LOW_WATER: Final = WINDOW // 4
#: Bytes in the transport above which nothing is heard of the guest. An agent that does
#: not read before we do (its own buffer is full) must never be met by this, or both
#: would wait for ever. To the high water come the DATA that one stream may send at
#: once, which is a window, a SPAWN for each stream, and the small frames of all, less
#: than another window.
_TOO_MUCH: Final = 3 * WINDOW + STREAMS_MAX * (HEADER.size + PAYLOAD_MAX)
#: Seconds for which frames are acted upon, and then not, while others have their turn.
_STEP: Final = 0.002
#: Calls begun in such a step: what each begins is done in the next turn of the loop.
_CALLS_A_STEP: Final = 8
#: Seconds for which a refused call keeps us from listening to its VM.
_REFUSAL: Final = 0.005
#: Bytes after which a log takes no more: a guest must not fill the host's disk.
LIMIT: Final = 1 << 20


class AgentLog:
    """A file of lines with their time, that stops growing at 1 MiB.

    :param path: the file, made or appended to; None keeps nothing.
    """

    #: Called with each line that is kept.
    listener: Callable[[str], None] | None = None

    def __init__(self, path: Path | None) -> None:
        self._file: IO[str] | None = None
        self._room = 0
        if path is not None:
            self._file = path.open("a", encoding="utf-8", buffering=1)
            self._room = LIMIT - path.stat().st_size

    def write(self, line: str) -> None:
        """Add a line; dropped when the log is full or closed."""
        if self._file is None or self._room <= 0:
            return
        time = datetime.now(UTC).isoformat(sep=" ", timespec="milliseconds")
        entry = f"{time[:-6]} {line}\n"
        self._room -= len(entry.encode())
        self._file.write(entry)
        if self.listener is not None:
            self.listener(line)
        if self._room <= 0:
            self._file.write("the log is full; what follows is dropped\n")

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None


class AgentConnection(asyncio.Protocol):
    """The link that all streams of one guest share.

    :param vm: name of the VM, for errors.
    :param on_call: what to do with calls of the guest; None refuses them all.
    :param agent_log: takes the agent's LOG lines.
    """

    def __init__(
        self, vm: str, on_call: CallHandler | None, agent_log: AgentLog
    ) -> None:
        self.vm = vm
        self.protocol = HostProtocol()
        self.log = agent_log
        loop = asyncio.get_running_loop()
        #: Done with the error that ended the connection.
        self.closed: asyncio.Future[GuestGoneError] = loop.create_future()
        #: Called with the path of an entry that the agent has changed by itself, and
        #: with its value, None if there is none any more.
        self.on_db_change: Callable[[str, str | None], None] | None = None
        self._on_call = on_call
        self._transport: asyncio.Transport | None = None
        self._streams: dict[int, GuestProcess | ServiceCall] = {}
        self._turn = asyncio.Lock()
        self._answer: asyncio.Future[Event] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = loop
        #: What a step has sent so far; None outside of steps.
        self._gathered: bytearray | None = None
        #: Whether more lies in the transport than should.
        self._crowded = False
        #: Who has something to write when there is room again, in this order.
        self._blocked: dict[GuestWriter, None] = {}
        #: What has come and was not acted upon.
        self._frames: Iterator[Event | None] = iter(())
        self._next_step: asyncio.Handle | None = None
        self._quiet_until = 0.0
        #: Why there is no transport any more; what has come is acted upon still.
        self._lost: GuestGoneError | None = None

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - for mypy
        self._transport = transport
        transport.set_write_buffer_limits(_HIGH_WATER, _LOW_WATER)

    def data_received(self, data: bytes) -> None:
        """Act on bytes of the guest, for one step; nothing is read before the last."""
        # The iterator replaces the one before, which must be at its end, or frames
        # would be lost. It is: while frames are left reading is paused, and asyncio
        # calls this once for each time that the loop finds bytes.
        self._frames = self.protocol.receive(data)
        self._go_on()

    def pause_writing(self) -> None:
        """Have writers wait."""
        self._crowded = True

    def resume_writing(self) -> None:
        """Have writers go on, in turn, until it is too much again."""
        self._crowded = False
        # Each flush may have asyncio call `pause_writing` from inside, which ends this.
        # In the order in which they began to wait: with any other one stream that has
        # much to say would starve those behind it.
        while self._blocked and not self._crowded:
            writer = next(iter(self._blocked))
            del self._blocked[writer]
            writer.flush()
        # A step that ended for `_TOO_MUCH` has set no time for the next. One that has
        # waits for its time: a guest that is held up shall not shorten it by reading.
        if self._next_step is None:
            self._go_on()

    def _go_on(self) -> None:
        self._next_step = None
        if self.closed.done() or self._transport is None:
            return
        try:
            wait = self._act(self._transport)
        except ProtocolViolation as violation:
            # the protocol knows no VM; here the error gets the name
            self.abort(ProtocolViolation(self.vm, violation.rule, violation.evidence))
            return
        if self.closed.done():
            return
        if wait is None and self._lost is not None:
            self._end(self._lost)
        elif wait is None:
            self._transport.resume_reading()
        else:
            # This is the back pressure: the socket fills, then QEMU's buffer, then the
            # guest's port, where the agent waits with what it has for us.
            self._transport.pause_reading()
            if wait < math.inf:
                self._next_step = self._loop.call_later(wait, self._go_on)

    def _act(self, transport: asyncio.Transport) -> float | None:
        """Act on frames; return the seconds until more may be done, None if all is.

        Infinity: when the guest has read some of what we sent, see `resume_writing`.
        """
        now = self._loop.time()
        end, calls = now + _STEP, 0
        self._gathered = bytearray()
        try:
            while now <= end and calls < _CALLS_A_STEP and not self.closed.done():
                if now < self._quiet_until:
                    return self._quiet_until - now
                if self._crowded and transport.get_write_buffer_size() > _TOO_MUCH:
                    return math.inf
                try:
                    event = next(self._frames)
                except StopIteration:
                    return None
                if event is not None:
                    self._handlers[type(event)](self, event)
                    calls += type(event) is Called
                now = self._loop.time()
            return _STEP
        finally:
            gathered, self._gathered = self._gathered, None
            self.send(gathered)

    def eof_received(self) -> None:
        """Let the transport close; `connection_lost` follows.

        QEMU closes the socket as a whole: there is nobody left to write to.
        """

    def connection_lost(self, exc: Exception | None) -> None:
        """Act on what has come still, then fail what was pending."""
        if self.closed.done() or self._transport is None:
            return
        reason = f"{exc}" if exc else "the VM or its agent has stopped"
        self._lost = GuestGoneError(self.vm, reason)
        if exc is not None:
            # When a write fails asyncio reads no more: the last words of a guest are in
            # the socket, which it closes after this, and hold less than is asked for.
            unread = b""
            with contextlib.suppress(OSError):
                socket = self._transport.get_extra_info("socket")
                unread = os.read(socket.fileno(), _TOO_MUCH)
            self._frames = chain(self._frames, self.protocol.receive(unread))
        # else it goes on at its time
        if self._next_step is None:
            self._go_on()

    # for streams

    def send(self, data: bytes | bytearray) -> None:
        """Hand bytes to the transport; dropped when the connection has ended.

        What one step sends goes there together. asyncio keeps each write that has to
        wait as a piece, and counts them all at each further one: a guest that does not
        read, and has us answer in thousands of small frames, would cost the square.
        """
        if not data or self._transport is None or self.closed.done():
            return
        if self._transport.is_closing():
            return
        if self._gathered is not None:
            self._gathered += data
            if len(self._gathered) < _GATHERED:
                return
            # more would escape `_crowded`, by which the writers of DATA go
            data, self._gathered = self._gathered, bytearray()
        self._transport.write(data)

    def has_room(self, writer: GuestWriter) -> bool:
        """Tell whether DATA may be sent now; if not, `writer.flush` is called later."""
        if self._crowded:
            self._blocked[writer] = None
        return not self._crowded

    def forget(self, stream: int) -> None:
        """Drop a call that has ended."""
        self._streams.pop(stream, None)

    def hold_up(self) -> None:
        """Take note that a call was refused: its VM shall not make us do so all day."""
        self._quiet_until = max(self._quiet_until, self._loop.time()) + _REFUSAL

    # for the agent

    async def hello(self) -> None:
        """Begin the protocol; return when the agent is ready."""
        self._require_open()
        asking = asyncio.ensure_future(self._ask(self.protocol.hello()))
        try:
            interval = _HELLO_INTERVAL
            while not (await asyncio.wait([asking], timeout=interval))[0]:
                # A guest that was saved and restored may get HELLO before it learns
                # that the port is connected, and then drops it.
                self.send(self.protocol.hello())
                interval *= 2
            await asking
        finally:
            # who gives up must not leave it behind to take the answer to the next
            asking.cancel()

    async def request(self, kind: FrameType, payload: bytes, what: str) -> None:
        """Make a request and wait for its answer.

        :param kind: type of the frame.
        :param payload: its payload.
        :param what: the request in words, for the error.
        :raise GuestRefusedError: the agent answered FAILED.
        """
        # One request at a time, for answers have no number: the lock is what tells
        # which of them this one gets.
        async with self._turn:
            if self._answer is not None:
                # Whoever asked may have been cancelled, and the guest answers all the
                # same. That answer is not for us: without this wait each later request
                # would get that of the one before it.
                await asyncio.wait([self._answer])
            self._require_open()
            frame = self.protocol.request(kind, payload)
            event = await self._ask(frame)
        if isinstance(event, Failed):
            raise GuestRefusedError(self.vm, what, event.reason)

    async def _ask(self, frame: bytes) -> Event:
        self._require_open()
        self._answer = asyncio.get_running_loop().create_future()
        self.send(frame)
        # shielded: the future must outlive a caller that is cancelled, see `request`
        return await asyncio.shield(self._answer)

    def spawn(self, kind: type[_P], *strings: str) -> _P:
        """Open a stream for a command, a service or a terminal.

        :param kind: of what is returned.
        :param strings: the payload of SPAWN.
        """
        self._require_open()
        if not self.protocol.may_spawn():
            raise GuestError(
                self.vm,
                f"{STREAMS_MAX} commands are running already; wait for some to end",
            )
        number, frame = self.protocol.spawn(*strings)
        span = _report(self.vm, *strings)
        process = kind(self, number, self.vm, strings[2], span)
        self._streams[number] = process
        self.send(frame)
        return process

    def power_off(self, payload: bytes) -> None:
        """Send POWER_OFF, which has no answer."""
        self._require_open()
        self.send(encode(FrameType.POWER_OFF, payload=payload))

    def abort(self, error: GuestGoneError) -> None:
        """End the connection with an error."""
        self._end(error)
        if self._transport is not None:
            self._transport.abort()

    async def tasks_done(self) -> None:
        """Wait until the handlers of calls have been cancelled and have ended."""
        # not for the handler that closes the connection itself: it would never end
        tasks = self._tasks - {asyncio.current_task()}
        if tasks:
            await asyncio.wait(tasks)

    def _require_open(self) -> None:
        if self.closed.done():
            raise self.closed.result()

    def _end(self, error: GuestGoneError) -> None:
        if self.closed.done():
            return
        # First of all: what follows wakes others, which may come back here, and must
        # find the connection closed. As a result and not as an exception, of which
        # asyncio would complain if nobody had asked for it.
        self.closed.set_result(error)
        self._frames = iter(())
        # who keeps a process of it keeps this connection, and shall not keep the VM
        self._on_call = None
        if self._next_step is not None:
            self._next_step.cancel()
        self._blocked.clear()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
            self._answer.exception()  # who asked may have gone
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.lose(error)
        for task in self._tasks:
            task.cancel()
        self.log.write(str(error))
        self.log.close()

    # events

    def _on_answer(self, event: Event) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(event)

    def _on_log(self, event: Logged) -> None:
        self.log.write(event.line)

    def _on_db_changed(self, event: DatabaseChanged) -> None:
        if self.on_db_change is not None:
            self.on_db_change(event.path, event.value)

    def _on_data(self, event: Received) -> None:
        self._streams[event.stream].reader(event.channel).feed_data(event.data)

    def _on_eof(self, event: ReceivedEof) -> None:
        self._streams[event.stream].reader(event.channel).feed_eof()

    def _on_stop(self, event: Stopped) -> None:
        error = BrokenPipeError(f"VM {self.vm} stopped reading")
        self._streams[event.stream].writer().break_off(error)

    def _on_credit(self, event: Credited) -> None:
        # more credit: what waits for it goes out, as far as the transport has room
        self._streams[event.stream].writer().flush()

    def _on_exit(self, event: Ended) -> None:
        process = self._streams.pop(event.stream)
        assert isinstance(process, GuestProcess)  # noqa: S101 - the protocol's rule
        process.end(event)

    def _on_called(self, event: Called) -> None:
        reason = refusal(event)
        if not reason and len(self._tasks) >= STREAMS_MAX:
            # calls may have ended whose handlers are still cleaning up
            reason = "too many calls of this VM are being served"
        if reason or self._on_call is None:
            reason = reason or "this VM may not call services"
            frame = self.protocol.exit(
                event.stream, ExitKind.NOT_STARTED, REFUSED, reason
            )
            self.send(frame)
            self.hold_up()
            return
        # Known before the handler runs: DATA of it may come with the very next frame.
        call = ServiceCall(self, event, self.vm)
        self._streams[event.stream] = call
        with called_by_guest():
            task = asyncio.ensure_future(self._serve(self._on_call, call))
        # the loop itself has only weak references to tasks
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, on_call: CallHandler, call: ServiceCall) -> None:
        try:
            await on_call(call)
        except GuestGoneError as error:
            # as text, here and below: who keeps the record would keep the VM
            log.info("%s ended: %s", repr(call), str(error))
            await call.refuse("the service went away")
        except Exception:
            log.exception("%s failed", repr(call))
            await call.refuse("the host failed to serve it")
        else:
            if not call.ended:
                log.error("%s was not ended by its handler", repr(call))
                await call.refuse("the host did not serve it")

    _handlers: Final[dict[type, Callable[..., Any]]] = {
        Ready: _on_answer,
        Done: _on_answer,
        Failed: _on_answer,
        Logged: _on_log,
        DatabaseChanged: _on_db_changed,
        Received: _on_data,
        ReceivedEof: _on_eof,
        Stopped: _on_stop,
        Credited: _on_credit,
        Ended: _on_exit,
        Called: _on_called,
    }


def _report(vm: str, kind: str, user: str, text: str, source: str, *_more: str) -> Span:
    """Report that a command, a terminal or a service begins."""
    if kind == "service":
        return command("service", source, target=vm, service=text, user=user or None)
    if kind == "terminal":
        text = text or "a shell"
    return command("run", vm, command=text, user=user or None)
