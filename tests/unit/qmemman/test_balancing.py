"""The daemon on a simulated machine: good guests and bad ones."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path

import pytest
from memory_machine import MIB, trial

from qubes_itests.exc import HarnessError
from qubes_itests.qmemman.exc import MemoryRefusedError
from qubes_itests.qmemman.simulation import virtual_time
from qubes_itests.qmemman.simulation.machine import SimulatedMachine
from qubes_itests.qmemman.timeline import Recorder


def simulate(program):
    """Make a test of a coroutine function: it runs in virtual time."""

    def test(tmp_path):
        virtual_time.run(program(tmp_path))

    test.__doc__ = program.__doc__
    return test


@simulate
async def test_the_fourth_vm_squeezes_the_others(tmp_path):
    async with trial(tmp_path, total=3200) as t:
        guests = [await t.start(f"vm{i}", 400, 2000, 250) for i in range(3)]
        await t.until(lambda: all(t.target(g) > 500 for g in guests))
        before = t.machine.now()
        guests.append(await t.start("vm3", 700, 2000, 250))
        assert t.machine.now() - before < 2
        await t.until(lambda: t.target(guests[3]) > 500)
        assert all(guest.squeezed == 0 for guest in guests)


@simulate
async def test_a_vm_under_pressure_gains_and_idle_ones_give(tmp_path):
    async with trial(tmp_path, total=3000) as t:
        busy, idle = [await t.start(name, 400, 2500, 250) for name in ("busy", "idle")]
        await t.until(lambda: t.target(idle) > 600)
        target = t.target(busy)
        busy.use(600 * MIB)
        assert await t.until(lambda: t.target(busy) > target) < 1.5
        await t.until(lambda: t.target(busy) >= 780)
        assert t.target(idle) < target


@simulate
async def test_a_steady_state_stays(tmp_path):
    async with trial(tmp_path) as t:
        guests = [await t.start(f"vm{i}", 400, 2000, 250 + 50 * i) for i in range(3)]
        await asyncio.sleep(10)
        targets = [t.target(guest) for guest in guests]
        for _ in range(60):
            await asyncio.sleep(1)
            assert [t.target(guest) for guest in guests] == targets


@simulate
async def test_a_stuck_guest_is_left_alone_until_it_needs_more(tmp_path):
    async with trial(tmp_path, total=3200) as t:
        stuck, good = [
            await t.start(name, 900, 2000, 600) for name in ("stuck", "good")
        ]
        await t.until(lambda: t.target(stuck) > 800)
        stuck.stuck = True
        stuck.use(200 * MIB)
        good.use(1300 * MIB)
        await t.until(lambda: t.balancer.domains["1"].no_progress)
        stuck.stuck = False
        stuck.use(stuck.holds())
        await t.until(lambda: not t.balancer.domains["1"].no_progress)


@simulate
async def test_a_guest_that_gets_stuck_on_its_way_down_starves_nobody(tmp_path):
    """It began to give, so it was slow at first; what others gave is not kept back."""
    async with trial(tmp_path, total=3600) as t:
        names = ("stuck", "other", "work")
        stuck, other, work = [await t.start(name, 400, 2000, 250) for name in names]
        await t.until(lambda: t.target(stuck) > 700)
        stuck.rate = 20 * MIB
        work.use(1500 * MIB)
        await t.until(lambda: t.balancer.domains["1"].slow_memset_react)
        stuck.stuck = True
        await t.until(lambda: t.balancer.domains["1"].no_progress)
        await t.until(lambda: t.target(work) >= 1850)
        assert other.squeezed == 0


@simulate
async def test_a_starting_vm_gets_around_a_stuck_guest(tmp_path):
    async with trial(tmp_path, total=3000) as t:
        stuck = await t.start("stuck", 400, 2000, 150)
        await t.start("good", 400, 2000, 150)
        await asyncio.sleep(5)
        stuck.stuck = True
        held = stuck.holds()
        new = await t.start("new", 500, 1000, 200)
        assert (new.holds(), stuck.holds()) == (500 * MIB, held)


@simulate
async def test_a_starting_vm_waits_for_a_donor_that_takes_a_while(tmp_path):
    """Nothing has moved yet at the next look: no reason to refuse."""
    async with trial(tmp_path, total=3000) as t:
        donor = await t.start("donor", 400, 2000, 150)
        await asyncio.sleep(5)
        donor.delay = t.machine.dom0.delay = 0.35
        new = await t.start("new", 700, 1000, 200)
        assert new.holds() == 700 * MIB


@simulate
async def test_a_guest_that_dies_in_the_middle_stops_nothing(tmp_path):
    async with trial(tmp_path, total=3000) as t:
        dying = await t.start("dying", 400, 2000, 150)
        other = await t.start("other", 400, 2000, 150)
        await asyncio.sleep(5)
        for guest in (dying, other):
            guest.rate = 200 * MIB
        start = asyncio.create_task(t.start("new", 700, 1000, 200))
        await asyncio.sleep(0.3)
        t.machine.stop(dying)
        await start
        other.use(900 * MIB)
        await t.until(lambda: t.target(other) >= 1150)


@simulate
async def test_a_paused_guest_is_not_fed(tmp_path):
    async with trial(tmp_path, total=3000) as t:
        paused, other = [await t.start(n, 300, 2000, 500) for n in ("paused", "other")]
        t.machine.pause(paused)
        await asyncio.sleep(1)
        target = t.target(paused)
        other.use(800 * MIB)
        await t.until(lambda: t.target(other) > 1000)
        assert t.target(paused) == target
        t.machine.resume(paused)
        await t.until(lambda: t.target(paused) > target or target > 600)


@simulate
async def test_lies_and_nonsense_are_not_reported(tmp_path):
    async with trial(tmp_path) as t:
        guest = await t.start("liar", 400, 1000, 300)
        await asyncio.sleep(3)
        target = t.target(guest)
        for lie in (b"-5", b"%d" % 2**70, b"1e9", b"", b"\xff" * 4000, b"12 13"):
            guest.report(lie)
            await asyncio.sleep(0.5)
            assert t.target(guest) == target
        guest.report(b"%d" % 2**40)
        await asyncio.sleep(0.5)
        assert t.target(guest) <= 1000


@simulate
async def test_a_refusal_says_who_holds_the_memory(tmp_path):
    async with trial(tmp_path, total=2000) as t:
        await t.start("big", 600, 1000, 700)
        with pytest.raises(MemoryRefusedError, match="1500 MiB asked") as caught:
            await t.start("new", 1500, 2000, 10)
        assert 0 < caught.value.obtainable < 1500 * MIB
        assert set(caught.value.holders) == {"dom0", "big"}
        # and the next that fits is served
        await t.start("small", 100, 400, 50)


@simulate
async def test_the_first_vm_waits_for_dom0_to_report_and_shrink(tmp_path):
    async with trial(tmp_path, total=2000, dom0=2000, dom0_used=0) as t:
        t.machine.dom0.stop()
        start = asyncio.create_task(t.start("first", 400, 800, 200))
        await asyncio.sleep(5)
        assert not start.done()
        t.machine.dom0.report(b"300000")
        assert (await start).holds() == 400 * MIB


@simulate
async def test_a_back_end_that_fails_once_is_asked_again(tmp_path):
    async with trial(tmp_path) as t:
        guest = await t.start("vm", 400, 2000, 250)
        read = t.machine.read
        failures = iter((OSError("no"), KeyError("no")))

        async def failing():
            if error := next(failures, None):
                raise error
            return await read()

        t.machine.read = failing
        guest.use(1200 * MIB)
        await t.until(lambda: t.target(guest) > 1500, within=30)
        assert next(failures, None) is None


@simulate
async def test_a_domain_that_cannot_be_told_stops_nobody(tmp_path):
    async with trial(tmp_path, total=3200) as t:
        deaf, work = [await t.start(name, 400, 2000, 250) for name in ("deaf", "work")]
        set_target = t.machine.set_target

        async def failing(order):
            if order.domid == deaf.domid:
                raise OSError("no")
            await set_target(order)

        t.machine.set_target = failing
        work.use(900 * MIB)
        await t.until(lambda: t.target(work) >= 1170)
        await t.start("new", 400, 2000, 100)


@simulate
async def test_a_full_disk_stops_no_balancing(tmp_path):
    with closing(Recorder(Path("/dev/full"), lambda: 0.0)) as recorder:
        async with trial(tmp_path, recorder=recorder) as t:
            guest = await t.start("vm", 400, 2000, 250)
            guest.use(1200 * MIB)
            await t.until(lambda: t.target(guest) > 1500)


@simulate
async def test_a_machine_smaller_than_its_dom0_is_refused(tmp_path):
    with pytest.raises(HarnessError, match="4000 MiB"):
        SimulatedMachine(2000 * MIB, 4000 * MIB)
    machine = SimulatedMachine(2000 * MIB, 1900 * MIB)
    with pytest.raises(MemoryRefusedError, match="100 MiB obtainable; held by dom0"):
        machine.start("unasked", 400 * MIB, 400 * MIB)
    assert not list(tmp_path.iterdir())
