"""Host's side of the agent protocol, without any input or output.

`HostProtocol` takes the bytes that came from a guest and yields events; it makes the
bytes that go to the guest. Every rule of docs/agent-protocol.md that the guest could
break is checked here, and nowhere else. It holds at most one frame of the guest's
bytes; what a channel's consumer has not taken yet is bounded by the credit given.
"""

from __future__ import annotations

import secrets
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Final

from qubes_itests.guest.exc import ProtocolViolation
from qubes_itests.guest.link.frames import (
    CREDIT_LIMIT,
    FIRST_GUEST_STREAM,
    HEADER,
    NOT_FOUND,
    PAYLOAD_MAX,
    REFUSED,
    STREAMS_MAX,
    VERSION,
    WINDOW,
    Called,
    Channel,
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
    encode_data,
    pack_strings,
    unpack_strings,
    unpack_text,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["HostProtocol"]

_LINE_MAX: Final = 1024
_EXIT_TEXT_MAX: Final = 512
_SIGNAL_MAX: Final = 64
_HELLO: Final = struct.Struct("<H16s")
_U32: Final = struct.Struct("<I")
#: Columns, or rows, of a terminal.
_LONGEST_SIDE: Final = 0xFFFF
_SIZE: Final = struct.Struct("<HH")


@dataclass(slots=True)
class _FromGuest:
    credit: int = WINDOW
    eof: bool = False


@dataclass(slots=True)
class _ToGuest:
    credit: int = WINDOW
    eof: bool = False
    stopped: bool = False


@dataclass(slots=True)
class _Stream:
    runs_in_guest: bool
    from_guest: dict[int, _FromGuest]
    to_guest: dict[int, _ToGuest]


@dataclass(slots=True)
class _Frame:
    type: FrameType
    channel: int
    stream: int
    payload: memoryview

    def __str__(self) -> str:
        where = f" on stream {self.stream:#x}" if self.stream else ""
        return f"{self.type.name}{where}"


@dataclass(slots=True)
class HostProtocol:
    """The state of one connection to an agent.

    Methods that make frames return the bytes to send. They check what callers could do
    wrong by ValueError or KeyError, as any function does; the guest's breaches are
    `ProtocolViolation` and come from `receive` only.
    """

    _rest: bytes = b""
    _streams: dict[int, _Stream] = field(default_factory=dict)
    _next_host_stream: int = 1
    _next_guest_stream: int = FIRST_GUEST_STREAM
    _nonce: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    _hellos: int = 0
    _ready: bool = False
    _pending: bool = False

    # from the guest

    def receive(self, data: bytes) -> Iterator[Event | None]:
        """Yield what these bytes mean; go on to the end of it, or drop the connection.

        One item for each frame, None when it means nothing (any more), so that the
        caller may stop between any two.

        :param data: the next bytes from the guest, cut anywhere.
        :raise ProtocolViolation: the guest broke a rule; nothing may follow.
        """
        if self._rest:
            data = self._rest + data
            self._rest = b""
        view = memoryview(data)
        start, end = 0, len(data)
        while end - start >= HEADER.size:
            kind, channel, length, stream = HEADER.unpack_from(view, start)
            self._check_header(kind, length)
            after = start + HEADER.size + length
            if after > end:
                break
            payload = view[start + HEADER.size : after]
            frame = _Frame(FrameType(kind), channel, stream, payload)
            start = after
            yield self._accept(frame)
        # a copy, of less than a frame: a view would keep alive all that was read
        self._rest = bytes(view[start:])

    def _check_header(self, kind: int, length: int) -> None:
        if kind not in self._RULES:
            raise ProtocolViolation(
                "", "the guest sends frames of the types listed", f"type {kind:#x}"
            )
        if length > PAYLOAD_MAX:
            raise ProtocolViolation(
                "", f"a payload has at most {PAYLOAD_MAX} bytes", f"{length} announced"
            )
        if not self._ready and kind != FrameType.READY:
            raise ProtocolViolation(
                "", "nothing comes before READY", FrameType(kind).name
            )

    def _accept(self, frame: _Frame) -> Event | None:
        has_channel, on_stream, rule = self._RULES[frame.type]
        if frame.channel > (Channel.STDERR if has_channel else 0):
            raise ProtocolViolation(
                "", "a channel is 0, 1 or 2, and 0 where it means nothing", str(frame)
            )
        if bool(frame.stream) != on_stream:
            raise ProtocolViolation(
                "", "control frames, and no others, are on stream 0", str(frame)
            )
        return rule(self, frame)

    def _on_ready(self, frame: _Frame) -> Event | None:
        if not self._hellos:
            raise ProtocolViolation("", "READY answers HELLO, once")
        # HELLO is repeated until READY comes; each that arrived has its own READY, and
        # there may be more of them than we wait for
        self._hellos -= 1
        if len(frame.payload) != _HELLO.size:
            raise ProtocolViolation("", f"READY has {_HELLO.size} bytes")
        version, nonce = _HELLO.unpack(frame.payload)
        if version != VERSION:
            raise ProtocolViolation(
                "", f"the agent speaks version {VERSION}", f"it speaks {version}"
            )
        if nonce != self._nonce:
            raise ProtocolViolation("", "READY returns the bytes of HELLO")
        again, self._ready = self._ready, True
        return None if again else Ready()

    def _on_done(self, frame: _Frame) -> Event:
        self._answered(frame)
        if frame.payload:
            raise ProtocolViolation("", "DONE is empty")
        return Done()

    def _on_failed(self, frame: _Frame) -> Event:
        self._answered(frame)
        return Failed(unpack_text(bytes(frame.payload), _LINE_MAX))

    def _answered(self, frame: _Frame) -> None:
        if not self._pending:
            raise ProtocolViolation("", "an answer follows a request", str(frame))
        self._pending = False

    def _on_log(self, frame: _Frame) -> Event:
        return Logged(unpack_text(bytes(frame.payload), _LINE_MAX))

    def _on_db_changed(self, frame: _Frame) -> Event:
        payload = bytes(frame.payload)
        if payload.count(b"\0") == 1:
            (path,) = unpack_strings(payload, 1)
            return DatabaseChanged(path, None)
        path, value = unpack_strings(payload, 2)
        return DatabaseChanged(path, value)

    def _on_call(self, frame: _Frame) -> Event:
        if frame.stream != self._next_guest_stream:
            raise ProtocolViolation(
                "", "the guest numbers its streams one by one", str(frame)
            )
        if self._open_streams(in_guest=False) >= STREAMS_MAX:
            raise ProtocolViolation("", f"at most {STREAMS_MAX} calls are open at once")
        target, service, user = unpack_strings(bytes(frame.payload), 3)
        self._next_guest_stream += 1
        self._streams[frame.stream] = _Stream(
            runs_in_guest=False,
            from_guest={Channel.STDIN: _FromGuest()},
            to_guest={Channel.STDOUT: _ToGuest()},
        )
        return Called(frame.stream, target, service, user)

    def _on_data(self, frame: _Frame) -> Event | None:
        if not frame.payload:
            raise ProtocolViolation("", "DATA has at least 1 byte", str(frame))
        channel = self._from_guest(frame)
        if channel is None:
            return None
        if channel.eof:
            raise ProtocolViolation("", "no DATA follows EOF", str(frame))
        if len(frame.payload) > channel.credit:
            raise ProtocolViolation(
                "",
                "DATA is within the credit given",
                f"{frame}: {len(frame.payload)} bytes for a credit of {channel.credit}",
            )
        # What this allows is all that a reader has to hold, whatever the guest sends:
        # the bound on memory is here, not in the reader.
        channel.credit -= len(frame.payload)
        return Received(frame.stream, frame.channel, frame.payload)

    def _on_eof(self, frame: _Frame) -> Event | None:
        self._empty(frame)
        channel = self._from_guest(frame)
        if channel is None:
            return None
        if channel.eof:
            raise ProtocolViolation("", "a channel is closed once", str(frame))
        channel.eof = True
        return ReceivedEof(frame.stream, frame.channel)

    def _on_stop(self, frame: _Frame) -> Event | None:
        self._empty(frame)
        channel = self._to_guest(frame)
        if channel is None or channel.stopped:
            return None
        channel.stopped = True
        return Stopped(frame.stream, frame.channel)

    def _on_credit(self, frame: _Frame) -> Event | None:
        if len(frame.payload) != _U32.size:
            raise ProtocolViolation("", f"CREDIT has {_U32.size} bytes", str(frame))
        channel = self._to_guest(frame)
        if channel is None:
            return None
        # bounded, or a guest would have us send gigabytes at once into the transport
        channel.credit += _U32.unpack(frame.payload)[0]
        if channel.credit > CREDIT_LIMIT:
            rule = f"a sender holds at most {CREDIT_LIMIT} bytes of credit"
            raise ProtocolViolation("", rule, str(frame))
        return Credited(frame.stream, frame.channel)

    def _on_exit(self, frame: _Frame) -> Event:
        stream = self._known(frame)
        if stream is None or not stream.runs_in_guest:
            raise ProtocolViolation(
                "", "EXIT comes once, from where the command runs", str(frame)
            )
        event = _ended(frame)
        del self._streams[frame.stream]
        return event

    def _known(self, frame: _Frame) -> _Stream | None:
        stream = self._streams.get(frame.stream)
        # One that has ended is no breach: the guest may not have known it yet when it
        # sent this. Numbers are never used again, so such a frame cannot reach a later
        # stream, and two counters tell those that have been from those never opened.
        by_guest = frame.stream >= FIRST_GUEST_STREAM
        following = self._next_guest_stream if by_guest else self._next_host_stream
        if stream is None and frame.stream >= following:
            raise ProtocolViolation("", "a stream is opened before use", str(frame))
        return stream

    def _from_guest(self, frame: _Frame) -> _FromGuest | None:
        stream = self._known(frame)
        if stream is None:
            return None
        if frame.channel not in stream.from_guest:
            raise ProtocolViolation(
                "", "the guest does not write this channel", str(frame)
            )
        return stream.from_guest[frame.channel]

    def _to_guest(self, frame: _Frame) -> _ToGuest | None:
        stream = self._known(frame)
        if stream is None:
            return None
        if frame.channel not in stream.to_guest:
            raise ProtocolViolation(
                "", "the guest writes this channel, not the host", str(frame)
            )
        return stream.to_guest[frame.channel]

    @staticmethod
    def _empty(frame: _Frame) -> None:
        if frame.payload:
            raise ProtocolViolation("", "this frame is empty", str(frame))

    #: For each type that a guest may send: whether its channel means something, whether
    #: it is on a stream, and the rule that it must keep.
    _RULES: ClassVar[
        dict[int, tuple[bool, bool, Callable[[HostProtocol, _Frame], Event | None]]]
    ] = {
        FrameType.READY: (False, False, _on_ready),
        FrameType.DONE: (False, False, _on_done),
        FrameType.FAILED: (False, False, _on_failed),
        FrameType.LOG: (False, False, _on_log),
        FrameType.DB_CHANGED: (False, False, _on_db_changed),
        FrameType.CALL: (False, True, _on_call),
        FrameType.DATA: (True, True, _on_data),
        FrameType.EOF: (True, True, _on_eof),
        FrameType.STOP: (True, True, _on_stop),
        FrameType.CREDIT: (True, True, _on_credit),
        FrameType.EXIT: (False, True, _on_exit),
    }

    # to the guest

    def hello(self) -> bytes:
        """Begin; `Ready` follows. It may be sent again until then."""
        self._hellos += 1
        return encode(FrameType.HELLO, payload=_HELLO.pack(VERSION, self._nonce))

    def request(self, kind: FrameType, payload: bytes) -> bytes:
        """Make a request; `Done` or `Failed` follows, and then the next may."""
        if self._pending:
            raise ValueError("expected an answer before the next request")
        # first, as it refuses what is too long: then no answer is waited for
        frame = encode(kind, payload=payload)
        self._pending = True
        return frame

    def spawn(self, *strings: str) -> tuple[int, bytes]:
        """Open a stream.

        :param strings: the payload of SPAWN.
        :return: its number, and the frame.
        """
        number = self._next_host_stream
        frame = encode(FrameType.SPAWN, number, payload=pack_strings(strings))
        self._next_host_stream += 1
        outputs = [Channel.STDOUT]
        if strings[0] != "terminal":
            outputs.append(Channel.STDERR)
        self._streams[number] = _Stream(
            runs_in_guest=True,
            from_guest={output: _FromGuest() for output in outputs},
            to_guest={Channel.STDIN: _ToGuest()},
        )
        return number, frame

    def may_spawn(self) -> bool:
        """Tell whether one more stream may be opened now."""
        return self._open_streams(in_guest=True) < STREAMS_MAX

    def credit(self, stream: int, channel: int) -> int:
        """Return how many bytes may be sent on a channel now; 0 when it is stopped."""
        state = self._streams[stream].to_guest[channel]
        return 0 if state.stopped else state.credit

    def data(self, stream: int, channel: int, data: memoryview) -> bytes:
        """Send bytes, at most `credit` of them."""
        state = self._streams[stream].to_guest[channel]
        if state.eof or len(data) > self.credit(stream, channel):
            raise ValueError("DATA after EOF or beyond the credit")
        state.credit -= len(data)
        return b"".join(encode_data(stream, channel, data))

    def eof(self, stream: int, channel: int) -> bytes:
        """Close a channel that the host writes."""
        self._streams[stream].to_guest[channel].eof = True
        return encode(FrameType.EOF, stream, channel)

    def stop(self, stream: int, channel: int) -> bytes:
        """Say that nobody reads a channel any more."""
        return encode(FrameType.STOP, stream, channel)

    def give_credit(self, stream: int, channel: int, size: int) -> bytes:
        """Let the guest send `size` more bytes on a channel."""
        state = self._streams[stream].from_guest[channel]
        if state.eof:
            # the guest has forgotten the channel, and would send no more anyway
            return b""
        state.credit += size
        return encode(FrameType.CREDIT, stream, channel, _U32.pack(size))

    def signal(self, stream: int, number: int) -> bytes:
        """Send a signal to a command's process group."""
        return encode(FrameType.SIGNAL, stream, payload=bytes([number]))

    def resize(self, stream: int, columns: int, rows: int) -> bytes:
        """Say that a terminal has another size; each of them is at least 1."""
        if not (min(columns, rows) >= 1 and max(columns, rows) <= _LONGEST_SIDE):
            raise ValueError(
                f"expected 1 to 65535 columns and rows, got {columns} and {rows}"
            )
        return encode(FrameType.RESIZE, stream, payload=_SIZE.pack(columns, rows))

    def exit(self, stream: int, kind: ExitKind, value: int, text: str = "") -> bytes:
        """End a call of the guest."""
        # cut between characters
        words = text.encode()[:_EXIT_TEXT_MAX].decode(errors="ignore").encode()
        frame = encode(FrameType.EXIT, stream, payload=bytes([kind, value]) + words)
        del self._streams[stream]
        return frame

    def is_open(self, stream: int) -> bool:
        """Tell whether a stream has begun and not ended."""
        return stream in self._streams

    def _open_streams(self, *, in_guest: bool) -> int:
        return sum(s.runs_in_guest == in_guest for s in self._streams.values())


def _ended(frame: _Frame) -> Ended:
    payload = bytes(frame.payload)
    if len(payload) < 2:  # noqa: PLR2004 - kind and value
        raise ProtocolViolation("", "EXIT has a kind and a value", str(frame))
    kind, value = payload[0], payload[1]
    valid = (
        kind == ExitKind.EXITED
        or (kind == ExitKind.KILLED and 1 <= value <= _SIGNAL_MAX)
        or (kind == ExitKind.NOT_STARTED and value in (REFUSED, NOT_FOUND))
    )
    if not valid:
        raise ProtocolViolation(
            "", "EXIT is of a kind and value listed", f"kind {kind}, value {value}"
        )
    text = unpack_text(payload[2:], _EXIT_TEXT_MAX)
    return Ended(frame.stream, ExitKind(kind), value, text)
