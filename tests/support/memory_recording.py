"""A recorded simulation: work under pressure, and a VM that is refused."""

from __future__ import annotations

import asyncio
from contextlib import closing

import pytest
from memory_machine import MIB, trial

from qubes_itests.qmemman import timeline
from qubes_itests.qmemman.exc import MemoryRefusedError
from qubes_itests.qmemman.simulation import virtual_time


def record_refusal(directory):
    """Record VMs that start and work until one is refused, and return the file."""
    path = directory / "memory.jsonl"

    async def program():
        clock = asyncio.get_running_loop().time
        with closing(timeline.Recorder(path, clock)) as recorder:
            async with trial(directory, total=3000, recorder=recorder) as t:
                guest = await t.start("work", 400, 2000, 250)
                await t.start("web", 600, 2000, 400)
                await asyncio.sleep(5)
                recorder.note("work needs 900 MiB")
                guest.use(900 * MIB)
                await asyncio.sleep(10)
                with pytest.raises(MemoryRefusedError):
                    await t.start("huge", 2500, 2500, 1)

    virtual_time.run(program())
    return path
