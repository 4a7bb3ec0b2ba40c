"""What the host asks of guests: bounded in time and in bytes, whatever these do."""

from __future__ import annotations

import ast
import asyncio
import signal
from pathlib import Path

import pytest
from conditions import deadlines

import qubes_itests
from qubes_itests.exc import DeadlineError
from qubes_itests.guest.exc import GuestError, GuestGoneError
from qubes_itests.guest.link.frames import PAYLOAD_MAX, WINDOW
from qubes_itests.guest.link.frames import FrameType as F
from qubes_itests.guest.link.process import LONGEST_ANSWER, answer_of


async def asked(connect, **options):
    agent, peer = await connect()
    process = await agent.spawn_service("qubes.ResizeDisk", source="dom0")
    await peer.expect(F.SPAWN)
    options = {"timeout": 300, **options}
    answering = asyncio.ensure_future(answer_of(process, "enlarge it", **options))
    return answering, process, peer


async def until_killed(peer):
    while (frame := await peer.receive()).type != F.SIGNAL:
        pass
    assert frame.payload == bytes([signal.SIGKILL])


@pytest.mark.asyncio
async def test_an_answer_has_status_and_outputs(connect):
    answering, _, peer = await asked(connect, input=b"private\n")
    assert (await peer.expect(F.DATA)).payload == b"private\n"
    await peer.expect(F.EOF)
    peer.send(F.DATA, 1, 1, b"out")
    peer.send(F.DATA, 1, 2, b"err")
    peer.send(F.EXIT, 1, payload=b"\0\3")
    answer = await answering
    assert (answer.status, answer.stdout, answer.stderr) == (3, b"out", b"err")


@pytest.mark.asyncio
async def test_one_that_never_comes_is_killed_at_its_deadline(connect):
    """The error names what was waited for, and shows what the guest said."""
    for seconds in deadlines(0.2):
        answering, process, peer = await asked(connect, timeout=seconds)
        peer.send(F.DATA, 1, 2, b"wait \x1b[2J for it")
        with pytest.raises(DeadlineError) as caught:
            await answering
        if "| wait" in str(caught.value):
            break
    assert str(caught.value) == (
        f"no answer of VM {process.vm}, which was to enlarge it, within {seconds:g} s;"
        " last seen:\n| wait \\x1b[2J for it"
    )
    await until_killed(peer)


@pytest.mark.asyncio
async def test_outputs_that_are_closed_are_no_answer_yet(connect):
    answering, _, peer = await asked(connect, timeout=0.2)
    peer.send(F.EOF, 1, 1)
    peer.send(F.EOF, 1, 2)
    with pytest.raises(DeadlineError):
        await answering
    await until_killed(peer)


@pytest.mark.asyncio
@pytest.mark.parametrize("channel", [1, 2])
async def test_one_without_end_is_cut_off(connect, channel):
    """At once, and what is on its way by then is kept nowhere."""
    answering, process, peer = await asked(connect)
    for _ in range(WINDOW // PAYLOAD_MAX):
        peer.send(F.DATA, 1, channel, bytes(PAYLOAD_MAX))
    with pytest.raises(GuestError, match=f"wrote more than {LONGEST_ANSWER} bytes"):
        await answering
    assert sum(map(len, process.taken)) == LONGEST_ANSWER + 1
    await until_killed(peer)
    peer.send(F.DATA, 1, channel, b"late")
    assert await process.reader(channel).read(WINDOW) != b"late"


@pytest.mark.asyncio
async def test_an_answer_of_exactly_so_many_bytes_is_one(connect):
    answering, _, peer = await asked(connect, limit=5)
    peer.send(F.DATA, 1, 1, b"12345")
    peer.send(F.EXIT, 1, payload=b"\0\0")
    assert (await answering).stdout == b"12345"


@pytest.mark.asyncio
async def test_a_guest_that_goes_away_answers_no_more(connect):
    answering, _, peer = await asked(connect)
    peer.close()
    with pytest.raises(GuestGoneError):
        await answering


@pytest.mark.asyncio
async def test_who_gives_up_leaves_nothing_running(connect):
    answering, _, peer = await asked(connect)
    await asyncio.sleep(0)
    answering.cancel()
    await until_killed(peer)


#: What waits for a guest as long as that likes: for tests, who have deadlines.
UNBOUNDED = {"run_for_stdio", "run_service_for_stdio", "communicate"}
#: Where these are defined, and handed on to tests.
OF_TESTS = {"core/vm/commands.py", "compat_core2.py", "guest/link/process.py"}
#: For programs of the host.
OF_THE_HOST = {"host/command.py"}


def test_nothing_else_in_the_harness_waits_for_guests():
    package = Path(qubes_itests.__file__).parent
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in UNBOUNDED
    }
    assert found == OF_TESTS | OF_THE_HOST
