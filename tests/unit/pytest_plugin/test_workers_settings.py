"""What a worker makes of the settings of its run."""

from types import SimpleNamespace

import pytest

from qubes_itests.pytest_plugin import worker
from qubes_itests.run.settings import Settings, plain


@pytest.mark.parametrize(
    ("cpus", "workers", "clones"), [(8, 2, 4), (4, 3, 2), (2, 2, 0), (2, 3, 0)]
)
def test_clones_ahead_are_shared_out(monkeypatch, cpus, workers, clones):
    """There are none where each CPU has a worker, and so none is idle for long."""
    monkeypatch.setattr(worker.os, "sched_getaffinity", lambda _: set(range(cpus)))
    told = {"settings": plain(Settings()), "workers": workers, "remote": False}
    config = SimpleNamespace(workerinput={worker.KEY: told})
    assert worker.settings(config).clones_ahead == clones
