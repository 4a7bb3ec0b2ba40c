"""A small synchronous speaker of the agent protocol, for the tests of the agent."""

from __future__ import annotations

import dataclasses
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable

HELLO, ENTER, DB_WRITE, DB_REMOVE, POWER_OFF = 0x01, 0x02, 0x03, 0x04, 0x05
SPAWN, CALL, DATA, EOF, STOP, CREDIT, SIGNAL, EXIT = range(0x10, 0x18)
READY, DONE, FAILED, LOG = 0x81, 0x82, 0x83, 0x84
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

    def receive(self, timeout: float = 10.0) -> Frame | None:
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

    def expect(self, kind: int, stream: int = 0, timeout: float = 10.0) -> Frame:
        """Return the next frame of that type and stream; drop what comes before."""
        deadline = time.monotonic() + timeout
        while True:
            got = self.receive(deadline - time.monotonic())
            if got is None:
                raise ConnectionError("the agent has gone")
            if (got.type, got.stream) == (kind, stream):
                return got

    def hello(self, timeout: float = 10.0) -> None:
        nonce = os.urandom(16)
        self.send(HELLO, payload=struct.pack("<H", 1) + nonce)
        ready = self.expect(READY, timeout=timeout)
        assert ready.payload == struct.pack("<H", 1) + nonce

    def control(self, kind: int, payload: bytes, timeout: float = 10.0) -> str | None:
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

    def finish(self, stream: int, timeout: float = 10.0) -> Result:
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
        self, line: str, data: bytes = b"", timeout: float = 10.0, **options: object
    ) -> Result:
        """Run a command with that input, at most one window of it."""
        stream = self.spawn(line, **options)  # type: ignore[arg-type]
        self.write(stream, data)
        self.send(EOF, 0, stream)
        return self.finish(stream, timeout)


def pour(wire: Wire, line: str, size: int, timeout: float = 120.0) -> Result:
    """Send `size` bytes through a command, in and out at once, as fast as it goes."""
    stream = wire.spawn(line)
    wire.sock.setblocking(False)
    chunk = frame(DATA, 0, stream, bytes(range(256)) * 127)
    step = len(chunk) - HEADER.size
    left, credit, received, owed = size, WINDOW, 0, 0
    out = bytearray()
    result: Result | None = None
    deadline = time.monotonic() + timeout
    take: Callable[[], Frame] = wire.pending.popleft
    while result is None:
        while left > 0 and credit >= min(step, left) and len(out) < 1 << 20:
            count = min(step, left)
            out += chunk if count == step else frame(DATA, 0, stream, bytes(count))
            left -= count
            credit -= count
            if not left:
                out += frame(EOF, 0, stream)
        readable, writable, _ = select.select(
            [wire.sock], [wire.sock] if out else [], [], deadline - time.monotonic()
        )
        if not readable and not writable:
            raise TimeoutError(f"stuck: {left} to send, {received} received")
        if writable:
            del out[: wire.sock.send(memoryview(bytes(out[: 1 << 18])))]
        if readable:
            wire.feed(wire.sock.recv(1 << 18))
        while wire.pending:
            got = take()
            if got.type == DATA and got.channel == 1:
                received += len(got.payload)
                owed += len(got.payload)
            elif got.type == CREDIT:
                credit += struct.unpack("<I", got.payload)[0]
            elif got.type == EXIT:
                result = Result(got.payload[0], got.payload[1], "", b"", b"")
        if owed >= WINDOW // 4:
            out += frame(CREDIT, 1, stream, struct.pack("<I", owed))
            owed = 0
    wire.sock.setblocking(True)
    assert received == size, (received, size)
    return result
