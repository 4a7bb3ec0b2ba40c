"""The timeline: what it holds, and files that are none."""

from __future__ import annotations

import pytest
from memory_machine import MIB
from memory_recording import record_refusal

from qubes_itests.qmemman import timeline
from qubes_itests.qmemman.exc import TimelineError


def test_every_decision_is_in_it(tmp_path):
    path = record_refusal(tmp_path)
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


def test_the_end_of_a_long_timeline_is_whole_records(tmp_path):
    path = record_refusal(tmp_path)
    records, size = timeline.read(path), path.stat().st_size
    last = len(path.read_bytes().splitlines(keepends=True)[-1])
    for most in (size + 1, size, size - 1, last, last - 1, 1):
        found = timeline.read(path, most)
        assert found == records[len(records) - len(found) :]
        assert len(timeline.tail(path, most)) <= most
    assert len(timeline.read(path, last)) == 1
    assert timeline.read(path, last - 1) == []


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
