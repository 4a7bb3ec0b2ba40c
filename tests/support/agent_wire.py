"""A small synchronous speaker of the agent protocol, for the tests of the agent."""

from __future__ import annotations

import dataclasses
import os
import select
import struct
import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable

HELLO, ENTER, DB_WRITE, DB_REMOVE, POWER_OFF = 0x01, 0x02, 0x03, 0x04, 0x05
CLOCK, DISK, LEAVE = 0x06, 0x07, 0x08
SPAWN, CALL, DATA, EOF, STOP, CREDIT, SIGNAL, EXIT, RESIZE = range(0x10, 0x19)
READY, DONE, FAILED, LOG, DB_CHANGED = range(0x81, 0x86)
PAYLOAD_MAX = 32760
WINDOW = 262144
HEADER = struct.Struct("<BBHI")


@dataclasses.dataclass(frozen=True)
class Frame:
    """One frame as it came."""

    type: int
    channel: int
    stream: int
    payload: bytes


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command left: the exit kind and value, and its output."""

    kind: int
    value: int
    text: str
    stdout: bytes
    stderr: bytes


def strings(*parts: str) -> bytes:
    """Return the strings as the protocol writes them."""
    return b"".join(part.encode() + b"\0" for part in parts)


def frame(kind: int, channel: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    """Return one encoded frame."""
    return HEADER.pack(kind, channel, len(payload), stream) + payload


class Wire:
    """The host's end of one connection to an agent."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = bytearray()
        self.pending: deque[Frame] = deque()
        self.last_stream = 0

    def send(
        self, kind: int, channel: int = 0, stream: int = 0, payload: bytes = b""
    ) -> None:
        self.sock.sendall(frame(kind, channel, stream, payload))

    def receive(self, timeout: float = 300.0) -> Frame | None:
        """Return the next frame, or None when the agent has closed the connection."""
        deadline = time.monotonic() + timeout
        while True:
            if self.pending:
                return self.pending.popleft()
            if not select.select([self.sock], [], [], deadline - time.monotonic())[0]:
                raise TimeoutError("no frame came")
            data = self.sock.recv(1 << 20)
            if not data:
                return None
            self.feed(data)

    def feed(self, data: bytes) -> None:
        """Take apart what the agent sent."""
        self.buffer += data
        start = 0
        while len(self.buffer) - start >= HEADER.size:
            kind, channel, length, stream = HEADER.unpack_from(self.buffer, start)
            end = start + HEADER.size + length
            if len(self.buffer) < end:
                break
            payload = bytes(self.buffer[start + HEADER.size : end])
            self.pending.append(Frame(kind, channel, stream, payload))
            start = end
        del self.buffer[:start]

    def expect(self, kind: int, stream: int = 0, timeout: float = 300.0) -> Frame:
        """Return the next frame of that type and stream; drop what comes before."""
        deadline = time.monotonic() + timeout
        while True:
            got = self.receive(deadline - time.monotonic())
            if got is None:
                raise ConnectionError("the agent has gone")
            if (got.type, got.stream) == (kind, stream):
                return got

    def hello(self, timeout: float = 300.0) -> None:
        nonce = os.urandom(16)
        self.send(HELLO, payload=struct.pack("<H", 1) + nonce)
        ready = self.expect(READY, timeout=timeout)
        assert ready.payload == struct.pack("<H", 1) + nonce

    def control(self, kind: int, payload: bytes, timeout: float = 300.0) -> str | None:
        """Make a request; return None for DONE, the text of FAILED otherwise."""
        self.send(kind, payload=payload)
        while True:
            got = self.receive(timeout)
            assert got is not None
            if got.stream == 0 and got.type in (DONE, FAILED):
                return None if got.type == DONE else got.payload.decode()

    def spawn(
        self,
        line: str,
        *,
        kind: str = "command",
        user: str = "",
        source: str = "",
        environment: Iterable[str] = (),
    ) -> int:
        """Open a stream; return its number."""
        self.last_stream += 1
        request = strings(kind, user, line, source, *environment)
        self.send(SPAWN, stream=self.last_stream, payload=request)
        return self.last_stream

    def write(self, stream: int, data: bytes, channel: int = 0) -> None:
        for start in range(0, len(data), PAYLOAD_MAX):
            self.send(DATA, channel, stream, data[start : start + PAYLOAD_MAX])

    def finish(self, stream: int, timeout: float = 300.0) -> Result:
        """Collect a stream's output until its EXIT, giving credit back."""
        output = {1: bytearray(), 2: bytearray()}
        deadline = time.monotonic() + timeout
        while True:
            got = self.receive(deadline - time.monotonic())
            if got is None:
                raise ConnectionError("the agent has gone")
            if got.stream != stream:
                continue
            if got.type == DATA:
                output[got.channel] += got.payload
                credit = struct.pack("<I", len(got.payload))
                self.send(CREDIT, got.channel, stream, credit)
            elif got.type == EXIT:
                kind, value = got.payload[:2]
                text = got.payload[2:].decode()
                return Result(kind, value, text, bytes(output[1]), bytes(output[2]))

    def run(
        self, line: str, data: bytes = b"", timeout: float = 300.0, **options: object
    ) -> Result:
        """Run a command with that input, at most one window of it."""
        stream = self.spawn(line, **options)  # type: ignore[arg-type]
        self.write(stream, data)
        self.send(EOF, 0, stream)
        return self.finish(stream, timeout)


class Pour:
    """A stream through one command, in and out at once, as fast as it goes."""

    BLOCK = bytes(range(256)) * 127

    def __init__(self, wire: Wire, line: str, size: int) -> None:
        self.wire, self.left = wire, size
        self.stream = wire.spawn(line)
        self.credit, self.received, self.owed = WINDOW, 0, 0
        self.out = bytearray()
        self.result: Result | None = None

    def _fill(self) -> None:
        while self.left and len(self.out) < 1 << 20:
            block = self.BLOCK[: min(len(self.BLOCK), self.left)]
            if len(block) > self.credit:
                return
            self.out += frame(DATA, 0, self.stream, block)
            self.left -= len(block)
            self.credit -= len(block)
            if not self.left:
                self.out += frame(EOF, 0, self.stream)

    def _take(self, got: Frame) -> None:
        if got.type == DATA and got.channel == 1:
            self.received += len(got.payload)
            self.owed += len(got.payload)
        elif got.type == CREDIT:
            self.credit += struct.unpack("<I", got.payload)[0]
        elif got.type == EXIT:
            self.result = Result(got.payload[0], got.payload[1], "", b"", b"")
        if self.owed >= WINDOW // 4:
            self.out += frame(CREDIT, 1, self.stream, struct.pack("<I", self.owed))
            self.owed = 0

    def step(self, timeout: float) -> None:
        self._fill()
        sock = self.wire.sock
        ready = select.select([sock], [sock] if self.out else [], [], timeout)
        if not ready[0] and not ready[1]:
            raise TimeoutError(f"{self.left} to send, {self.received} received")
        if ready[1]:
            del self.out[: sock.send(bytes(self.out[: 1 << 18]))]
        if ready[0]:
            self.wire.feed(sock.recv(1 << 18))
        while self.wire.pending:
            self._take(self.wire.pending.popleft())


def pour(wire: Wire, line: str, size: int, timeout: float = 600.0) -> Result:
    """Send `size` bytes through a command that gives as many back."""
    poured = Pour(wire, line, size)
    deadline = time.monotonic() + timeout
    wire.sock.setblocking(False)
    while poured.result is None:
        poured.step(max(0.0, deadline - time.monotonic()))
    wire.sock.setblocking(True)
    assert poured.received == size, (poured.received, size)
    return poured.result
