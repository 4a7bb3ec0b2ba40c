"""Frames of the agent protocol: numbers, layout, payloads, and what they mean."""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from qubes_itests.guest.exc import ProtocolViolation
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = [
    "CREDIT_LIMIT",
    "FIRST_GUEST_STREAM",
    "GONE",
    "HEADER",
    "NOT_FOUND",
    "PAYLOAD_MAX",
    "REFUSED",
    "STREAMS_MAX",
    "VERSION",
    "WINDOW",
    "Called",
    "Channel",
    "Credited",
    "Done",
    "Ended",
    "Event",
    "ExitKind",
    "Failed",
    "FrameType",
    "Logged",
    "Ready",
    "Received",
    "ReceivedEof",
    "Stopped",
    "encode",
    "encode_data",
    "pack_strings",
    "unpack_strings",
    "unpack_text",
]

VERSION: Final = 1
HEADER: Final = struct.Struct("<BBHI")
PAYLOAD_MAX: Final = 32_760
#: Bytes of DATA that a channel may carry before the first CREDIT.
WINDOW: Final = 262_144
#: A sender never holds more credit than this: what is waiting for a reader shall be
#: bounded by us, and not by what the reader says that it takes.
CREDIT_LIMIT: Final = 4 * WINDOW
#: Streams that one side may have open at once.
STREAMS_MAX: Final = 128
FIRST_GUEST_STREAM: Final = 0x8000_0001

# Exit statuses that qrexec itself gives a call, in place of the program's own:
# https://www.qubes-os.org/doc/qrexec-internals/, and POSIX for what a shell returns.
#: Policy, or the agent, does not let it start.
REFUSED: Final = 126
#: There is no such command, service or user.
NOT_FOUND: Final = 127
#: The VM went away before the program had ended.
GONE: Final = 255


class FrameType(enum.IntEnum):
    """What a frame is; see docs/agent-protocol.md."""

    HELLO = 0x01
    ENTER = 0x02
    DB_WRITE = 0x03
    DB_REMOVE = 0x04
    POWER_OFF = 0x05
    CLOCK = 0x06
    DISK = 0x07
    LEAVE = 0x08
    SPAWN = 0x10
    CALL = 0x11
    DATA = 0x12
    EOF = 0x13
    STOP = 0x14
    CREDIT = 0x15
    SIGNAL = 0x16
    EXIT = 0x17
    RESIZE = 0x18
    READY = 0x81
    DONE = 0x82
    FAILED = 0x83
    LOG = 0x84
    DB_CHANGED = 0x85


class Channel(enum.IntEnum):
    """The channels of a stream, numbered as the descriptors of a process."""

    STDIN = 0
    STDOUT = 1
    STDERR = 2


class ExitKind(enum.IntEnum):
    """How what ran on a stream came to its end."""

    EXITED = 0
    KILLED = 1
    NOT_STARTED = 2


# What the frames of a guest mean, as `HostProtocol` says it.


class Ready(NamedTuple):
    """The agent answered HELLO."""


class Done(NamedTuple):
    """The pending request was carried out."""


class Failed(NamedTuple):
    """The pending request was not carried out."""

    reason: str


class DatabaseChanged(NamedTuple):
    """The agent has changed an entry of the guest's database."""

    path: str
    #: None: it has removed it.
    value: str | None


class Logged(NamedTuple):
    """A line for the agent log."""

    line: str


class Called(NamedTuple):
    """The guest opened a stream: a call that comes out of it."""

    stream: int
    target: str
    service: str
    user: str


class Received(NamedTuple):
    """Bytes of a channel; the view is valid until the next event is asked for."""

    stream: int
    channel: int
    data: memoryview


class ReceivedEof(NamedTuple):
    """The guest closed a channel that it writes."""

    stream: int
    channel: int


class Stopped(NamedTuple):
    """The guest does not read a channel any more."""

    stream: int
    channel: int


class Credited(NamedTuple):
    """The guest takes more bytes on a channel."""

    stream: int
    channel: int


class Ended(NamedTuple):
    """What ran in the guest has ended, and its stream with it."""

    stream: int
    kind: ExitKind
    value: int
    text: str


Event = (
    Ready
    | Done
    | Failed
    | Logged
    | DatabaseChanged
    | Called
    | Received
    | ReceivedEof
    | Stopped
    | Credited
    | Ended
)


def encode(
    kind: FrameType, stream: int = 0, channel: int = 0, payload: bytes = b""
) -> bytes:
    """Return one frame.

    :raise ValueError: when the payload is too long.
    """
    if len(payload) > PAYLOAD_MAX:
        raise ValueError(
            f"expected a payload of at most {PAYLOAD_MAX} bytes, got {len(payload)}"
        )
    return HEADER.pack(kind, channel, len(payload), stream) + payload


def encode_data(
    stream: int, channel: int, data: memoryview
) -> Iterator[bytes | memoryview]:
    """Yield headers and bytes of the DATA frames that carry `data`, to be joined."""
    for start in range(0, len(data), PAYLOAD_MAX):
        part = data[start : start + PAYLOAD_MAX]
        yield HEADER.pack(FrameType.DATA, channel, len(part), stream)
        yield part


def pack_strings(strings: Iterable[str]) -> bytes:
    """Return strings as a payload has them.

    :raise ValueError: when one holds a NUL, is not text, or all are too long.
    """
    payload = b""
    for string in strings:
        if "\0" in string:
            raise ValueError(f"expected text without NUL for a guest, got {string!r}")
        payload += string.encode() + b"\0"
    if len(payload) > PAYLOAD_MAX:
        raise ValueError(
            f"expected at most {PAYLOAD_MAX} bytes of text, got {len(payload)}"
        )
    return payload


def unpack_strings(payload: bytes, count: int) -> list[str]:
    """Return the `count` strings of a payload from the guest."""
    if payload.count(b"\0") != count or not payload.endswith(b"\0"):
        raise ProtocolViolation(
            "", f"this frame has {count} strings, each ended by a NUL"
        )
    return [_decode(part) for part in payload[:-1].split(b"\0")]


def unpack_text(payload: bytes, limit: int) -> str:
    """Return a text of at most `limit` bytes from the guest, as one safe line."""
    if len(payload) > limit:
        raise ProtocolViolation(
            "", f"this text has at most {limit} bytes", f"{len(payload)} came"
        )
    return safe_text(_decode(payload), limit=None)


def _decode(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ProtocolViolation("", "texts are UTF-8", repr(data[:40])) from None
