"""What a guest costs that does not read, or that never ceases to send."""

import asyncio
import functools
import struct

import pytest

from qubes_itests.guest.exc import ProtocolViolation
from qubes_itests.guest.link import connection
from qubes_itests.guest.link.frames import (
    CREDIT_LIMIT,
    FIRST_GUEST_STREAM,
    STREAMS_MAX,
    WINDOW,
    encode,
)
from qubes_itests.guest.link.frames import FrameType as F

pytestmark = pytest.mark.asyncio

#: As much as asyncio reads at once.
CHUNK = 262_144
#: More than this never waits in one connection: what may be there when a stream has
#: its turn, and what that one may send.
BOUND = WINDOW + CREDIT_LIMIT + 65_536


def waiting(agent):
    return agent._connection._transport.get_write_buffer_size()


def listens(agent):
    return agent._connection._transport.is_reading()


async def until(condition):
    async with asyncio.timeout(300):
        while not condition():  # noqa: ASYNC110 - nobody would tell
            await asyncio.sleep(0.001)


def invalid_calls(first, count):
    return b"".join(
        encode(F.CALL, FIRST_GUEST_STREAM + n, payload=b"..\0..\0user\0")
        for n in range(first, first + count)
    )


async def test_what_waits_for_a_guest_does_not_grow_with_its_streams(connect):
    """It is bounded for all of them together, and nothing is lost when it reads."""
    agent, peer = await connect()
    processes = [await agent.spawn("cat") for _ in range(40)]
    for process in processes:
        peer.credit(process.pid, 0, CREDIT_LIMIT - WINDOW)
    peer.send(F.EXIT, processes[-1].pid, payload=b"\0\0")
    await processes[-1].wait()  # all credit before it has come
    for process in processes[:-1]:
        process.stdin.write(bytes(2 * CREDIT_LIMIT))
    assert WINDOW < waiting(agent) < BOUND
    got = dict.fromkeys(range(1, 40), 0)
    while min(got.values()) < CREDIT_LIMIT:
        frame = await peer.receive()
        if frame.type == F.DATA:
            got[frame.stream] += len(frame.payload)
    assert set(got.values()) == {CREDIT_LIMIT}


async def test_credit_of_two_gigabytes_ends_the_connection(connect):
    agent, peer = await connect()
    process = await agent.spawn("cat")
    process.stdin.write(bytes(2 * CREDIT_LIMIT))
    peer.credit(process.pid, 0, 2**31 - WINDOW)
    with pytest.raises(ProtocolViolation, match="bytes of credit"):
        await process.wait()
    assert waiting(agent) == 0


async def test_commands_do_not_wait_for_a_guest_that_does_not_read(connect):
    """Who starts one has a deadline for what it does, and none for that."""
    agent, peer = await connect()
    process = await agent.spawn("cat")
    process.stdin.write(bytes(2 * CREDIT_LIMIT))
    peer.credit(process.pid, 0, CREDIT_LIMIT - WINDOW)
    await until(lambda: waiting(agent) > WINDOW)
    spawned = {(await agent.spawn("x" * 30_000)).pid for _ in range(STREAMS_MAX - 1)}
    peer.send(F.EXIT, process.pid, payload=b"\0\0")
    assert await process.wait() == 0
    while spawned:
        frame = await peer.receive()
        if frame.type == F.SPAWN:
            spawned.discard(frame.stream)


@pytest.mark.parametrize(
    "frame",
    [
        encode(F.CREDIT, 1, payload=struct.pack("<I", 1)),
        encode(F.STOP, 1),
        encode(F.DATA, 1, 1, b"x"),
        encode(F.LOG, payload=b"x"),
    ],
    ids=["CREDIT", "STOP", "DATA", "LOG"],
)
async def test_frames_without_end_leave_time_for_others(connect, tmp_path, frame):
    """Of what comes at once a few milliseconds' worth is done, and all in the end."""
    agent, peer = await connect(log=tmp_path / "log")
    ended, running = await agent.spawn("true"), await agent.spawn("true")
    peer.send(F.EXIT, ended.pid, payload=b"\0\0")
    await ended.wait()
    last = encode(F.EXIT, running.pid, payload=b"\0\x07")
    agent._connection.data_received(frame * (CHUNK // len(frame)) + last)
    assert running.returncode is None
    assert not listens(agent)
    assert await running.wait() == 7
    peer.send(F.LOG, payload=b"listens again")
    await until(lambda: "listens again" in (tmp_path / "log").read_text())
    # a moment later, if this frame was the last of a few milliseconds' worth
    await until(lambda: listens(agent))


async def test_few_calls_are_begun_at_a_time(connect):
    """For what they begin is done at once, in the next turn of the loop."""
    begun = []

    async def on_call(call):
        begun.append(call)
        await call.finish(0)

    agent, peer = await connect(on_call=on_call)
    calls = b"".join(
        encode(F.CALL, FIRST_GUEST_STREAM + n, payload=b"dom0\0s\0user\0")
        for n in range(100)
    )
    agent._connection.data_received(calls)
    await asyncio.sleep(0)
    assert len(begun) < 10
    ended = 0
    while ended < 100:
        ended += (await peer.receive()).type == F.EXIT


@pytest.mark.parametrize("by", ["connection", "handler"])
async def test_a_refused_call_holds_up_its_vm(connect, monkeypatch, by):
    """So that their number is limited; what else it sends waits with them."""
    monkeypatch.setattr(connection, "_REFUSAL", 3600)

    async def on_call(call):
        await call.refuse("no")

    agent, peer = await connect(on_call=on_call)
    if by == "connection":
        peer.writer.write(invalid_calls(0, 10))
    else:
        peer.send(F.CALL, FIRST_GUEST_STREAM, payload=b"dom0\0s\0user\0")
    await peer.expect(F.EXIT)
    peer.send(F.LOG, payload=b"x")
    await until(lambda: not listens(agent))
    later = agent._connection._next_step
    assert later.when() > asyncio.get_running_loop().time() + 3000
    agent._connection._quiet_until = 0.0
    later.cancel()
    agent._connection._go_on()
    if by == "connection":
        await peer.expect(F.EXIT)


async def test_a_guest_that_does_not_read_answers_is_not_listened_to(
    connect, monkeypatch
):
    """Until it reads; then all that it has sent is answered."""
    monkeypatch.setattr(connection, "_REFUSAL", 0)
    monkeypatch.setattr(connection, "_CALLS_A_STEP", 1 << 30)
    monkeypatch.setattr(connection, "_STEP", 1.0)
    monkeypatch.setattr(connection, "_TOO_MUCH", 3 * WINDOW)
    agent, peer = await connect()
    count = 40_000
    peer.writer.write(invalid_calls(0, count))
    # not listening, and no time set for going on
    await until(lambda: not listens(agent) and not agent._connection._next_step)
    assert waiting(agent) < BOUND
    for number in range(count):
        assert (await peer.expect(F.EXIT)).stream == FIRST_GUEST_STREAM + number
    await until(functools.partial(listens, agent))


@pytest.fixture
def whole_steps(monkeypatch):
    """Let a step take all that has come, and hold nobody up."""
    monkeypatch.setattr(connection, "_REFUSAL", 0)
    monkeypatch.setattr(connection, "_CALLS_A_STEP", 1 << 30)
    monkeypatch.setattr(connection, "_STEP", 60.0)


@pytest.fixture
def writes(monkeypatch):
    """Sizes of what connections hand to their transports."""
    sizes = []
    write = asyncio.selector_events._SelectorSocketTransport.write

    def counted(transport, data):
        sizes.append(len(data))
        write(transport, data)

    monkeypatch.setattr(
        asyncio.selector_events._SelectorSocketTransport, "write", counted
    )
    return sizes


@pytest.mark.usefixtures("whole_steps")
async def test_a_step_makes_one_write(connect, writes):
    """For asyncio counts all that wait at each further one."""
    agent, peer = await connect()
    writes.clear()
    agent._connection.data_received(invalid_calls(0, 500))
    assert len(writes) == 1
    for number in range(500):
        assert (await peer.expect(F.EXIT)).stream == FIRST_GUEST_STREAM + number


@pytest.mark.usefixtures("whole_steps")
async def test_what_a_step_gathers_counts_for_the_writers_of_data(connect, writes):
    """Credit for forty streams in one step fills the transport no more than ever."""
    agent, peer = await connect()
    processes = [await agent.spawn("cat") for _ in range(40)]
    for process in processes:
        process.stdin.write(bytes(WINDOW))
    while waiting(agent):
        await peer.receive()
    for process in processes:
        process.stdin.write(bytes(CHUNK))
    writes.clear()
    credit = struct.pack("<I", CHUNK)
    agent._connection.data_received(
        b"".join(encode(F.CREDIT, process.pid, payload=credit) for process in processes)
    )
    assert waiting(agent) < BOUND
    assert max(writes) < 2 * CHUNK


async def test_handlers_that_clean_up_count_as_calls(connect):
    """Their calls have ended, but what they do has not."""

    async def on_call(call):
        await call.finish(0)
        await asyncio.Event().wait()

    _, peer = await connect(on_call=on_call)
    for number in range(STREAMS_MAX + 1):
        stream = FIRST_GUEST_STREAM + number
        peer.send(F.CALL, stream, payload=b"dom0\0s\0user\0")
        frame = await peer.skip_to(F.EOF if number < STREAMS_MAX else F.EXIT)
        if number < STREAMS_MAX:
            frame = await peer.expect(F.EXIT)
            assert frame.payload[:2] == b"\0\0"
    assert frame.payload[:2] == b"\2\x7e"
    assert b"too many calls" in frame.payload
