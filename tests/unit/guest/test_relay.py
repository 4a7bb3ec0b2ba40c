"""Calls from one guest to a process in another, both ends played by the test."""

import asyncio
import struct

import pytest

from qubes_itests.guest.exc import GuestGoneError
from qubes_itests.guest.link.calls import ServiceCall
from qubes_itests.guest.link.frames import FIRST_GUEST_STREAM, PAYLOAD_MAX, WINDOW
from qubes_itests.guest.link.frames import FrameType as F
from qubes_itests.guest.link.relay import relay

pytestmark = pytest.mark.asyncio

CALL = FIRST_GUEST_STREAM


class Pair:
    """A caller's peer, the target's peer, and the call between them."""

    def __init__(self, connect):
        self.connect = connect

    async def open(self):
        self.done = asyncio.get_running_loop().create_future()
        self.target_agent, self.target = await self.connect("target")
        self.source_agent, self.source = await self.connect(
            "source", on_call=self.on_call
        )
        payload = b"target\0test.Service+x\0user\0"
        self.source.send(F.CALL, CALL, payload=payload)
        await self.target.expect(F.SPAWN)
        return self

    async def on_call(self, call: ServiceCall):
        assert (call.vm, call.target, call.service) == (
            "source",
            "target",
            "test.Service+x",
        )
        process = await self.target_agent.spawn_service(call.service, source=call.vm)
        try:
            self.done.set_result(await relay(call, process))
        except BaseException:
            self.done.cancel()
            raise


@pytest.fixture
def pair(connect):
    return Pair(connect).open


def assert_all_text(records):
    """Pytest keeps the records of a test; an error or a call would keep all its VMs."""
    assert {type(value) for record in records for value in record.args} == {str}


async def test_bytes_ends_and_status_reach_the_other_side(pair):
    pair = await pair()
    pair.source.send(F.DATA, CALL, 0, b"request")
    pair.source.send(F.EOF, CALL, 0)
    assert (await pair.target.expect(F.DATA)).payload == b"request"
    await pair.target.expect(F.EOF)
    pair.target.send(F.DATA, 1, 1, b"answer")
    frame = await pair.source.expect(F.DATA)
    assert (frame.stream, frame.channel, frame.payload) == (CALL, 1, b"answer")
    pair.target.send(F.DATA, 1, 1, b", the end")
    pair.target.send(F.DATA, 1, 2, b"a complaint")
    pair.target.send(F.EXIT, 1, payload=b"\0\5")
    assert (await pair.source.expect(F.DATA)).payload == b", the end"
    await pair.source.skip_to(F.EOF)
    assert (await pair.source.skip_to(F.EXIT)).payload == b"\0\5"
    assert await pair.done == 5


async def test_a_service_that_a_signal_killed(pair):
    pair = await pair()
    pair.target.send(F.EXIT, 1, payload=b"\1\x09")
    await pair.source.skip_to(F.EOF)
    assert (await pair.source.skip_to(F.EXIT)).payload == bytes([0, 128 + 9])


async def test_a_service_that_is_not_there(pair):
    pair = await pair()
    pair.target.send(F.EXIT, 1, payload=b"\2\x7fno such service")
    await pair.source.skip_to(F.EOF)
    assert (await pair.source.skip_to(F.EXIT)).payload == b"\2\x7fno such service"


async def take(peer, size):
    got = 0
    while got < size:
        got += len((await peer.skip_to(F.DATA)).payload)
    return got


async def pour(peer, stream, channel, size, least):
    """Send bytes as credit allows, until all are sent or no more credit comes.

    :param least: until so many are sent, credit comes, however slow this machine is.
    """
    credit, left = WINDOW, size
    while left:
        part = min(PAYLOAD_MAX, credit, left)
        if part:
            peer.send(F.DATA, stream, channel, bytes(part))
            credit, left = credit - part, left - part
            continue
        try:
            async with asyncio.timeout(0.3 if size - left >= least else None):
                frame = await peer.receive()
        except TimeoutError:
            break
        assert frame.type == F.CREDIT
        credit += struct.unpack("<I", frame.payload)[0]
    return size - left


async def test_output_all_arrives_before_the_status(pair):
    """The caller takes a window and no more: EXIT waits until the rest is sent."""
    pair = await pair()
    size = WINDOW + 2 * PAYLOAD_MAX
    assert await pour(pair.target, 1, 1, size, size) == size
    pair.target.send(F.EXIT, 1, payload=b"\0\0")
    # that the service has ended may be told before all of the window is there
    frames, got = [], 0
    while got < WINDOW or F.STOP not in {frame.type for frame in frames}:
        frames.append(await pair.source.receive())
        got += len(frames[-1].payload) * (frames[-1].type == F.DATA)
    assert {frame.type for frame in frames} == {F.DATA, F.STOP}
    assert got == WINDOW
    assert not pair.done.done()
    pair.source.credit(CALL, 1, WINDOW)
    assert await take(pair.source, size - WINDOW) == size - WINDOW
    await pair.source.expect(F.EOF)
    await pair.source.expect(F.EXIT)


async def test_a_slow_target_holds_up_the_source(pair):
    """Between two windows the host keeps a bounded amount, whatever a caller sends."""
    pair = await pair()
    # the target's window and the caller's, and what is under way between them
    sent = await pour(pair.source, CALL, 0, 100 * WINDOW, 2 * WINDOW)
    assert 2 * WINDOW <= sent <= 4 * WINDOW
    pair.target.credit(1, 0, WINDOW)
    assert (await pair.source.receive()).type == F.CREDIT


async def test_a_target_that_stops_reading(pair):
    """STOP is passed on at once, though no byte is under way."""
    pair = await pair()
    pair.target.send(F.STOP, 1, 0)
    frame = await pair.source.expect(F.STOP)
    assert (frame.stream, frame.channel) == (CALL, 0)


async def test_a_caller_that_stops_reading(pair):
    pair = await pair()
    pair.source.send(F.STOP, CALL, 1)
    frame = await pair.target.expect(F.STOP)
    assert (frame.stream, frame.channel) == (1, 1)
    pair.target.send(F.EXIT, 1, payload=b"\1\x0d")
    assert (await pair.source.skip_to(F.EXIT)).payload == bytes([0, 128 + 13])


async def test_a_target_that_closes_its_output_and_goes_on(pair):
    pair = await pair()
    pair.target.send(F.EOF, 1, 1)
    await pair.source.skip_to(F.EOF)
    pair.source.send(F.DATA, CALL, 0, b"more")
    assert (await pair.target.expect(F.DATA)).payload == b"more"


async def test_the_callers_guest_goes_away(pair):
    """The process sees its peer hang up; nothing else happens to its guest."""
    pair = await pair()
    pair.source.close()
    types = {(await pair.target.receive()).type for _ in range(3)}
    assert types == {F.EOF, F.STOP}
    other = await pair.target_agent.spawn("true")
    await pair.target.expect(F.SPAWN)
    pair.target.send(F.EXIT, 2, payload=b"\0\0")
    assert await other.wait() == 0


async def test_the_targets_guest_goes_away(pair, caplog):
    pair = await pair()
    pair.target.close()
    await pair.source.skip_to(F.EOF)
    assert (await pair.source.skip_to(F.EXIT)).payload == b"\0\xff"
    assert await pair.done == 255
    assert_all_text(caplog.records)


async def test_what_the_target_wrote_before_its_guest_went_away_arrives(pair):
    pair = await pair()
    pair.target.send(F.DATA, 1, 1, b"last words")
    pair.target.close()
    assert (await pair.source.skip_to(F.DATA)).payload == b"last words"
    await pair.source.skip_to(F.EOF)
    assert (await pair.source.skip_to(F.EXIT)).payload == b"\0\xff"


async def test_a_handler_that_fails_or_forgets(connect, caplog):
    """The caller always gets a status, and the host's log says what happened."""

    async def on_call(call):
        if call.service == "fails":
            raise ValueError("a defect")
        if call.service == "loses":
            raise GuestGoneError("target", "it stopped")

    caplog.set_level("INFO", "qubes_itests.guest")
    _, peer = await connect(on_call=on_call)
    peer.send(F.CALL, CALL, payload=b"\0fails\0user\0")
    peer.send(F.CALL, CALL + 1, payload=b"\0forgets\0user\0")
    peer.send(F.CALL, CALL + 2, payload=b"\0loses\0user\0")
    assert (await peer.expect(F.EXIT)).payload[:2] == b"\2\x7e"
    assert (await peer.expect(F.EXIT)).payload[:2] == b"\2\x7e"
    assert (await peer.expect(F.EXIT)).payload[:2] == b"\2\x7e"
    assert "a defect" in caplog.text
    assert "not ended by its handler" in caplog.text
    assert "it stopped" in caplog.text
    assert_all_text(caplog.records)


async def test_a_host_service_reads_writes_and_finishes(connect):
    async def on_call(call):
        data = await call.stdin.read()
        call.stdout.write(data.upper())
        await call.finish(3)
        await call.finish(4)

    agent, peer = await connect(on_call=on_call)
    peer.send(F.CALL, CALL, payload=b"dom0\0up\0user\0")
    peer.send(F.DATA, CALL, 0, b"abc")
    peer.send(F.EOF, CALL, 0)
    assert (await peer.expect(F.DATA)).payload == b"ABC"
    await peer.expect(F.EOF)
    assert (await peer.expect(F.EXIT)).payload == b"\0\3"
    assert not agent._connection._streams
