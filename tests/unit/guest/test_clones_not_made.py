"""Clones that nobody expects any more, or that are half made."""

import asyncio
import uuid
from random import Random

import pytest
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
def start(clones, tmp_path):
    """Start a VM from a state whose root is lost."""
    root = tmp_path / "root.img"
    state = WarmState("root", "kind", tmp_path / "state", {"xvda": 1}, root)
    disks = (Disk("xvda", root),)
    spec = DomainSpec("work", uuid.uuid4(), tmp_path, 100, 100, None, None, disks=disks)

    async def start():
        with clones.hold():
            async with clones.clone(state, spec, Identity(name="work", root="xvda")):
                pass

    return start


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
    async with asyncio.timeout(300):
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
    async with asyncio.timeout(300):
        await busy.wait()
        clones._recent.give_up("kind")
        idle.set()
        await clones.settled()
    making.cancel()
    assert made == []
