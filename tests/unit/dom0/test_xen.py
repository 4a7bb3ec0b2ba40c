"""Memory by the calls of libxenctrl and the paths of the XenStore."""

import asyncio
from types import SimpleNamespace

import pytest

from qubes_itests.dom0 import modules
from qubes_itests.dom0.xc_module import xc
from qubes_itests.dom0.xen import Xen
from qubes_itests.qmemman.simulation import virtual_time
from qubes_itests.qmemman.simulation.machine import SimulatedMachine

MIB = 1 << 20


def on_a_machine(program):
    """Run a coroutine function with a machine of 4000 MiB, one guest, and its Xen."""

    async def prepared():
        machine = SimulatedMachine(4000 * MIB, 1000 * MIB)
        xen = Xen(machine)
        xen.begin()
        guest = machine.start("work", 400 * MIB, 2000 * MIB)
        xen.introduce(guest.domid, 400 * MIB, 2000 * MIB)
        await program(machine, xen, guest)

    virtual_time.run(prepared())


def test_what_a_domain_is_and_holds():
    async def program(_machine, xen, _guest):
        place = "/local/domain/1"
        assert xen.store.read(f"{place}/domid") == b"1"
        assert xen.store.read(f"{place}/memory/target") == b"%d" % (400 << 10)
        assert xen.store.read(f"{place}/memory/static-max") == b"%d" % (2000 << 10)
        info = await xen.physinfo()
        assert info == {"total_memory": 4000 << 10, "free_memory": 2600 << 10}
        rows = await xen.domain_getinfo(1, 1)
        assert rows == [{"domid": 1, "mem_kb": 400 << 10, "maxmem_kb": 2000 << 10}]
        xen.release("1")
        assert xen.store.names("/local/domain") is None

    on_a_machine(program)


def test_the_size_of_the_machine_is_known_without_the_event_loop(monkeypatch):
    """A core asks in a thread of each VM that starts, and takes it for quick."""
    turns = []

    def run(coroutine):
        turns.append(coroutine)
        return asyncio.run(coroutine)

    xen = Xen(SimulatedMachine(4000 * MIB, 1000 * MIB))
    budget = SimpleNamespace(total=4000 * MIB)
    machine = SimpleNamespace(run=run, xen=xen, memory=SimpleNamespace(budget=budget))
    monkeypatch.setattr(modules, "machine", lambda: machine)
    info = xc().physinfo()
    assert info["total_memory"] == 4000 << 10
    assert not turns
    assert info["free_memory"] == 3000 << 10
    assert len(turns) == 1
    with pytest.raises(KeyError, match="hot"):
        info["hot"]


def test_a_guest_follows_its_target_in_the_store():
    """As Xen counts it holds 16 MiB more: its balloon does not see them."""

    async def program(_machine, xen, guest):
        await xen.domain_setmaxmem(1, (600 << 10) + 1024)
        await xen.domain_set_target_mem(1, 600 << 10)
        await asyncio.sleep(1)
        assert guest.holds() == 400 * MIB
        await xen.write("/local/domain/1/memory/target", f"{584 << 10}")
        await asyncio.sleep(1)
        assert guest.holds() == 600 * MIB
        assert (await xen.domain_getinfo(1, 1))[0]["maxmem_kb"] == 601 << 10

    on_a_machine(program)


def test_a_report_is_in_the_store_as_the_guest_wrote_it_until_the_domain_ends():
    async def program(_machine, xen, guest):
        path = "/local/domain/1/memory/meminfo"
        guest.report(b"12 x")
        assert xen.store.read(path) == b"12 x"
        xen.release("1")
        guest.report(b"13")
        assert xen.store.read(path) is None

    on_a_machine(program)


def test_a_target_of_a_domain_that_has_ended_is_forgotten():
    async def program(machine, xen, guest):
        machine.stop(guest)
        xen.release("1")
        path = "/local/domain/1/memory/target"
        await xen.write(path, "4096")
        assert xen.store.read(path) is None

    on_a_machine(program)
