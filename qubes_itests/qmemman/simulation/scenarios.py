"""Scenarios of a machine of 2600 MiB; each runs on any world, under any qmemman.

All VMs are of one kind, so that one saved state starts them all.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from qubes_itests.qmemman.sizes import MIB

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from qubes_itests.qmemman.simulation.scenario import World

__all__ = ["DOM0", "DOM0_USED", "MAXIMUM", "MEMORY", "SCENARIOS", "TOTAL"]

#: MiB of the machine, what dom0 holds after boot, and what it uses.
TOTAL: Final = 2600
DOM0: Final = 1000
DOM0_USED: Final = 300
#: Bytes that a VM starts with, and to which it may grow.
MEMORY: Final = 400 * MIB
MAXIMUM: Final = 1200 * MIB


async def _started(world: World, *names: str) -> None:
    """Start VMs, and wait until they have what they should have."""
    for name in names:
        await world.start(name, memory=MEMORY, maximum=MAXIMUM)
    await world.settled(*names)


async def fourth_vm(world: World) -> None:
    """Start a fourth VM: the others give, but none goes below what it uses."""
    names = [f"vm{number}" for number in range(4)]
    await _started(world, *names[:3])
    before = sum(world.target(name) for name in names[:3])
    await _started(world, names[3])
    after = sum(world.target(name) for name in names[:3])
    world.expect("the others give 100 MiB", holds=after < before - 100 * MIB)
    enough = all(world.target(name) > 260 * MIB for name in names)
    world.expect("all have what they prefer", holds=enough)
    await world.expect_enough(*names)


async def pressure(world: World) -> None:
    """Put a VM under pressure: it gains in time, and gives when it is idle again."""
    await _started(world, "work", "idle", "other")
    await world.use("work", 560 * MIB)
    wanted = int(1.3 * 560) * MIB
    taken = await world.until("more memory", lambda: world.target("work") >= wanted)
    soon = taken < 1.5 * world.slowness
    world.expect("more memory within 1.5 s", holds=soon)
    await world.use("work", 200 * MIB)
    await world.until("memory back", lambda: world.target("work") < 600 * MIB)
    await world.expect_enough("work")


async def stuck_vm(world: World) -> None:
    """Let a VM hang: it is excluded, and used again once it responds."""
    await _started(world, "stuck", "work")
    await world.hang("stuck")
    await world.use("work", 900 * MIB)
    await world.until("exclusion", lambda: world.excluded("stuck"))
    await world.respond("stuck")
    await world.until("inclusion", lambda: not world.excluded("stuck"))
    await world.expect_enough("stuck")


async def stuck_vm_in_need(world: World) -> None:
    """Let a VM hang: it is used again once it needs more than it has."""
    await _started(world, "stuck", "work")
    await world.hang("stuck")
    await world.use("work", 900 * MIB)
    await world.until("exclusion", lambda: world.excluded("stuck"))
    await world.use("stuck", 600 * MIB)
    await world.until("inclusion", lambda: not world.excluded("stuck"))
    await world.expect_enough("stuck")


async def death(world: World) -> None:
    """Let a VM die under way and another pause: that stops nothing."""
    await _started(world, "dies", "sleeps", "work")
    use = asyncio.ensure_future(world.use("work", 700 * MIB))
    await world.die("dies")
    await world.pause("sleeps")
    await use
    await world.until("memory", lambda: world.target("work") >= 900 * MIB)
    await world.resume("sleeps")
    await world.expect_enough("work")


async def growing_dom0(world: World) -> None:
    """Let dom0 grow: an idle VM gives."""
    await _started(world, "idle")
    held = world.target("idle")
    await world.use("dom0", 1300 * MIB)
    wanted = int(1.3 * 1300 + 350) * MIB
    await world.until("memory for dom0", lambda: world.target("dom0") >= wanted)
    world.expect("the idle VM gives", holds=world.target("idle") < held)
    await world.expect_enough("idle")


_ALL: Final = (fourth_vm, pressure, stuck_vm, stuck_vm_in_need, death, growing_dom0)

#: By name.
SCENARIOS: Final[Mapping[str, Callable[[World], Awaitable[None]]]] = {
    scenario.__name__: scenario for scenario in _ALL
}
