"""Scenarios of memory; each runs on any world, on a machine of 3200 MiB."""

from __future__ import annotations

import asyncio

MIB = 1024**2
TOTAL, DOM0, DOM0_USED = 3200, 1000, 300


async def fourth_vm(world):
    """Start a fourth VM: the others give, but none goes below what it uses."""
    for number in range(4):
        name = f"vm{number}"
        await world.start(name, memory=600 * MIB, maximum=2000 * MIB)
    names = [f"vm{number}" for number in range(4)]
    await world.until(
        "targets", lambda: all(world.target(n) > 400 * MIB for n in names)
    )
    await asyncio.sleep(2)
    assert not any([await world.lacked(name) for name in names])


async def pressure(world):
    """Put a VM under pressure: it gains in time."""
    for name in ("work", "idle"):
        await world.start(name, memory=400 * MIB, maximum=2500 * MIB)
    await asyncio.sleep(3)
    await world.use("work", 1200 * MIB)
    wanted = int(1.3 * 1200) * MIB
    taken = await world.until("more memory", lambda: world.target("work") >= wanted)
    assert taken < 1.5


async def stuck_vm(world):
    """Let a VM hang: it is excluded, and used again once it needs more."""
    for name in ("stuck", "work"):
        await world.start(name, memory=900 * MIB, maximum=2000 * MIB)
    await asyncio.sleep(3)
    await world.hang("stuck")
    await world.use("stuck", 200 * MIB)
    await world.use("work", 1300 * MIB)
    await world.until("exclusion", lambda: world.excluded("stuck"))
    await world.use("stuck", 1000 * MIB)
    await world.until("inclusion", lambda: not world.excluded("stuck"))


async def death(world):
    """Let a VM die under way and another pause: that stops nothing."""
    for name in ("dies", "sleeps", "work"):
        await world.start(name, memory=500 * MIB, maximum=2000 * MIB)
    await world.use("work", 1200 * MIB)
    await world.die("dies")
    await world.pause("sleeps")
    await world.until("memory", lambda: world.target("work") >= 1500 * MIB)
    await world.resume("sleeps")


async def growing_dom0(world):
    """Let dom0 grow: an idle VM gives."""
    await world.start("idle", memory=400 * MIB, maximum=2500 * MIB)
    await asyncio.sleep(3)
    await world.use("dom0", 1000 * MIB)
    wanted = int(1.3 * 1000 + 350) * MIB
    await world.until("memory for dom0", lambda: world.target("dom0") >= wanted)


SCENARIOS = (fourth_vm, pressure, stuck_vm, death, growing_dom0)
