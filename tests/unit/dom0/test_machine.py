"""The end of a domain, as a core sees it from its own thread."""

import asyncio
import tempfile
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytest_asyncio

from qubes_itests.dom0 import machine as module
from qubes_itests.dom0.machine import Event, Machine, State
from qubes_itests.dom0.stores import QubesDB
from qubes_itests.dom0.xen_xml import read_domain
from qubes_itests.exc import DeadlineError
from qubes_itests.guest.link import block_export
from qubes_itests.hypervisor.exc import HypervisorError, StateError
from qubes_itests.qmemman.budget import MemoryBudget

pytestmark = pytest.mark.asyncio

XML = (
    f"<domain type='xen'><name>work</name><uuid>{uuid.UUID(int=7)}</uuid>"
    "<memory unit='MiB'>400</memory><vcpu>1</vcpu></domain>"
)


class Agent:
    """The agent of a guest that is there at once."""

    def on_db_change(self, note):
        pass

    async def wait_for_disk(self, name, state, *, timeout):
        pass

    async def close(self):
        pass


class Domain:
    """A domain whose guest stops at once, and whose QEMU cannot be killed."""

    async def wait_stopped(self):
        pass

    async def undefine(self):
        raise HypervisorError("work", "destroy", "Device or resource busy")


@pytest_asyncio.fixture
async def guest(tmp_path):
    budget = MemoryBudget(total=1 << 32, dom0=1 << 30, dom0_used=1 << 30)
    hypervisor = SimpleNamespace(slowness=1)
    machine = Machine(None, hypervisor, tmp_path, {}, budget=budget, warm=None)
    guest = await machine.define(read_domain(XML))
    await guest.create()
    machine.databases["work"] = QubesDB()
    return guest


async def test_nothing_is_left_of_a_run_when_its_domain_is_off(guest):
    """Who looks has no turn on the event loop, and may look at any moment."""
    machine, seen = guest._machine, []

    def look():
        seen.append((guest.is_active, "work" in machine.databases))

    guest.undo.callback(look)
    machine.xen.store.watch("@releaseDomain", lambda _path: look())
    machine.listeners.append(lambda _guest, event: seen.append(event) or look())
    seen.clear()
    await guest.destroy()
    assert seen == [(True, True), (True, True), Event.STOPPED, (False, False)]
    assert guest.xid == -1


@pytest.mark.parametrize("started", [True, False])
async def test_a_domain_that_cannot_be_destroyed_has_ended_all_the_same(
    guest, monkeypatch, caplog, started
):
    async def boot(*_arguments, **_options):
        await asyncio.sleep(0)
        return Domain(), Agent() if started else None

    async def end(_network):
        ends.append(started)

    ended, ends = asyncio.Event(), []
    guest._machine.listeners.append(
        lambda _guest, event: event is Event.STOPPED and ended.set()
    )
    monkeypatch.setattr(module, "boot", boot)
    monkeypatch.setattr(module.Network, "end", end)
    await guest.resume()
    agent = asyncio.ensure_future(guest.agent())
    async with asyncio.timeout(300):
        await ended.wait()
        if started:
            assert isinstance(await agent, Agent)
        else:
            with pytest.raises(HypervisorError, match="no kernel of ours"):
                await agent
    assert not guest.is_active
    assert "Device or resource busy" in caplog.text
    assert ends == [True] * started


async def test_no_interface_leads_to_a_net_vm_that_is_ending(guest):
    xml = XML.replace("work", "net").replace(
        f"{guest.config.uuid}", f"{uuid.UUID(int=8)}"
    )
    net = await guest._machine.define(read_domain(xml))
    net.state = State.RUNNING
    for each in (guest, net):
        each._agent = asyncio.get_running_loop().create_future()
        each._agent.set_result(Agent())
    guest.domain = guest.network = Domain()
    interface = (
        "<interface><mac address='00:16:3e:5e:6c:00'/><ip address='10.137.0.5'/>"
        "<backenddomain name='net'/></interface>"
    )
    with pytest.raises(StateError, match="it is ending, or VM net is"):
        await guest.attach_device(interface)
    assert "interface" not in guest.definition()


async def test_one_that_cannot_be_paused_serves_its_clients_as_before(guest):
    class Unpausable(Domain):
        async def pause(self):
            told.append(guest.network.paused)
            raise HypervisorError("work", "pause", "no answer within 30 s")

    told = []
    guest.state, guest.domain = State.RUNNING, Unpausable()
    guest._agent = asyncio.get_running_loop().create_future()
    guest._agent.set_result(Agent())
    guest.network = SimpleNamespace(
        paused=False, serve_soon=lambda: told.append("served")
    )
    with pytest.raises(HypervisorError, match="no answer"):
        await guest.suspend()
    assert told == [True, "served"]
    assert not guest.network.paused
    assert guest.state is State.RUNNING


@pytest_asyncio.fixture
async def served(guest):
    """Return a guest to which another one serves disks."""
    back = XML.replace("work", "back").replace(
        f"{guest.config.uuid}", f"{uuid.UUID(int=9)}"
    )
    backend = await guest._machine.define(read_domain(back))
    backend.state, guest.domain = State.RUNNING, Disks()
    for each in (guest, backend):
        each._agent = asyncio.get_running_loop().create_future()
        each._agent.set_result(Agent())
    # short: the path of a socket is limited
    with tempfile.TemporaryDirectory() as place:
        guest._machine.directory = Path(place)
        yield guest


class Disks:
    """A domain whose guest lets go of no disk before somebody has it do so."""

    def __init__(self):
        self.disks = {}
        self.lets_go = asyncio.Event()

    async def attach_disk(self, disk):
        self.disks[disk.name] = disk

    async def detach_disk(self, name):
        if not self.lets_go.is_set():
            raise DeadlineError(f"release of disk {name}", 10)
        self.disks.pop(name, None)


DISK = (
    "<disk type='block' device='disk'><driver name='phy'/><source dev='/dev/loop0'/>"
    "<target dev='xvdi'/><backenddomain name='back'/></disk>"
)


async def test_a_disk_of_which_a_guest_lets_go_late_is_detached_then(served):
    await served.attach_device(DISK)
    (disk,) = served.domain.disks.values()
    with pytest.raises(DeadlineError):
        await served.detach_device(DISK)
    assert "xvdi" in served.definition()
    assert disk.path.exists()
    # libvirt has it no more as soon as the guest has let go of it
    served.domain.disks.clear()
    served.domain.lets_go.set()
    await served.detach_device(DISK)
    assert "xvdi" not in served.definition()
    assert not disk.path.exists()
    with pytest.raises(HypervisorError, match="it has no disk xvdi"):
        await served.detach_device(DISK)


async def test_a_disk_can_be_detached_whose_guest_answers_no_more(served, monkeypatch):
    """QEMU waits for the answer to what it has asked until nobody serves."""
    monkeypatch.setattr(block_export, "_ANSWER", 0.01)
    await served.attach_device(DISK)
    (disk,), domain = served.domain.disks.values(), served.domain

    async def detach_disk(name):
        while disk.path.exists():  # noqa: ASYNC110 - it is the file that QEMU would miss
            await asyncio.sleep(0)
        del domain.disks[name]

    monkeypatch.setattr(domain, "detach_disk", detach_disk)
    async with asyncio.timeout(60):
        await served.detach_device(DISK)
    assert domain.disks == {}
