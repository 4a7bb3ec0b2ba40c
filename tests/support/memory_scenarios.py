"""Scenarios of memory; each runs on any world, on a machine of 2600 MiB.

All VMs are of one kind, so that one saved state starts them all.
"""

from __future__ import annotations

import asyncio

MIB = 1024**2
TOTAL, DOM0, DOM0_USED = 2600, 1000, 300
KIND = {"memory": 400 * MIB, "maximum": 1200 * MIB}


async def started(world, *names):
    """Start VMs, and wait until they have what they should have."""
    for name in names:
        await world.start(name, **KIND)
    await world.settled(*names)


async def fourth_vm(world):
    """Start a fourth VM: the others give, but none goes below what it uses."""
    names = [f"vm{number}" for number in range(4)]
    await started(world, *names[:3])
    before = sum(world.target(name) for name in names[:3])
    await started(world, names[3])
    assert sum(world.target(name) for name in names[:3]) < before - 100 * MIB
    assert all(world.target(name) > 260 * MIB for name in names)
    assert not any([await world.lacked(name) for name in names])


async def pressure(world):
    """Put a VM under pressure: it gains in time, and gives when it is idle again."""
    await started(world, "work", "idle", "other")
    await world.use("work", 560 * MIB)
    wanted = int(1.3 * 560) * MIB
    taken = await world.until("more memory", lambda: world.target("work") >= wanted)
    assert taken < 1.5
    await world.use("work", 200 * MIB)
    await world.until("memory back", lambda: world.target("work") < 600 * MIB)
    assert not await world.lacked("work")


async def stuck_vm(world):
    """Let a VM hang: it is excluded, and used again once it responds."""
    await started(world, "stuck", "work")
    await world.hang("stuck")
    await world.use("work", 900 * MIB)
    await world.until("exclusion", lambda: world.excluded("stuck"))
    await world.respond("stuck")
    await world.until("inclusion", lambda: not world.excluded("stuck"))
    assert not await world.lacked("stuck")


async def stuck_vm_in_need(world):
    """Let a VM hang: it is used again once it needs more than it has."""
    await started(world, "stuck", "work")
    await world.hang("stuck")
    await world.use("work", 900 * MIB)
    await world.until("exclusion", lambda: world.excluded("stuck"))
    await world.use("stuck", 600 * MIB)
    await world.until("inclusion", lambda: not world.excluded("stuck"))
    assert not await world.lacked("stuck")


async def death(world):
    """Let a VM die under way and another pause: that stops nothing."""
    await started(world, "dies", "sleeps", "work")
    use = asyncio.ensure_future(world.use("work", 700 * MIB))
    await world.die("dies")
    await world.pause("sleeps")
    await use
    await world.until("memory", lambda: world.target("work") >= 900 * MIB)
    await world.resume("sleeps")
    assert not await world.lacked("work")


async def growing_dom0(world):
    """Let dom0 grow: an idle VM gives."""
    await started(world, "idle")
    held = world.target("idle")
    await world.use("dom0", 1300 * MIB)
    wanted = int(1.3 * 1300 + 350) * MIB
    await world.until("memory for dom0", lambda: world.target("dom0") >= wanted)
    assert world.target("idle") < held
    assert not await world.lacked("idle")


SCENARIOS = (fourth_vm, pressure, stuck_vm, stuck_vm_in_need, death, growing_dom0)
