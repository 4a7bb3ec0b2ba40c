"""What every memory back end does: simulated guests, and real ones."""

from __future__ import annotations

import asyncio
import contextlib
import itertools

import pytest

from qubes_itests.balancing.app_memory import counts
from qubes_itests.balloons import LibvirtMemory
from qubes_itests.qmemman.budget import MemoryBudget
from qubes_itests.qmemman.contract import Order
from qubes_itests.qmemman.exc import DomainGoneError
from qubes_itests.qmemman.simulation.machine import SimulatedMachine
from qubes_itests.qmemman.simulation.scenarios import MAXIMUM, MEMORY
from qubes_itests.qmemman.state import DOM0, parse_report

MIB = 1 << 20
KIND = {"memory": MEMORY, "maximum": MAXIMUM}
TOTAL, DOM0_HOLDS, DOM0_USES = 4000 * MIB, 1000 * MIB, 300 * MIB


class SimulatedVMs:
    """Guests of the simulation."""

    def __init__(self):
        self.backend = SimulatedMachine(TOTAL, DOM0_HOLDS)
        self.dom0 = self.backend.dom0

    async def start(self, name):
        guest = self.backend.start(name, **KIND)
        guest.use(120 * MIB)
        return guest

    async def stop(self, guest):
        self.backend.stop(guest)

    async def pause(self, guest):
        self.backend.pause(guest)

    async def resume(self, guest):
        self.backend.resume(guest)


class RealVMs:
    """VMs of an app; nobody balances them."""

    def __init__(self, app, backend):
        self.app = app
        self.backend = backend
        self.dom0 = backend.dom0

    async def start(self, name):
        if name in self.app.domains:
            vm = self.app.domains[name]
        else:
            memory, maxmem = KIND["memory"] // MIB, KIND["maximum"] // MIB
            vm = self.app.add_new_vm(
                "AppVM", name=name, label="red", memory=memory, maxmem=maxmem
            )
            await vm.create_on_disk()
        return await vm.start()

    async def stop(self, vm):
        await vm.kill()

    async def pause(self, vm):
        await vm.pause()

    async def resume(self, vm):
        await vm.unpause()


@contextlib.asynccontextmanager
async def simulated(_testbed):
    made = SimulatedVMs()
    made.dom0.use(DOM0_USES)
    yield made


@contextlib.asynccontextmanager
async def libvirt(testbed):
    app = await testbed.make_app("tiny")
    budget = MemoryBudget(total=TOTAL, dom0=DOM0_HOLDS, dom0_used=DOM0_USES)
    async with LibvirtMemory(app.hypervisor, budget, counts=counts(app)) as backend:
        try:
            yield RealVMs(app, backend)
        finally:
            problems = await testbed.close_app(app)
    assert problems == []


@pytest.fixture(params=[simulated, libvirt], ids=lambda opened: opened.__name__)
def with_vms(request, testbed):
    """Run a coroutine function with each back end's VMs."""

    def run(program):
        async def opened():
            async with request.param(testbed) as vms:
                await program(vms)

        testbed.portal.run(opened())

    return run


async def eventually(condition, timeout=300):
    """Wait until a coroutine function returns something true, and return it."""
    async with asyncio.timeout(timeout):
        while True:
            if found := await condition():
                return found
            await asyncio.sleep(0.02)


async def domain(vms, name):
    """Return the reading of a domain; None when it is not there."""
    found = [d for d in (await vms.backend.read()).domains if d.name == name]
    return found[0] if found else None


def order(domid, target):
    return Order(
        domid=domid, target=target, guest_target=target - 16 * MIB, limit=target + MIB
    )


def test_readings(with_vms):
    """A VM holds its initial memory as soon as it is there; all sums are right."""

    async def program(vms):
        alone = await vms.backend.read()
        assert (alone.total, alone.free) == (TOTAL, TOTAL - DOM0_HOLDS)
        assert [(d.domid, d.name, d.maximum) for d in alone.domains] == [
            (DOM0, "dom0", None)
        ]
        await vms.start("one")
        reading = await vms.backend.read()
        assert reading.free == alone.free - KIND["memory"]
        one = await domain(vms, "one")
        assert (one.current, one.target, one.maximum, one.paused) == (
            KIND["memory"], KIND["memory"], KIND["maximum"], False,
        )  # fmt: skip

    with_vms(program)


def test_targets_are_reached(with_vms):
    """Down, up, and down while up is under way; dom0 too."""

    async def program(vms):
        await vms.start("one")
        one = await domain(vms, "one")

        async def holds(target):
            reading = await domain(vms, "one")
            return abs(reading.current - target) <= MIB

        for target in (300 * MIB, 600 * MIB):
            await vms.backend.set_target(order(one.domid, target))
            await eventually(lambda t=target: holds(t))
        for target in (1100 * MIB, 350 * MIB):
            await vms.backend.set_target(order(one.domid, target))
        await eventually(lambda: holds(350 * MIB))
        await vms.backend.set_target(order(DOM0, 800 * MIB))

        async def dom0_gave():
            return (await vms.backend.read()).domains[0].current <= 800 * MIB

        await eventually(dom0_gave)

    with_vms(program)


def test_domains_that_end(with_vms):
    """They are gone at once, cannot be told anything, and come back as others."""

    async def program(vms):
        changes = itertools.count()
        vms.backend.subscribe(lambda *_: None, lambda: next(changes))
        vm = await vms.start("one")
        old = (await domain(vms, "one")).domid
        before = next(changes)
        await vms.stop(vm)
        assert await domain(vms, "one") is None
        assert (await vms.backend.read()).free == TOTAL - DOM0_HOLDS
        with pytest.raises(DomainGoneError):
            await vms.backend.set_target(order(old, 300 * MIB))
        assert next(changes) > before + 1
        await vms.start("one")
        assert (await domain(vms, "one")).domid != old

    with_vms(program)


def test_reports(with_vms):
    """They are digits in kB, and come again for who subscribes later, until he ends."""

    async def program(vms):
        first, second = {}, {}
        end = vms.backend.subscribe(first.__setitem__, lambda: None)
        await vms.start("one")
        number = (await domain(vms, "one")).domid

        async def reported():
            return {DOM0, number} <= first.keys()

        await eventually(reported)
        assert parse_report(first[DOM0]) == DOM0_USES
        assert 50 * MIB < parse_report(first[number]) < 200 * MIB
        vms.backend.subscribe(second.__setitem__, lambda: None)
        assert second == first
        end()
        vms.dom0.use(500 * MIB)

        async def news():
            return parse_report(second[DOM0]) == 500 * MIB

        await eventually(news)
        assert parse_report(first[DOM0]) == DOM0_USES

    with_vms(program)


def test_paused_domains(with_vms):
    """They are said to be, and follow no target until they are resumed."""

    async def program(vms):
        vm = await vms.start("one")
        one = await domain(vms, "one")

        async def paused():
            return (await domain(vms, "one")).paused

        async def resumed():
            return not await paused()

        await vms.pause(vm)
        await eventually(paused)
        await vms.backend.set_target(order(one.domid, 300 * MIB))
        await asyncio.sleep(0.3)
        assert (await domain(vms, "one")).current == KIND["memory"]
        await vms.resume(vm)
        await eventually(resumed)

        async def gave():
            return (await domain(vms, "one")).current <= 301 * MIB

        await eventually(gave)

    with_vms(program)
