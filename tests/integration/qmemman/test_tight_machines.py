"""Machines that have just enough for real VMs, and less."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest

from qubes_itests.core.vm.start_memory import memory_for_start
from qubes_itests.exc import HarnessError
from qubes_itests.qmemman import timeline
from qubes_itests.qmemman.exc import MemoryRefusedError
from qubes_itests.qmemman.policy import DEFAULT_POLICY
from qubes_itests.qmemman.simulation.scenarios import MAXIMUM, MEMORY

MIB = 1 << 20
KIND = {"memory": MEMORY, "maximum": MAXIMUM}

#: What dom0 prefers when it uses 300 MiB, and a VM that idles.
DOM0, IDLE = 740, 200


def smallest(count):
    """Return the MiB of the smallest machine on which so many idle VMs start."""
    asked = memory_for_start(
        KIND["memory"] // MIB, vcpus=2, maxmem=KIND["maximum"] // MIB
    )
    kept = asked // MIB + 1 + DEFAULT_POLICY.free_to_keep // MIB
    return int((DOM0 + (count - 1) * IDLE + kept) / DEFAULT_POLICY.overhead_factor) + 1


def test_all_start_on_the_smallest_machine(open_world, run):
    """Four do; on one that is a little smaller the fourth is refused, with reasons."""

    async def program():
        async with open_world(smallest(4)) as world:
            for number in range(4):
                await world.start_idle(f"vm{number}", **KIND)
        async with open_world(smallest(4) - 32) as world:
            for number in range(3):
                await world.start_idle(f"vm{number}", **KIND)
            with pytest.raises(MemoryRefusedError) as caught:
                await world.start_idle("vm3", **KIND)
            error = caught.value
            assert set(error.holders) == {"dom0", "vm0", "vm1", "vm2"}
            assert 0 < error.asked - error.obtainable < 64 * MIB
            assert "vm3" not in [d.spec.name for d in world.app.hypervisor.domains()]

    run(program())


def test_the_first_vm_starts_when_dom0_has_reported(open_world, run):
    """Before, dom0 sits on all that it booted with: the start waits, and then works."""

    async def program():
        options = {"dom0": 1400, "dom0_used": 300, "dom0_reports": False}
        async with open_world(1500, **options) as world:
            dom0 = world.memory.backend.dom0
            start = asyncio.ensure_future(world.start_idle("first", **KIND))
            done, _ = await asyncio.wait([start], timeout=2)
            assert not done
            assert dom0.holds == 1400 * MIB
            assert world.domid("first") == ""
            dom0.report()
            await start
            assert dom0.holds < 1400 * MIB

    run(program())


def test_a_machine_without_room_for_dom0(open_world, run):
    async def program():
        async with open_world(900, dom0=1000):
            pass

    with pytest.raises(HarnessError, match="cannot hold a dom0 of 1000 MiB"):
        run(program())


@contextlib.contextmanager
def frozen(vm):
    """Have a VM's QEMU hang: nobody who asks it gets an answer."""
    wanted = f"guest={vm.domain.libvirt_name},".encode()
    pids = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if wanted in path.read_bytes()
    ]
    assert len(pids) == 1
    os.kill(pids[0], signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pids[0], signal.SIGCONT)


def test_a_domain_that_hangs_stops_nobody(open_world, run):
    """QEMU itself stands still: others get memory, and VMs start; it is not lost.

    It costs a few steps of the daemon, whatever time these take on a busy machine.
    """

    def steps(world):
        records = timeline.read(world.memory.timeline)
        return sum(record.event == "step" for record in records)

    async def program():
        async with open_world(3000) as world:
            for name in ("hangs", "work"):
                await world.start_idle(name, **KIND)
            await world.settled("hangs", "work")
            with frozen(world.app.domains["hangs"]):
                before = steps(world)
                await world.use("work", 900 * MIB)
                await world.until(
                    "memory",
                    lambda: world.target("work") >= 1170 * MIB,
                )
                assert steps(world) - before < 30
                await world.until("exclusion", lambda: world.excluded("hangs"))
                await world.start_idle("late", **KIND)
            await world.until("inclusion", lambda: not world.excluded("hangs"))

    run(program())


def test_memory_in_a_tmpfs_is_used(open_world, run):
    """It looks like page cache, and none of it can be given away."""

    async def program():
        async with open_world(2600) as world:
            await world.start_idle("work", **KIND)
            await world.settled("work")
            before = world.memory.domains()["work"].used
            fill = "dd if=/dev/zero of=/dev/shm/file bs=1M count=140 2>/dev/null"
            await world.vms["work"].run_for_stdio(fill, user="root")
            await world.until(
                "report",
                lambda: world.memory.domains()["work"].used > before + 100 * MIB,
            )

    run(program())


def test_a_vm_that_is_not_balanced_keeps_its_memory(open_world, run):
    """With maxmem 0 it never reports, and nothing is taken from it or given to it."""

    async def program():
        async with open_world(2600) as world:
            vm = world.app.add_new_vm("AppVM", name="fixed", label="red", memory=400)
            await vm.create_on_disk()
            await vm.start()
            await world.start_idle("work", **KIND)
            await world.settled("work")
            await world.use("work", 900 * MIB)
            state = world.memory.domains()["fixed"]
            assert (state.used, state.current) == (None, 400 * MIB)
            statistics = await vm.domain.memory_statistics()
            assert statistics.actual == 400 * MIB

    run(program())


def test_a_cold_vm_counts_as_what_it_was_promised(open_world, run):
    """It has its maximum until its balloon is up; from a saved state it never has."""

    async def program():
        async with open_world(2600) as world:
            saved, world.app.warm_starts = world.app.warm_starts, None
            vm = world.app.add_new_vm(
                "AppVM", name="cold", label="red", memory=400, maxmem=800
            )
            await vm.create_on_disk()

            def reported():
                state = world.memory.domains().get("cold")
                assert state is None or state.used or state.actual == 400 * MIB
                return state is not None and state.used is not None

            start = asyncio.ensure_future(vm.start())
            await world.until("report of a cold VM", reported)
            await start
            await vm.kill()
            world.app.warm_starts = saved
            await vm.start()
            statistics = await vm.domain.memory_statistics()
            # the last page may go beyond what it was told
            assert statistics.actual <= world.memory.domains()["cold"].actual + 4096

    run(program())


def test_idle_guests_give_at_once(open_world, run):
    """128 MiB for a starting VM are there soon; afterwards everything rests."""

    async def program():
        async with open_world(2000) as world:
            for name in ("one", "two"):
                await world.start_idle(name, **KIND)
            await world.settled("one", "two")
            amount = world.memory.balancer.free + 128 * MIB
            clock = asyncio.get_running_loop().time
            begin = clock()
            with world.patient():
                async with world.memory.client.memory(amount):
                    assert clock() - begin < 2 * world.slowness
            await world.settled("one", "two", still=8)

    run(program())
