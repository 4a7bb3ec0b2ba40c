"""Who takes a socket, and what is left of clients when the server goes."""

import asyncio
import fcntl
import os

import pytest

from qubes_itests.exc import HarnessError
from qubes_itests.unix_server import UnixServer


class Echo(UnixServer):
    """Answers what it is sent, once."""

    most = 2
    timeout = 0.05
    farewell = b"full"

    async def converse(self, client):
        async with client.request():
            data = await client.reader.readline()
        await client.answer(data)
        await client.reader.read()


async def connected(server):
    return await asyncio.open_unix_connection(server.path)


async def said(server, data):
    """Return what a client has been sent when its connection is closed."""
    reader, writer = await connected(server)
    writer.write(data)
    try:
        return await reader.read()
    finally:
        writer.close()


def test_who_is_silent_or_one_too_many_goes_and_the_others_are_served(tmp_path):
    async def program():
        async with Echo(tmp_path / "socket") as server:
            assert await said(server, b"never ended") == b""
            server.timeout = 30
            first, second = await connected(server), await connected(server)
            second[1].write(b"hello\n")
            assert await second[0].readline() == b"hello\n"
            third = await connected(server)
            assert await first[0].read() == b"full"
            third[1].write(b"goodbye\n")
            assert await third[0].readline() == b"goodbye\n"
            # all that are there have made their requests
            assert await said(server, b"") == b"full"
            for _reader, writer in (first, second, third):
                writer.close()
        assert not server.clients
        assert not server.path.exists()

    asyncio.run(program())


def test_the_end_of_the_server_closes_what_it_has_just_accepted(tmp_path):
    """A task that is cancelled before its first step cleans nothing up."""

    async def program():
        came = asyncio.Event()

        class Cancelled(Echo):
            def _connected(self, reader, writer):
                super()._connected(reader, writer)
                next(iter(self.clients)).task.cancel()
                came.set()

        async with Cancelled(tmp_path / "socket") as server:
            reader, writer = await connected(server)
            await came.wait()
        async with asyncio.timeout(10):
            assert await reader.read() == b""
        writer.close()

    asyncio.run(program())


def test_two_do_not_take_a_socket_at_once(tmp_path):
    async def program():
        lock = os.open(tmp_path, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(HarnessError, match="another process locks"):
            await Echo(tmp_path / "socket").__aenter__()
        os.close(lock)
        async with Echo(tmp_path / "socket") as server:
            with pytest.raises(HarnessError, match="is served already"):
                await Echo(server.path).__aenter__()

    asyncio.run(program())


def test_a_server_that_ends_slowly_leaves_the_socket_of_the_next(tmp_path):
    async def program():
        begun, ending, may_end = asyncio.Event(), asyncio.Event(), asyncio.Event()

        class Slow(Echo):
            async def converse(self, client):
                begun.set()
                try:
                    await client.reader.read()
                finally:
                    ending.set()
                    await may_end.wait()

        first = await Slow(tmp_path / "socket").__aenter__()
        _reader, writer = await connected(first)
        await begun.wait()
        end = asyncio.create_task(first.__aexit__())
        await ending.wait()
        async with Echo(first.path) as second:
            second.timeout = 30
            may_end.set()
            await end
            reader, other = await connected(second)
            other.write(b"hello\n")
            assert await reader.readline() == b"hello\n"
        for each in (writer, other):
            each.close()

    asyncio.run(program())
