"""The memory of domains of libvirt's test driver: no guests, so no reports."""

from __future__ import annotations

import asyncio
import contextlib
import uuid

import pytest

from qubes_itests.balloons import LibvirtMemory
from qubes_itests.hypervisor.contract import DomainSpec, LifecycleEvent
from qubes_itests.hypervisor.testdriver import TestHypervisor
from qubes_itests.qmemman.balancer import Balancer
from qubes_itests.qmemman.budget import MemoryBudget
from qubes_itests.qmemman.contract import Order
from qubes_itests.qmemman.exc import DomainGoneError

pytestmark = pytest.mark.asyncio

MIB = 1 << 20
BUDGET = MemoryBudget(total=3000 * MIB, dom0=1000 * MIB, dom0_used=300 * MIB)


@pytest.fixture
def opened(tmp_path):
    """Return a context manager that yields a hypervisor and its memory."""

    @contextlib.asynccontextmanager
    async def open_all(**options):
        async with (
            await TestHypervisor.open(tmp_path, tmp_path) as hypervisor,
            LibvirtMemory(hypervisor, BUDGET, **options) as memory,
        ):
            yield hypervisor, memory

    return open_all


@pytest.fixture
def make_spec(tmp_path):
    def make(name):
        place = tmp_path / name
        place.mkdir()
        return DomainSpec(
            name=name,
            uuid=uuid.uuid4(),
            directory=place,
            memory=400,
            max_memory=800,
            kernel=tmp_path / "kernel",
            initramfs=tmp_path / "initramfs",
        )

    return make


def order(domid, target):
    return Order(domid=domid, target=target, guest_target=target, limit=target + MIB)


async def test_domains_come_and_go(opened, make_spec):
    """A domain is there when `start` returns, and gone when `destroy` does."""
    async with opened() as (hypervisor, memory):
        domain = await hypervisor.define(make_spec("one"))
        assert len((await memory.read()).domains) == 1
        await domain.start()
        reading = await memory.read()
        assert reading.free == (3000 - 1000 - 400) * MIB
        found = reading.domains[1]
        assert (found.name, found.domid) == ("one", "1")
        assert (found.current, found.maximum) == (400 * MIB, 800 * MIB)
        assert memory.domid(domain) == "1"
        await domain.destroy()
        assert len((await memory.read()).domains) == 1
        assert memory.domid(domain) is None
        with pytest.raises(DomainGoneError):
            await memory.set_target(order("1", 300 * MIB))
        await domain.start()
        assert (await memory.read()).domains[1].domid == "2"


async def test_a_target_is_reached(opened, make_spec):
    async with opened() as (hypervisor, memory):
        domain = await hypervisor.define(make_spec("one"))
        await domain.start()
        await memory.read()
        await memory.set_target(order("1", 300 * MIB))
        async with asyncio.timeout(300):
            while True:
                if (await memory.read()).domains[1].current == 300 * MIB:
                    break
                await asyncio.sleep(0.01)
        assert (await domain.memory_statistics()).actual == 300 * MIB


async def test_domains_that_do_not_count(opened, make_spec):
    async with opened(counts=lambda d: d.spec.name != "other") as (hypervisor, memory):
        for name in ("one", "other"):
            await (await hypervisor.define(make_spec(name))).start()
        reading = await memory.read()
        assert [domain.name for domain in reading.domains] == ["dom0", "one"]


async def test_domains_from_before(tmp_path, make_spec):
    """Who runs already is found, and one that is paused is known to be."""
    async with await TestHypervisor.open(tmp_path, tmp_path) as hypervisor:
        domain = await hypervisor.define(make_spec("one"))
        await domain.start()
        await domain.pause()
        async with LibvirtMemory(hypervisor, BUDGET) as memory:
            assert (await memory.read()).domains[1].paused
            changed = asyncio.Event()
            memory.subscribe(lambda *_: None, changed.set)
            await domain.resume()
            async with asyncio.timeout(300):
                await changed.wait()
            assert not (await memory.read()).domains[1].paused
        before = asyncio.all_tasks()
        await memory.read()
        assert asyncio.all_tasks() <= before


async def test_a_domain_that_was_found_before_it_runs(tmp_path, make_spec):
    """As one is that goes on as a clone, whose CPUs have stood still."""
    async with await TestHypervisor.open(tmp_path, tmp_path) as hypervisor:
        domain = await hypervisor.define(make_spec("one"))
        await domain.start()
        await domain.pause()
        async with LibvirtMemory(hypervisor, BUDGET) as memory:
            assert (await memory.read()).domains[1].paused
            hypervisor._publish(domain, LifecycleEvent.STARTED)
            assert not (await memory.read()).domains[1].paused


async def test_a_dom0_that_has_booted_with_everything_is_no_news(tmp_path, caplog):
    """Memory is low when somebody has given away too much of it, and only then."""
    budget = MemoryBudget(total=2000 * MIB, dom0=2000 * MIB, dom0_used=300 * MIB)
    async with (
        await TestHypervisor.open(tmp_path, tmp_path) as hypervisor,
        LibvirtMemory(hypervisor, budget) as memory,
    ):
        balancer = Balancer(memory)
        end = balancer.subscribe(lambda: None)
        assert balancer.reported("0")
        await balancer.balance()
        assert await balancer.balloon(1000 * MIB)
        assert [line for line in caplog.messages if "is low" in line] == []
        memory.dom0.holds = 1990 * MIB
        await balancer.refresh()
        end()
    assert len([line for line in caplog.messages if "is low" in line]) == 1
