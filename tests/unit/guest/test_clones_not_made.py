"""Clones as starts find them: none, half made, or made while another VM starts."""

import asyncio
import dataclasses
import uuid
from random import Random

import pytest
import pytest_asyncio
from scripted_hypervisor import ScriptedHypervisor

from qubes_itests.guest.link.agent import Identity
from qubes_itests.guest.start import ahead
from qubes_itests.guest.start.warm import WarmState
from qubes_itests.hypervisor.contract import Disk, DomainSpec


@pytest.fixture
def places(tmp_path):
    """Return where clones have their sockets and their disks."""
    places = [tmp_path / name for name in ("sockets", "disks")]
    for place in places:
        place.mkdir()
    (tmp_path / "disks" / "private.img").touch()
    return places


@pytest.fixture
def clones(places):
    hypervisor = ScriptedHypervisor(Random(1))  # noqa: S311 - to be repeated
    return ahead.ClonesAhead(hypervisor, 2, *places)


@pytest.fixture
def clone(clones, tmp_path):
    """Return a function that looks for a clone of a state whose root is lost."""
    root = tmp_path / "root.img"
    state = WarmState("root", "kind", tmp_path / "state", ("xvda",), root)
    disks = (Disk("xvda", root),)
    spec = DomainSpec("work", uuid.uuid4(), tmp_path, 100, 100, None, None, disks=disks)
    return lambda: clones.clone(state, spec, Identity(name="work", root="xvda"))


@pytest.fixture
def start(clones, clone):
    """Return a function that starts a VM; it returns the name of its clone, if any."""

    async def start():
        with clones.row():
            async with clone() as domain:
                return domain and domain.spec.name

    return start


class Making:
    """The making of clones, each of which is done when a test says so."""

    def __init__(self, clones, directory, monkeypatch):
        self.begun, self.go_on = asyncio.Event(), asyncio.Event()
        self.error = None
        self._clones, self._directory, self._number = clones, directory, 0
        monkeypatch.setattr(clones, "_make", self._make)
        monkeypatch.setattr(ahead, "idle_cpu", self._idle)
        self._running = asyncio.ensure_future(clones.run())

    async def _idle(self):
        pass

    async def _make(self, kind):
        self.begun.set()
        await self.go_on.wait()
        if self.error is not None:
            raise self.error
        self._number += 1
        name = f"ahead-{self._number}"
        directory = self._directory / name
        spec = dataclasses.replace(kind.spec, name=name, directory=directory, disks=())
        domain = await self._clones._hypervisor.define(spec)
        return ahead._Clone(kind.state.key, domain)

    def end(self):
        self._running.cancel()


@pytest_asyncio.fixture
async def making(clones, start, tmp_path, monkeypatch):
    """Begin to make a clone, as two VMs have started; one is expected then."""
    making = Making(clones, tmp_path, monkeypatch)
    await start()
    await start()
    async with asyncio.timeout(10):
        await making.begun.wait()
    yield making
    making.end()


@pytest.mark.asyncio
async def test_a_clone_that_cannot_be_made_leaves_no_file(
    clones, start, places, monkeypatch
):
    looks = []

    async def look():
        looks.append(None)

    monkeypatch.setattr(ahead, "idle_cpu", look)
    making = asyncio.ensure_future(clones.run())
    await start()
    await start()
    async with asyncio.timeout(10):
        await clones.settled()
    making.cancel()
    assert looks == [None]
    assert [path.name for place in places for path in place.iterdir()] == [
        "private.img"
    ]


@pytest.mark.asyncio
async def test_what_is_missing_is_asked_when_a_cpu_is_idle(clones, start, monkeypatch):
    """On a busy machine that takes minutes, in which other VMs start."""
    busy, idle, made = asyncio.Event(), asyncio.Event(), []

    async def wait():
        busy.set()
        await idle.wait()

    async def make(kind):
        made.append(kind)
        raise OSError

    monkeypatch.setattr(ahead, "idle_cpu", wait)
    monkeypatch.setattr(clones, "_make", make)
    await start()
    await start()
    making = asyncio.ensure_future(clones.run())
    async with asyncio.timeout(10):
        await busy.wait()
        clones._recent.give_up("kind")
        idle.set()
        await clones.settled()
    making.cancel()
    assert made == []


@pytest.mark.asyncio
async def test_a_clone_is_made_while_a_vm_starts(clones, clone, start, making):
    """Tests that start one VM after the other leave no better moment."""
    async with asyncio.timeout(10):
        with clones.row():
            making.go_on.set()
            await clones.settled()
            async with clone() as domain:
                assert domain.spec.name == "ahead-1"
            await clones.settled()
        assert await start() == "ahead-2"


@pytest.mark.asyncio
async def test_one_start_waits_for_the_clone_that_is_being_made(start, making):
    """Others do not: they would wait for nothing."""
    waiting = asyncio.ensure_future(start())
    async with asyncio.timeout(10):
        await asyncio.sleep(0)
        assert await start() is None
        assert not waiting.done()
        making.go_on.set()
        assert await waiting == "ahead-1"


@pytest.mark.asyncio
async def test_a_start_does_not_wait_for_long(clones, start, making, monkeypatch):
    """What is made in the end is the next one's."""
    monkeypatch.setattr(ahead, "_PATIENCE", 0)
    async with asyncio.timeout(10):
        assert await start() is None
        making.go_on.set()
        await clones.settled()
        assert await start() == "ahead-1"


@pytest.mark.asyncio
async def test_a_start_hears_that_the_clone_cannot_be_made(start, making):
    waiting = asyncio.ensure_future(start())
    await asyncio.sleep(0)
    making.error = OSError("no room")
    making.go_on.set()
    async with asyncio.timeout(10):
        assert await waiting is None


@pytest.mark.asyncio
async def test_a_start_that_is_cancelled_leaves_the_clone_to_others(
    clones, start, making
):
    waiting = asyncio.ensure_future(start())
    await asyncio.sleep(0)
    waiting.cancel()
    async with asyncio.timeout(10):
        await asyncio.wait([waiting])
        making.go_on.set()
        await clones.settled()
        assert await start() == "ahead-1"
