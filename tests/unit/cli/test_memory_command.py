"""Which timeline is shown where none is named."""

from __future__ import annotations

import os

from qubes_itests.cli.memory import _newest
from qubes_itests.host.cache import Cache
from qubes_itests.host.rundir import RunDirectory
from qubes_itests.qmemman.timeline import TIMELINE


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
