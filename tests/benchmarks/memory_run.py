"""A run of four real VMs on a small machine, for the picture in the README.

Run: ``.venv/bin/python tests/benchmarks/memory_run.py docs/memory-run.svg``

With ``--timeline`` the timeline is written beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
from pathlib import Path

from bench import app_on, heading, row, testbed
from vm_world import VMWorld

from qubes_itests.qmemman import plot, timeline
from qubes_itests.qmemman.budget import MemoryBudget
from qubes_itests.qmemman.exc import MemoryRefusedError

MIB = 1024**2
TITLE = "Four real VMs: who holds the memory"
#: The machine, and a small dom0.
BUDGET = MemoryBudget(total=2600 * MIB, dom0=2600 * MIB, dom0_used=200 * MIB)


async def story(world):
    """Start, work, start one too many, rest; return how long the answers took."""
    taken = {}
    clock = asyncio.get_running_loop().time
    await asyncio.sleep(2)
    for name in ("web", "mail", "work"):
        await world.start_idle(name, memory=300 * MIB, maximum=1400 * MIB)
        await asyncio.sleep(2)
    before = world.target("work")
    working = asyncio.create_task(world.use("work", 800 * MIB))
    taken["from a rise of use to a higher target"] = await world.until(
        "target", lambda: world.target("work") > before + 50 * MIB, timeout=30
    )
    await working
    await asyncio.sleep(4)
    start = clock()
    with contextlib.suppress(MemoryRefusedError):
        await world.start_idle("large", memory=700 * MIB, maximum=1400 * MIB)
    taken["until a VM of 700 MiB is refused"] = clock() - start
    await asyncio.sleep(3)
    await world.use("work", 300 * MIB)
    await asyncio.sleep(3)
    start = clock()
    await world.start_idle("build", memory=700 * MIB, maximum=1400 * MIB)
    taken["until it has started and reported, when there is memory"] = clock() - start
    await asyncio.sleep(4)
    await world.use("build", 700 * MIB)
    await asyncio.sleep(5)
    return taken


def main():
    """Run it, print the figures and draw the picture."""
    target = Path(sys.argv[1]).absolute()
    with testbed() as bed, app_on(bed) as app:
        memory = bed.portal.run(bed.balance_memory(app, BUDGET))
        taken = bed.portal.run(story(VMWorld(app, memory)))
        records = timeline.read(memory.timeline)
        target.write_text(plot.draw(records, TITLE))
        if "--timeline" in sys.argv:
            shutil.copy(memory.timeline, target.with_suffix(".jsonl"))
        heading("Four real VMs on a machine of 2600 MiB")
        for name, seconds in taken.items():
            row(name, [seconds])


if __name__ == "__main__":
    main()
