"""Who takes a socket, and what is left of clients when the server goes."""

import asyncio
import contextlib
import fcntl
import os
import resource

import pytest

from qubes_itests import unix_server
from qubes_itests.exc import DeadlineError, HarnessError
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
        async with asyncio.timeout(300):
            assert await reader.read() == b""
        writer.close()

    asyncio.run(program())


def test_two_take_turns_and_wait_for_each_other(tmp_path):
    async def program():
        lock = os.open(tmp_path, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        beginning = asyncio.create_task(Echo(tmp_path / "socket").__aenter__())
        done, _ = await asyncio.wait([beginning], timeout=0.1)
        assert not done
        os.close(lock)
        async with asyncio.timeout(300):
            server = await beginning
        with pytest.raises(HarnessError, match="is served already"):
            await Echo(server.path).__aenter__()
        await server.__aexit__()

    asyncio.run(program())


def test_a_lock_that_nobody_gives_back_is_not_waited_for(tmp_path, monkeypatch):
    async def program():
        with pytest.raises(
            DeadlineError, match=f"no lock of {tmp_path}, which another"
        ):
            await Echo(tmp_path / "socket").__aenter__()

    monkeypatch.setattr(unix_server, "_TURN_TIMEOUT", 0.1)
    lock = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    asyncio.run(program())
    os.close(lock)


@pytest.mark.parametrize("limit", [64, 512, 1024, 1 << 20, resource.RLIM_INFINITY])
def test_clients_get_half_of_the_descriptors_however_few(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (limit, limit))
    server = Echo(tmp_path / "socket")
    server.most = 256
    known = {64: 32, 512: 256}
    assert server.capacity() == known.get(limit, 256)


class Watching(UnixServer):
    """Sends more than the kernel takes, and waits until the client is gone."""

    def __init__(self, path, *, late):
        super().__init__(path)
        self.gone, self.waits, self.calls = asyncio.Event(), asyncio.Event(), 0
        self._late = late

    def note(self):
        self.calls += 1
        self.gone.set()

    async def converse(self, client):
        async with client.request():
            await client.reader.read()
        client.writer.write(bytes(4 << 20))
        if self._late:
            self.waits.set()
            async with asyncio.timeout(300):
                with contextlib.suppress(OSError):
                    await client.writer.wait_closed()
        with client.watched(self.note):
            self.waits.set()
            await self.gone.wait()


@pytest.mark.parametrize("late", [False, True])
def test_who_goes_with_unread_data_is_noticed_once(tmp_path, late):
    """Our end is closed when its buffer cannot be sent: epoll may know nothing."""

    async def program():
        async with Watching(tmp_path / "socket", late=late) as server:
            asyncio.get_running_loop().remove_reader(server.epoll.fileno())
            _reader, writer = await connected(server)
            writer.write_eof()
            await server.waits.wait()
            writer.transport.abort()
            async with asyncio.timeout(300):
                await server.gone.wait()
            await asyncio.sleep(0)
            assert server.calls == 1
            assert not server.watched

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
