"""What bad clients and guests do to qmemman, drawn from a seeded generator."""

from __future__ import annotations

import asyncio
import contextlib


async def act(chance, socket, report):
    """Do one bad thing.

    :param chance: a `random.Random`.
    :param socket: the daemon's.
    :param report: writes bytes as a guest's report.
    """
    await chance.choice((_nonsense, _number, _lines, _half_line, _drip, _vanish))(
        chance, socket, report
    )


async def _nonsense(chance, _socket, report):
    report(chance.randbytes(chance.randrange(40)))


async def _number(chance, _socket, report):
    report(b"%d" % chance.randrange(-(2**10), 2**70))


async def _lines(chance, socket, _report):
    """Ask for random bytes, or for absurd amounts, twice."""
    async with _connection(socket) as (reader, writer):
        amount = b"%d\n" % chance.choice((2**62, 2**70, -1))
        writer.write(chance.choice((chance.randbytes(40) + b"\n", amount)) * 2)
        await reader.read(20)


async def _half_line(chance, socket, _report):
    """Say something that never ends, and wait."""
    async with _connection(socket) as (_reader, writer):
        writer.write(chance.randbytes(chance.randrange(2000)).replace(b"\n", b""))
        await asyncio.sleep(chance.random() / 10)


async def _drip(chance, socket, _report):
    """Write a byte at a time."""
    async with _connection(socket) as (_reader, writer):
        for _ in range(10):
            writer.write(b"1")
            await asyncio.sleep(chance.random() / 50)


async def _vanish(_chance, socket, _report):
    """Ask for memory, and be gone before the answer."""
    async with _connection(socket) as (_reader, writer):
        writer.write(b"1048576\n")
        await writer.drain()


@contextlib.asynccontextmanager
async def _connection(socket):
    with contextlib.suppress(OSError, TimeoutError):
        reader, writer = await asyncio.open_unix_connection(socket)
        try:
            async with asyncio.timeout(300):
                yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
