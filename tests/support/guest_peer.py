"""The other end of an agent's connection, played by a test, frame by frame."""

from __future__ import annotations

import asyncio
import socket
import struct
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from qubes_itests.guest.link.agent import GuestAgent
from qubes_itests.guest.link.frames import HEADER, FrameType, encode

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Frame(NamedTuple):
    type: int
    channel: int
    stream: int
    payload: bytes


class SocketDomain:
    """As much of a domain as an agent needs: its channel is an end of a socket pair."""

    def __init__(self, name: str, end: socket.socket, console: Path) -> None:
        self.spec = SimpleNamespace(name=name)
        self._end = end
        self._console = console
        self.panicked = self.ends_with_agent = False

    def end_channel_with_agent(self) -> None:
        self.ends_with_agent = True

    async def open_channel(
        self, protocol: Callable[[], asyncio.BaseProtocol], *, timeout: float
    ) -> Any:
        assert timeout > 0
        self._end.setblocking(False)
        loop = asyncio.get_running_loop()
        return await loop.create_unix_connection(protocol, sock=self._end)

    def console_log(self) -> Path:
        return self._console


class Peer:
    """A guest that does what its test says."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    async def open(self) -> None:
        self.reader, self.writer = await asyncio.open_unix_connection(sock=self._end)

    def send(
        self, kind: int, stream: int = 0, channel: int = 0, payload: bytes = b""
    ) -> None:
        self.writer.write(encode(FrameType(kind), stream, channel, payload))

    def credit(self, stream: int, channel: int, size: int) -> None:
        self.send(FrameType.CREDIT, stream, channel, struct.pack("<I", size))

    async def receive(self) -> Frame:
        async with asyncio.timeout(300):
            header = await self.reader.readexactly(HEADER.size)
            kind, channel, length, stream = HEADER.unpack(header)
            payload = await self.reader.readexactly(length)
        return Frame(kind, channel, stream, payload)

    async def expect(self, kind: int) -> Frame:
        frame = await self.receive()
        assert frame.type == kind, frame
        return frame

    async def skip_to(self, kind: int) -> Frame:
        """Return the next frame of a kind; what a reader sends may come before."""
        while (frame := await self.receive()).type in (
            FrameType.STOP,
            FrameType.CREDIT,
        ):
            pass
        assert frame.type == kind, frame
        return frame

    async def at_end(self) -> bool:
        async with asyncio.timeout(300):
            try:
                return await self.reader.read(1) == b""
            except ConnectionError:
                return True

    async def greet(self) -> None:
        hello = await self.expect(FrameType.HELLO)
        self.send(FrameType.READY, payload=hello.payload)

    def close(self) -> None:
        self.writer.close()


async def connect_pair(directory: Path, name: str = "vm", **kwargs: Any) -> Any:
    """Return an agent and the peer that plays its guest, past HELLO and READY."""
    ours, theirs = socket.socketpair()
    peer = Peer(theirs)
    await peer.open()
    domain = SocketDomain(name, ours, directory / "console.log")
    connecting = asyncio.ensure_future(
        GuestAgent.connect(domain, timeout=300, **kwargs)  # type: ignore[arg-type]
    )
    await peer.greet()
    return await connecting, peer
