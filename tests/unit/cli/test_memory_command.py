"""Which timeline is shown where none is named."""

from __future__ import annotations

import os

from qubes_itests.cli.memory import _newest
from qubes_itests.cli.memory_comparison import _lines
from qubes_itests.dom0.memory_trials import Trial
from qubes_itests.host.cache import Cache
from qubes_itests.host.rundir import RunDirectory
from qubes_itests.qmemman.timeline import TIMELINE, DomainRecord, Record


def test_it_is_the_one_written_to_last_of_a_run_or_of_its_workers(tmp_path):
    cache = Cache(tmp_path)
    assert _newest(cache) is None
    with RunDirectory(cache) as run:
        paths = [run.path / part / "vm/apps/1" / TIMELINE for part in ("", "gw0")]
        for path in paths:
            path.parent.mkdir(parents=True)
            path.touch()
            os.utime(path, (0, 0))
        for now, path in enumerate([*paths, paths[0]], 1):
            os.utime(path, (now, now))
            assert _newest(cache) == path


def test_a_qmemman_that_recorded_nothing_has_its_problem_told():
    work = DomainRecord(
        name="work", used=None, current=0, actual=0, target=3 << 20, preferred=None,
        maximum=0,
    )  # fmt: skip
    record = Record(time=0.0, event="look", total=0, free=0, domains={"1": work})
    trials = {"ours": Trial([record], None), "theirs": Trial([], "it has ended")}
    lines = [line.split() for line in _lines("life", trials)]
    assert lines == [
        ["life", "ours", "theirs"],
        ["work", "3", "MiB", "-"],
        ["theirs:", "it", "has", "ended"],
        [],
    ]
