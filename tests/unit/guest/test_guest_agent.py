"""The agent's connection: requests, deadlines, and how it ends."""

import asyncio
import struct

import pytest
from conditions import deadlines
from guest_peer import Peer, SocketDomain

from qubes_itests.exc import DeadlineError
from qubes_itests.guest.exc import (
    GuestError,
    GuestGoneError,
    GuestRefusedError,
    ProtocolViolation,
)
from qubes_itests.guest.link.agent import GuestAgent, Identity
from qubes_itests.guest.link.connection import LIMIT, AgentLog
from qubes_itests.guest.link.frames import FIRST_GUEST_STREAM, STREAMS_MAX
from qubes_itests.guest.link.frames import FrameType as F

pytestmark = pytest.mark.asyncio

DEVICES = "/qubes-block-devices"


async def test_a_guest_that_never_answers(tmp_path, socketpair):
    """The error names what was waited for, and shows the console's end."""
    ours, _theirs = socketpair
    console = tmp_path / "console.log"
    console.write_bytes(b"old\n" * 2000 + b"Kernel panic\x1b[0m - not syncing\r\n")
    with pytest.raises(DeadlineError) as caught:
        await GuestAgent.connect(SocketDomain("vm", ours, console), timeout=0.05)
    assert "answer of the agent of VM vm" in str(caught.value)
    assert "Kernel panic" in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 2000


async def test_a_guest_that_dies_before_it_answers(tmp_path, socketpair):
    ours, theirs = socketpair
    theirs.close()
    domain = SocketDomain("vm", ours, tmp_path / "none")
    with pytest.raises(GuestGoneError, match="VM vm"):
        await GuestAgent.connect(domain, timeout=300)


async def test_a_guest_that_misses_the_first_hello(tmp_path, socketpair):
    """HELLO comes again until the guest answers, and then no more."""
    ours, theirs = socketpair
    peer = Peer(theirs)
    await peer.open()
    domain = SocketDomain("vm", ours, tmp_path / "none")
    connecting = asyncio.ensure_future(GuestAgent.connect(domain, timeout=300))
    first = await peer.expect(F.HELLO)
    assert await peer.expect(F.HELLO) == first
    peer.send(F.READY, payload=first.payload)
    agent = await connecting
    await agent.spawn("true")
    await peer.expect(F.SPAWN)
    await agent.close()
    peer.close()


async def test_a_guest_that_answers_garbage(tmp_path, socketpair):
    ours, theirs = socketpair
    theirs.send(b"login: ")
    theirs.send(b"password: ")
    domain = SocketDomain("vm", ours, tmp_path / "none")
    with pytest.raises(ProtocolViolation, match="VM vm"):
        await GuestAgent.connect(domain, timeout=300)


async def test_enter_tells_who_the_vm_is(connect):
    agent, peer = await connect()
    identity = Identity(
        name="work", root="xvda", db={"/qubes-vm-type": "AppVM"}, services=("cups",)
    )
    entering = asyncio.ensure_future(agent.enter(identity, timeout=8))
    frame = await peer.expect(F.ENTER)
    peer.send(F.DONE)
    assert not agent.domain.ends_with_agent
    await entering
    assert agent.domain.ends_with_agent
    pairs = dict(p.decode().split("=", 1) for p in frame.payload[:-1].split(b"\0"))
    assert len(pairs.pop("seed")) == 128
    assert int(pairs.pop("time")) > 1_700_000_000 * 10**9
    assert pairs == {
        "name": "work",
        "root": "xvda",
        "root-mode": "rw",
        "default-user": "user",
        "init": "agent",
        "deadline": "6",
        "db:/qubes-vm-type": "AppVM",
        "service:cups": "1",
    }


async def test_every_start_has_a_seed_of_its_own():
    identity = Identity(name="work", root="xvda")
    payloads = {identity.payload(1) for _ in range(3)}
    seeds = {p.split(b"seed=")[1].split(b"\0")[0] for p in payloads}
    assert len(seeds) == 3


async def test_a_request_that_fails(connect):
    agent, peer = await connect()
    writing = asyncio.ensure_future(agent.write_db("/x", "1"))
    await peer.expect(F.DB_WRITE)
    peer.send(F.FAILED, payload=b"the table is full")
    with pytest.raises(GuestRefusedError, match="the table is full"):
        await writing


async def test_a_disk_is_waited_for(connect):
    agent, peer = await connect()
    waiting = asyncio.ensure_future(agent.wait_for_disk("xvdi", "there", timeout=300))
    for answer in (F.FAILED, F.FAILED, F.DONE):
        assert (await peer.expect(F.DISK)).payload == b"xvdi\0there\0"
        assert not waiting.done()
        peer.send(answer, payload=b"the disk is not there" * (answer is F.FAILED))
    await waiting


async def test_a_disk_that_does_not_come_is_told_with_what_the_guest_says(connect):
    agent, peer = await connect()
    for seconds in deadlines(0.05):
        call = agent.wait_for_disk("xvdi", "gone", timeout=seconds)
        waiting = asyncio.ensure_future(call)
        await peer.expect(F.DISK)
        peer.send(F.FAILED, payload=b"the disk is still there")
        with pytest.raises(DeadlineError, match=r"xvdi .*gone") as caught:
            await waiting
        if "still there" in str(caught.value):
            return
    raise caught.value


async def test_a_clock_that_is_not_set_is_told(connect):
    agent, peer = await connect()
    setting = asyncio.ensure_future(agent.set_clock(2**60 + 1, timeout=300))
    assert (await peer.expect(F.CLOCK)).payload == (2**60 + 1).to_bytes(8, "little")
    peer.send(F.FAILED, payload=b"not permitted")
    with pytest.raises(GuestRefusedError, match="not permitted"):
        await setting


@pytest.mark.parametrize("leave", [True, False])
async def test_a_guest_is_told_what_becomes_of_its_commands(connect, leave):
    agent, peer = await connect()
    telling = asyncio.ensure_future(agent.leave_running(leave=leave, timeout=300))
    assert (await peer.expect(F.LEAVE)).payload == bytes([leave])
    peer.send(F.DONE)
    await telling
    with pytest.raises(DeadlineError, match="answer to LEAVE"):
        await agent.leave_running(leave=leave, timeout=0.01)


async def test_the_next_request_does_not_get_the_answer_of_one_given_up(connect):
    agent, peer = await connect()
    first = asyncio.ensure_future(agent.write_db("/first", "1"))
    await peer.expect(F.DB_WRITE)
    first.cancel()
    second = asyncio.ensure_future(agent.remove_db("/second"))
    await asyncio.sleep(0)
    peer.send(F.FAILED, payload=b"for the first")
    await peer.expect(F.DB_REMOVE)
    peer.send(F.DONE)
    await second


async def test_what_is_pending_fails_when_the_guest_goes(connect):
    agent, peer = await connect()
    process = await agent.spawn("cat")
    request = asyncio.ensure_future(agent.write_db("/x", "1"))
    waits = [
        asyncio.ensure_future(wait)
        for wait in (process.wait(), process.stdout.read(), process.stderr.readline())
    ]
    await peer.expect(F.SPAWN)
    peer.close()
    for wait in [*waits, request]:
        with pytest.raises(GuestGoneError, match="VM vm"):
            await wait
    assert process.returncode == 255
    assert await agent.wait_closed() is None
    with pytest.raises(GuestGoneError):
        await agent.spawn("true")


async def test_a_breach_ends_this_connection_and_no_other(connect):
    bad, bad_peer = await connect("bad")
    good, good_peer = await connect("good")
    bad_process, good_process = await bad.spawn("cat"), await good.spawn("cat")
    bad_peer.send(F.DATA, 99, 1, b"x")
    with pytest.raises(ProtocolViolation, match=r"VM bad: .*opened before use"):
        await bad_process.wait()
    assert isinstance(await bad.wait_closed(), ProtocolViolation)
    assert await bad_peer.reader.read()  # the SPAWN, and then its end
    assert await bad_peer.at_end()
    await good_peer.expect(F.SPAWN)
    good_peer.send(F.EXIT, 1, payload=b"\0\0")
    assert await good_process.wait() == 0


async def test_frames_before_a_breach_still_count(connect):
    agent, peer = await connect()
    process = await agent.spawn("true")
    await peer.expect(F.SPAWN)
    peer.send(F.EXIT, 1, payload=b"\0\3")
    peer.writer.write(b"\xff" * 8)
    assert await process.wait() == 3
    assert isinstance(await agent.wait_closed(), ProtocolViolation)


async def test_as_many_commands_as_the_protocol_allows(connect):
    agent, _ = await connect()
    for _ in range(STREAMS_MAX):
        await agent.spawn("cat")
    with pytest.raises(GuestError, match="wait for some to end"):
        await agent.spawn("cat")


async def test_the_log_is_bounded(connect, tmp_path):
    path = tmp_path / "agent.log"
    agent, peer = await connect(log=path)
    line = b"x" * 1000
    for _ in range(2000):
        peer.send(F.LOG, payload=line)
        await peer.writer.drain()
    peer.close()
    await agent.wait_closed()
    assert LIMIT <= path.stat().st_size < LIMIT + 2000
    assert path.read_text().endswith("the log is full; what follows is dropped\n")


async def test_what_a_guest_logs_is_one_line_of_text(connect, tmp_path):
    """It forges no entry, whatever ends of lines and escapes it sends."""
    path = tmp_path / "agent.log"
    agent, peer = await connect(log=path)
    said = "\x1b[2J\u202e\x9b\r\n2026-01-01 00:00:00.000 forged\n::error::x\u2028y"
    peer.send(F.LOG, payload=said.encode())
    peer.close()
    await agent.wait_closed()
    entry, _end_of_connection = path.read_text().splitlines()
    assert entry.isprintable()
    assert entry.endswith(r"forged\n::error::x\u2028y")


async def test_a_log_that_is_full_already(tmp_path):
    path = tmp_path / "agent.log"
    path.write_bytes(bytes(LIMIT))
    log = AgentLog(path)
    log.write("more")
    log.close()
    log.write("after the end")
    assert path.stat().st_size == LIMIT


async def test_calls_are_refused_without_a_handler(connect):
    _, peer = await connect()
    peer.send(F.CALL, FIRST_GUEST_STREAM, payload=b"vm\0s\0user\0")
    frame = await peer.expect(F.EXIT)
    assert frame.payload[:2] == struct.pack("BB", 2, 126)


@pytest.mark.parametrize("user", ["x" * 256, "a\nb", "\x1b[2J"])
async def test_a_bad_name_of_the_user_who_calls_is_refused(connect, user):
    """It is kept as long as the call lasts, and shown."""
    called = []
    _, peer = await connect(on_call=called.append)
    payload = f"vm\0qubes.Ping\0{user}\0".encode()
    peer.send(F.CALL, FIRST_GUEST_STREAM, payload=payload)
    frame = await peer.expect(F.EXIT)
    assert frame.payload == b"\2\x7ethe user's name is not valid"
    assert not called


@pytest.mark.parametrize(
    ("target", "service"),
    [
        ("a/b", "qubes.Ping"),
        ("..", "qubes.Ping"),
        ("a\nb", "qubes.Ping"),
        ("vm", "../../bin/sh"),
        ("vm", ""),
        ("vm", "a b"),
        ("vm", "x" * 65),
        ("vm", "ok+" + "x" * 129),
        ("vm", "ok+../x"),
    ],
)
async def test_bad_names_in_calls_are_refused(connect, target, service):
    """They never reach the handler, and cost the VM that one call only."""
    called = []
    _, peer = await connect(on_call=called.append)
    payload = f"{target}\0{service}\0user\0".encode()
    peer.send(F.CALL, FIRST_GUEST_STREAM, payload=payload)
    frame = await peer.expect(F.EXIT)
    assert frame.payload[:2] == struct.pack("BB", 2, 126)
    assert not called


async def test_close_ends_the_handlers_of_calls(connect):
    started, ended = asyncio.Event(), []

    async def on_call(call):
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(call.service)

    agent, peer = await connect(on_call=on_call)
    peer.send(F.CALL, FIRST_GUEST_STREAM, payload=b"\0slow\0user\0")
    await started.wait()
    await agent.close()
    assert ended == ["slow"]
    await agent.close()


async def test_power_off_has_no_answer(connect):
    agent, peer = await connect()
    await agent.power_off()
    assert (await peer.expect(F.POWER_OFF)).payload == b"\0"
    await agent.reboot()
    assert (await peer.expect(F.POWER_OFF)).payload == b"\1"


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (DEVICES, "", True),
        (f"{DEVICES}/loop0/desc", "x" * 255, True),
        (f"{DEVICES}/loop0/desc", "x" * 256, False),
        (f"{DEVICES}/loop0", "", False),
        (f"{DEVICES}/../desc", "", False),
        (f"{DEVICES}/loop0/desc/x", "", False),
        (f"{DEVICES}/loop0/other", "", False),
        (f"{DEVICES}/{'l' * 64}/desc", "", False),
        ("/name", "other", False),
    ],
)
async def test_of_its_database_a_guest_tells_of_block_devices(
    connect, path, value, told
):
    agent, peer = await connect()
    heard = asyncio.Queue()
    agent.on_db_change(lambda *entry: heard.put_nowait(entry))
    for entry in (path, value), (f"{DEVICES}/last/size", "1"):
        payload = "".join(f"{text}\0" for text in entry).encode()
        peer.send(F.DB_CHANGED, payload=payload)
    assert await heard.get() == (
        (path, value) if told else (f"{DEVICES}/last/size", "1")
    )


async def test_what_it_has_told_before_somebody_listens(connect):
    """It tells of each once: as it is greeted, or while it enters its root."""
    agent, peer = await connect()
    waiting = asyncio.ensure_future(agent.set_clock(1, timeout=8))
    await peer.expect(F.CLOCK)
    for entry in (
        (f"{DEVICES}/loop0/size", "1"),
        (f"{DEVICES}/sda/size", "2"),
        (DEVICES, ""),
        (f"{DEVICES}/loop0/size",),
        (f"{DEVICES}/sda/size", "3"),
        (DEVICES, ""),
    ):
        payload = "".join(f"{text}\0" for text in entry).encode()
        peer.send(F.DB_CHANGED, payload=payload)
    peer.send(F.DONE)
    await waiting
    heard = []
    agent.on_db_change(lambda *entry: heard.append(entry))
    assert heard == [(f"{DEVICES}/sda/size", "3"), (DEVICES, "")]


@pytest.fixture
def socketpair():
    import socket  # noqa: PLC0415

    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


async def test_a_peer_is_a_peer(socketpair):
    """The test's own other end speaks the protocol it claims to."""
    ours, theirs = socketpair
    peer = Peer(theirs)
    await peer.open()
    peer.send(F.LOG, payload=b"x")
    await peer.writer.drain()
    assert ours.recv(100) == struct.pack("<BBHI", F.LOG, 0, 1, 0) + b"x"
    peer.close()
