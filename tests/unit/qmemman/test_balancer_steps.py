"""Single acts of the balancer: what is told to whom, when, and what is found out."""

from __future__ import annotations

import asyncio

import pytest
from memory_machine import MIB, trial

from qubes_itests.exc import HarnessError
from qubes_itests.qmemman.balancer import Balancer
from qubes_itests.qmemman.exc import DomainGoneError, MemoryRefusedError
from qubes_itests.qmemman.simulation import virtual_time
from qubes_itests.qmemman.simulation.machine import SimulatedMachine


def simulate(program):
    """Make a test of a coroutine function: it runs in virtual time."""

    def test(tmp_path):
        virtual_time.run(program(tmp_path))

    test.__doc__ = program.__doc__
    return test


def _in_virtual_time(program):
    """Make the same of one that needs no directory."""

    def test():
        virtual_time.run(program())

    test.__doc__ = program.__doc__
    return test


def _directly(total=4000, dom0=1000):
    """Return a machine and a balancer that nobody else uses; sizes in MiB."""
    machine = SimulatedMachine(total * MIB, dom0 * MIB)
    balancer = Balancer(machine)
    balancer.note_report("0", b"300000")
    return machine, balancer


def _watched(machine):
    """Return the list in which the orders of a machine gather."""
    orders, set_target = [], machine.set_target

    async def noting(order):
        orders.append(order)
        await set_target(order)

    machine.set_target = noting
    return orders


async def _for_ever(*_):
    await asyncio.Event().wait()


@simulate
async def test_nothing_is_promised_before_it_is_there(tmp_path):
    """What all hold or may take fits the machine after each order, with slow donors."""
    async with trial(tmp_path, total=3000) as t:
        donor, taker = [await t.start(n, 400, 2500, 250) for n in ("donor", "taker")]
        await t.until(lambda: t.target(donor) > 600)
        await asyncio.sleep(5)
        donor.rate = t.machine.dom0.rate = 150 * MIB
        most, set_target = [], t.machine.set_target

        async def adding_up(order):
            await set_target(order)
            guests = t.machine.guests.values()
            most.append(sum(max(guest.holds(), guest._aim) for guest in guests))

        t.machine.set_target = adding_up
        taker.use(800 * MIB)
        await t.until(lambda: t.target(taker) >= 1030, within=30)
        assert max(most) <= t.machine.total


@simulate
async def test_a_donor_that_gives_nothing_is_told_once(tmp_path):
    """It is found out although nobody waits for its memory, and is left alone then."""
    async with trial(tmp_path, total=2000, dom0=2000, dom0_used=0) as t:
        t.machine.dom0.stuck = True
        t.machine.dom0.use(300 * MIB)
        await t.until(lambda: t.balancer.domains["0"].no_progress)
        orders = _watched(t.machine)
        await asyncio.sleep(10)
        assert t.balancer.domains["0"].no_progress
        assert not orders
        # a VM that starts asks it again
        t.machine.dom0.stuck = False
        assert (await t.start("new", 400, 800, 100)).holds() == 400 * MIB


@simulate
async def test_a_silent_donor_is_found_out_by_a_start(tmp_path):
    """The other donors give in its place."""
    async with trial(tmp_path, total=4000) as t:
        silent, good = [await t.start(n, 400, 1500, 200) for n in ("silent", "good")]
        await t.until(lambda: min(t.target(silent), t.target(good)) > 800)
        await asyncio.sleep(5)
        silent.stuck = True
        async with t.client.memory(1900 * MIB):
            assert t.balancer.domains[silent.domid].no_progress
            assert not t.balancer.domains[good.domid].no_progress


@simulate
async def test_a_start_is_refused_when_memory_comes_too_slowly(tmp_path):
    """After the period of progress, not once all has trickled in."""
    async with trial(tmp_path) as t:
        donor = await t.start("donor", 400, 2500, 200)
        await t.until(lambda: t.target(donor) > 1000)
        await asyncio.sleep(5)
        donor.rate = t.machine.dom0.rate = 20 * MIB
        start = t.machine.now()
        with pytest.raises(MemoryRefusedError):
            await t.start("new", 800, 1000, 100)
        assert 2.9 < t.machine.now() - start < 5


@simulate
async def test_a_promise_that_was_not_taken_is_withdrawn_for_a_start(tmp_path):
    """What a guest was to grow to cannot be taken after it was given away."""
    async with trial(tmp_path) as t:
        guest = await t.start("vm", 400, 2500, 250)
        guest.stuck = True
        await t.until(lambda: t.target(guest) > 1000)
        async with t.client.memory(200 * MIB):
            assert t.target(guest) == guest.holds() // MIB == 400


@simulate
async def test_set_memory_refuses_what_is_not_possible(tmp_path):
    """Neither beyond a maximum, nor more than is free; then nothing is told."""
    async with trial(tmp_path, total=3000) as t:
        await t.start("full", 400, 600, 250)
        other = await t.start("other", 400, 2000, 250)
        await asyncio.sleep(5)
        orders = _watched(t.machine)
        assert t.target(t.machine.guests["1"]) == 600
        assert not await t.balancer.set_memory([("1", 601 * MIB)])
        more = other.holds() + 100 * MIB
        assert not await t.balancer.set_memory([("1", 590 * MIB), ("2", more + 2**30)])
        assert not await t.balancer.set_memory([("2", more)])
        assert not orders


@_in_virtual_time
async def test_an_order_counts_at_once():
    """Its numbers have their margins; what was told stays known if nothing shows it."""
    machine, balancer = _directly()
    machine.start("vm", 400 * MIB, 2000 * MIB)
    balancer.note_report("1", b"100000")
    orders = _watched(machine)
    await balancer.refresh()
    free = balancer.free
    assert await balancer.set_memory([("1", 500 * MIB)])
    assert balancer.free == free - 100 * MIB
    (order,) = orders
    assert order.target - order.guest_target == 16 * MIB
    assert order.limit - order.target == MIB
    machine.guests["1"].order(450 * MIB)
    await balancer.refresh()
    assert balancer.domains["1"].last_target == 500 * MIB
    assert balancer.free == free - 100 * MIB


@_in_virtual_time
async def test_a_domain_that_is_gone_is_forgotten_at_once():
    """It ended between the reading and the order."""
    machine, balancer = _directly()
    machine.start("vm", 400 * MIB, 2000 * MIB)
    balancer.note_report("1", b"100000")

    async def gone(order):
        raise DomainGoneError(order.domid)

    machine.set_target = gone
    assert await balancer.set_memory([("1", 500 * MIB)])
    assert balancer.domains.keys() == {"0"}
    machine.stop(machine.guests["1"])
    await balancer.refresh()
    assert not balancer.reported("1")


@_in_virtual_time
async def test_a_back_end_that_hangs_is_given_up():
    """Neither an order nor a reading takes longer than its time."""
    machine, balancer = _directly()
    machine.start("vm", 400 * MIB, 2000 * MIB)
    balancer.note_report("1", b"100000")
    machine.set_target = _for_ever
    async with asyncio.timeout(3):
        assert await balancer.set_memory([("1", 500 * MIB)])
    machine.read = _for_ever
    async with asyncio.timeout(3):
        await balancer.refresh()
    assert balancer.domains.keys() == {"0", "1"}


@_in_virtual_time
async def test_a_machine_that_shrinks_below_its_dom0_is_an_error():
    """A reading that makes no sense is not balanced by."""
    machine, balancer = _directly()
    machine.total = 900 * MIB
    with pytest.raises(HarnessError):
        await balancer.refresh()


@_in_virtual_time
async def test_a_start_leaves_the_minimum_free():
    """Donors are asked when only the hypervisor's part would be left."""
    machine, balancer = _directly()
    await balancer.refresh()
    orders = _watched(machine)
    assert await balancer.balloon(balancer.free - 24 * MIB)
    assert orders
    assert balancer.domains["0"].last_target < 1000 * MIB


@simulate
async def test_there_are_only_so_many_clients(tmp_path):
    """For one more the one goes that has sent nothing for longest."""
    async with trial(tmp_path) as t:
        idle = [await asyncio.open_unix_connection(t.path) for _ in range(256)]
        await t.until(lambda: len(t.server.clients) == 256)
        before = t.machine.now()
        await t.client.status()
        assert await idle[0][0].read() == b""
        # at once, not because it said nothing for too long
        assert t.machine.now() == before
        for _reader, writer in idle:
            writer.close()
        await t.until(lambda: not t.server.clients)
        await t.client.status()
