"""How fast qmemman moves memory between real guests.

Run: ``.venv/bin/python tests/benchmarks/memory.py [ROUNDS]``

Three VMs on a machine of 2600 MiB: from the rise of one's use to its new target; from
the request for a VM's start to the 128 MiB that idle guests gave for it; and how often
targets change in 60 s in which nothing happens.
"""

from __future__ import annotations

import asyncio
import sys
import time

from bench import app_on, heading, row, testbed
from vm_world import VMWorld

from qubes_itests.qmemman.budget import MemoryBudget
from qubes_itests.qmemman.simulation.scenarios import (
    DOM0,
    DOM0_USED,
    MAXIMUM,
    MEMORY,
    TOTAL,
)
from qubes_itests.qmemman.timeline import read

MIB = 1 << 20
NAMES = ("work", "idle", "other")
BALLOON = 128 * MIB
STEADY = 60


async def rise(world):
    """Return the seconds to a guest's new target: from the command, from the use.

    It uses so much more that it prefers more than it has, and has all that it uses.
    """
    before = world.target("work")
    use = int(0.85 * before)
    wanted = int(1.3 * use) - 13 * MIB
    assert wanted > before
    command = time.perf_counter()
    await world.use("work", use)
    used = time.perf_counter()
    await world.until("target", lambda: world.target("work") >= wanted)
    end = time.perf_counter()
    await world.use("work", 200 * MIB)
    await world.settled(*NAMES)
    return end - command, end - used


async def balloon(world):
    """Return the seconds that idle guests took to give 128 MiB more than is free."""
    memory = world.memory
    amount = memory.balancer.free + BALLOON
    held = sum(state.current for state in memory.domains().values())
    start = time.perf_counter()
    async with memory.client.memory(amount):
        taken = time.perf_counter() - start
        gave = held - sum(state.current for state in memory.domains().values())
        assert gave >= 0.9 * BALLOON, gave
    await world.settled(*NAMES)
    return taken


def changes(timeline, since):
    """Return how many targets a timeline has changed after a time."""
    records = [r for r in read(timeline) if r.time >= since]
    return sum(len(r.targets) for r in records)


async def measure(testbed, app, rounds):
    """Print all figures."""
    budget = MemoryBudget(total=TOTAL * MIB, dom0=DOM0 * MIB, dom0_used=DOM0_USED * MIB)
    memory = await testbed.balance_memory(app, budget)
    world = VMWorld(app, memory)
    for name in NAMES:
        await world.start(name, memory=MEMORY, maximum=MAXIMUM)
    await world.settled(*NAMES)
    heading("Memory of real guests")
    commands, rises = zip(*[await rise(world) for _ in range(rounds)], strict=True)
    row("from the command to use more to the new target", commands)
    row("from the rise of use to the new target", rises, bound="< 1.5 s")
    figures = [await balloon(world) for _ in range(rounds)]
    row("128 MiB out of idle guests", figures, bound="< 2 s")
    since = asyncio.get_running_loop().time()
    await asyncio.sleep(STEADY)
    changed = changes(memory.timeline, since)
    row(f"targets changed in {STEADY} s of rest", [changed], "", "0")


def main():
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with testbed() as bed, app_on(bed) as app:
        bed.portal.run(measure(bed, app, rounds))


if __name__ == "__main__":
    main()
