"""The timeline: what it holds, and files that are none."""

from __future__ import annotations

import asyncio
from contextlib import closing

import pytest
from memory_machine import MIB, trial

from qubes_itests.qmemman import timeline, virtual_time
from qubes_itests.qmemman.exc import MemoryRefusedError, TimelineError


def recorded(directory):
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


def test_every_decision_is_in_it(tmp_path):
    path = recorded(tmp_path)
    records = timeline.read(path)
    assert {"balance", "granted", "refused", "note"} <= {r.event for r in records}
    assert [r.time for r in records] == sorted(r.time for r in records)
    last = records[-1]
    assert [d.name for d in last.domains.values()] == ["dom0", "work", "web"]
    assert last.domains["1"].used == 900 * MIB
    assert last.domains["1"].preferred == int(1170 * MIB)
    with path.open("a") as file:
        file.write('{"time":1,"eve')
    assert timeline.read(path) == records


@pytest.mark.parametrize(
    "line", ["x", "[]", "{}", '{"domains":{"1":{"a":1}}}', '{"domains":3}', "7"]
)
def test_other_files_are_refused_with_the_line(tmp_path, line):
    path = tmp_path / "other"
    path.write_text(f"{line}\n")
    with pytest.raises(TimelineError, match="line 1"):
        timeline.read(path)
    with pytest.raises(TimelineError, match="no-such"):
        timeline.read(tmp_path / "no-such")
