"""Processes: streams, credit, and back pressure, frame by frame."""

import asyncio
import socket
import struct

import pytest

from qubes_itests.guest.exc import GuestGoneError
from qubes_itests.guest.link.frames import PAYLOAD_MAX, WINDOW, encode
from qubes_itests.guest.link.frames import FrameType as F

pytestmark = pytest.mark.asyncio


def send_data(peer, size, channel=1):
    for start in range(0, size, PAYLOAD_MAX):
        peer.send(F.DATA, 1, channel, bytes(min(PAYLOAD_MAX, size - start)))


async def spawn(connect, command="cat", **kwargs):
    agent, peer = await connect()
    process = await agent.spawn(command, **kwargs)
    return process, peer, await peer.expect(F.SPAWN)


async def total_credit(peer, wanted):
    given = 0
    while given < wanted:
        frame = await peer.expect(F.CREDIT)
        given += struct.unpack("<I", frame.payload)[0]
    return given


async def test_spawn_says_what_to_run(connect):
    _, _, frame = await spawn(
        connect, "echo ü", user="root", environment={"A": "1", "B": "two"}
    )
    assert frame.stream == 1
    assert frame.payload == "command\0root\0echo ü\0\0A=1\0B=two\0".encode()


async def test_services_say_who_calls(connect):
    agent, peer = await connect()
    await agent.spawn_service("qubes.Ping+x", source="work")
    frame = await peer.expect(F.SPAWN)
    assert frame.payload == b"service\0\0qubes.Ping+x\0work\0"


async def test_the_guest_sends_no_more_than_a_window_until_somebody_reads(connect):
    """What is not read is not given back; what is read is, in full."""
    process, peer, _ = await spawn(connect)
    send_data(peer, WINDOW)
    peer.send(F.DATA, 1, 2, b"on another channel")
    assert await process.stderr.read(100) == b"on another channel"
    # all came in before that, and no credit went out but for stderr
    assert len(process.stdout._buffer) == WINDOW
    reading = asyncio.ensure_future(process.stdout.readexactly(WINDOW))
    assert len(await reading) == WINDOW
    assert await total_credit(peer, WINDOW) == WINDOW


async def test_reading_more_than_a_window_at_once(connect):
    """`readexactly` of more than fits a window must not wait for ever."""
    process, peer, _ = await spawn(connect)
    size = 3 * WINDOW
    reading = asyncio.ensure_future(process.stdout.readexactly(size))
    credit, left = WINDOW, size
    while left:
        part = min(PAYLOAD_MAX, left, credit)
        if not part:
            credit += await total_credit(peer, 1)
            continue
        peer.send(F.DATA, 1, 1, bytes(part))
        credit, left = credit - part, left - part
    assert len(await asyncio.wait_for(reading, 300)) == size


async def test_a_fast_reader_keeps_the_guest_going(connect):
    """Over many windows, the credit outstanding never runs dry for good."""
    process, peer, _ = await spawn(connect)
    reading = asyncio.ensure_future(process.stdout.read())
    credit, left = WINDOW, 20 * WINDOW + 123
    while left:
        part = min(PAYLOAD_MAX, left, credit)
        if part:
            peer.send(F.DATA, 1, 1, bytes(part))
            credit, left = credit - part, left - part
        else:
            credit += await total_credit(peer, 1)
    peer.send(F.EOF, 1, 1)
    assert len(await asyncio.wait_for(reading, 300)) == 20 * WINDOW + 123


async def test_the_host_sends_no_more_than_its_credit(connect):
    process, peer, _ = await spawn(connect)
    data = bytes(range(256)) * 4096
    process.stdin.write(data)
    process.stdin.write_eof()
    got = b""
    while len(got) < WINDOW:
        got += (await peer.expect(F.DATA)).payload
    assert len(got) == WINDOW
    draining = asyncio.ensure_future(process.stdin.drain())
    await asyncio.sleep(0)
    assert not draining.done()
    peer.credit(1, 0, 10)
    assert len((await peer.expect(F.DATA)).payload) == 10
    peer.credit(1, 0, len(data))
    while len(got) < len(data) - 10:
        got += (await peer.expect(F.DATA)).payload
    await draining
    await peer.expect(F.EOF)
    await process.stdin.wait_closed()


async def test_changing_a_buffer_after_write_changes_nothing(connect):
    process, peer, _ = await spawn(connect)
    process.stdin.write(bytes(WINDOW))
    while (frame := await peer.receive()).payload and len(frame.payload) == PAYLOAD_MAX:
        pass
    buffer = bytearray(b"first")
    process.stdin.write(buffer)
    buffer[:] = b"other"
    peer.credit(1, 0, 5)
    assert (await peer.expect(F.DATA)).payload == b"first"


async def test_stop_of_the_guest_breaks_the_pipe(connect):
    process, peer, _ = await spawn(connect)
    process.stdin.write(bytes(2 * WINDOW))
    draining = asyncio.ensure_future(process.stdin.drain())
    peer.send(F.STOP, 1, 0)
    with pytest.raises(BrokenPipeError):
        await draining
    assert process.stdin.is_closing()
    process.stdin.write(b"dropped")
    peer.send(F.EXIT, 1, payload=b"\0\0")
    assert await process.communicate(b"ignored as asyncio does") == (b"", b"")


async def test_stop_of_the_host_is_sent_once_and_drops_what_comes(connect):
    process, peer, _ = await spawn(connect)
    process.stdout.stop()
    process.stdout.stop()
    frame = await peer.expect(F.STOP)
    assert (frame.stream, frame.channel) == (1, 1)
    peer.send(F.DATA, 1, 1, b"late")
    peer.send(F.EXIT, 1, payload=b"\0\0")
    assert await process.wait() == 0
    assert await process.stdout.read() == b""


async def test_eof_and_exit_in_either_order(connect):
    """EXIT ends what has not been closed: somebody in the background may hold it."""
    process, peer, _ = await spawn(connect)
    peer.send(F.DATA, 1, 1, b"out")
    peer.send(F.EOF, 1, 1)
    peer.send(F.DATA, 1, 2, b"err")
    peer.send(F.EXIT, 1, payload=b"\0\7")
    assert await process.communicate() == (b"out", b"err")
    assert process.returncode == 7


@pytest.mark.parametrize(
    ("payload", "status"), [(b"\0\0", 0), (b"\0\xff", 255), (b"\1\x0f", -15)]
)
async def test_exit_statuses_are_those_of_subprocess(connect, payload, status):
    process, peer, _ = await spawn(connect)
    assert process.returncode is None
    peer.send(F.EXIT, 1, payload=payload)
    assert await process.wait() == status
    assert process.returncode == status


async def test_what_does_not_start_says_why(connect):
    process, peer, _ = await spawn(connect)
    peer.send(F.EXIT, 1, payload=b"\2\x7fthere is no user nobody")
    _, stderr = await process.communicate()
    assert process.returncode == 127
    assert stderr == b"vm: there is no user nobody\n"
    assert process.failure == "there is no user nobody"


async def test_signals(connect):
    process, peer, _ = await spawn(connect)
    process.terminate()
    process.kill()
    assert [(await peer.expect(F.SIGNAL)).payload for _ in range(2)] == [b"\x0f", b"\t"]
    peer.send(F.EXIT, 1, payload=b"\1\x0f")
    await process.wait()
    with pytest.raises(ProcessLookupError):
        process.terminate()


async def test_write_after_eof(connect):
    process, _, _ = await spawn(connect)
    process.stdin.close()
    with pytest.raises(RuntimeError):
        process.stdin.write(b"x")


async def lose(peer, process, data=b"", channel=1):
    """Have the guest write, and go away; its bytes are not read before."""
    if data:
        peer.send(F.DATA, process.pid, channel, data)
    peer.close()
    with pytest.raises(GuestGoneError):
        await process.wait()


async def test_what_a_guest_wrote_before_it_went_is_read_first(connect):
    """Its last words say why, most often."""
    process, peer, _ = await spawn(connect)
    await lose(peer, process, b"one\ntwo\nrest")
    assert await process.stdout.readline() == b"one\n"
    assert await process.stdout.read(2) == b"tw"
    assert await process.stdout.readexactly(2) == b"o\n"
    for too_much in (process.stdout.readline(), process.stdout.readexactly(5)):
        with pytest.raises(GuestGoneError):
            await too_much
    # nor does who reads to an end that never comes have it for nothing
    with pytest.raises(GuestGoneError):
        await process.stdout.read()
    assert await process.stdout.read(100) == b"rest"
    for again in (process.stdout.read(), process.stdout.readline()):
        with pytest.raises(GuestGoneError):
            await again


async def test_who_waits_for_more_than_there_is_learns_that_the_guest_went(connect):
    process, peer, _ = await spawn(connect)
    waiting = [
        asyncio.ensure_future(process.stdout.readexactly(10)),
        asyncio.ensure_future(process.stderr.read(1)),
    ]
    await asyncio.sleep(0)
    await lose(peer, process, b"some")
    for reading in waiting:
        with pytest.raises(GuestGoneError):
            await reading


async def test_communicate_has_taken_what_came_before_the_guest_went(connect):
    process, peer, _ = await spawn(connect)
    await lose(peer, process, b"why", channel=2)
    with pytest.raises(GuestGoneError):
        await process.communicate()
    assert process.taken[1] == b"why"


async def test_merged_outputs_are_read_before_the_guest_went(connect):
    process, peer, _ = await spawn(connect)
    process.merge()
    await lose(peer, process, b"why", channel=2)
    assert await process.stdout.read(10) == b"why"
    with pytest.raises(GuestGoneError):
        await process.stdout.read(10)


async def test_merged_outputs_that_are_read_late_are_read_to_the_end(connect):
    """One has ended long before the other, which the reader holds up, may go on."""
    process, peer, _ = await spawn(connect)
    process.merge()
    for _ in range(WINDOW // PAYLOAD_MAX):
        peer.send(F.DATA, process.pid, 2, b"x" * PAYLOAD_MAX)
    await lose(peer, process)
    for _ in range(10):  # until all that does not wait for the reader is done
        await asyncio.sleep(0)
    left = WINDOW // PAYLOAD_MAX * PAYLOAD_MAX
    while left:
        left -= len(await process.stdout.read(10_000))
    with pytest.raises(GuestGoneError):
        await process.stdout.read(1)


async def test_a_command_that_did_not_start_may_have_closed_its_outputs(connect):
    process, peer, _ = await spawn(connect)
    peer.send(F.EOF, process.pid, 2)
    peer.send(F.EXIT, process.pid, payload=b"\2\x7fnot there")
    async with asyncio.timeout(300):
        assert await process.wait() == 127
    assert process.failure == "not there"
    assert await process.stderr.read() == b""


def break_off(peer):
    """Have writes to the guest fail at once; what it has sent is still to be read."""
    peer.writer.transport.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


async def test_last_words_are_read_though_a_write_fails_before(connect):
    process, peer, _ = await spawn(connect)
    peer.send(F.DATA, process.pid, 2, b"why")
    break_off(peer)
    process.stdin.write(b"more")  # asyncio closes the connection for this
    assert await process.stderr.read(3) == b"why"
    with pytest.raises(GuestGoneError):
        await process.wait()


async def test_what_waits_for_its_turn_is_read_though_a_write_fails(connect):
    """Frames of which some have come, but were too many for a few milliseconds."""
    process, peer, _ = await spawn(connect)
    size = 10_000
    peer.writer.write(encode(F.DATA, process.pid, 1, b"x") * size)
    while process.stdout.received in {0, size}:
        await asyncio.sleep(0)
        assert process.stdout.received < size
    break_off(peer)
    process.stdin.write(b"more")
    assert await process.stdout.readexactly(size) == b"x" * size
    with pytest.raises(GuestGoneError):
        await process.wait()
