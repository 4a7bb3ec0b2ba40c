"""The process that hands tests to workers."""

from __future__ import annotations

from xdist.workermanage import WorkerController

from qubes_itests.pytest_plugin.controller import _has_ended


def test_a_worker_that_was_about_to_begin_is_not_waited_for():
    """It is known before it has a channel: Ctrl-C may come in between."""
    assert _has_ended(WorkerController.__new__(WorkerController))
