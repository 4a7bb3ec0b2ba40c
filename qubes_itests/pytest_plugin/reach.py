"""Answers those who ask what a run does, and want a shell in its VMs."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from qubes_itests import timeline
from qubes_itests.serve.calls import CallServer
from qubes_itests.serve.reach import SOCKET
from qubes_itests.timeline import line_of
from qubes_itests.timeline.words import called

if TYPE_CHECKING:
    from collections.abc import Generator

    from qubes_itests.run.context import RunContext

__all__ = ["RunReach"]


class RunReach:
    """A pytest plugin of each process that runs tests: ``ps`` and ``attach`` ask it.

    :param config: pytest's.
    :param context: the run.
    """

    def __init__(self, config: pytest.Config, context: RunContext) -> None:
        self._directory = str(config.invocation_params.dir)
        self._context = context
        self._server: CallServer | None = None
        self._test = self._phase = ""
        self._began = 0.0

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Take note of the test."""
        self._test, self._phase, self._began = nodeid, "", time.monotonic()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self) -> Generator[None, Any, Any]:
        """Take note of the phase."""
        self._enter("setup")
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self) -> Generator[None, Any, Any]:
        """Take note of the phase."""
        self._enter("call")
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self) -> Generator[None, Any, Any]:
        """Take note of the phase."""
        self._enter("teardown")
        return (yield)

    def pytest_runtest_logfinish(self) -> None:
        """Take note that no test runs."""
        self._test = self._phase = ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        """Answer no more: the VMs end now, and then the event loop."""
        if self._server is not None:
            server, self._server = self._server, None
            self._context.portal.run(server.__aexit__())

    def _enter(self, phase: str) -> None:
        self._phase = phase
        testbed = self._context.opened_testbed
        # Before there is a testbed there is nothing to be reached. Between two phases,
        # where no test counts what it has left open.
        if testbed is not None and self._server is None:
            # A directory of its own, as that of the run is locked for as long as it is.
            path = self._context.directory / SOCKET
            path.parent.mkdir(mode=0o700)
            server = CallServer(lambda: testbed.apps, path, self._doing)
            self._context.portal.run(server.__aenter__())
            self._server = server

    def _doing(self) -> dict[str, object]:
        """Return what is told to who asks. On the event loop, while a test runs."""
        recorder = timeline.current()
        frame = sys._current_frames().get(threading.main_thread().ident or 0)  # noqa: SLF001
        line = line_of(frame)
        calls = recorder.open() if recorder else []
        # what goes on in the background has been asked for elsewhere
        waits = [record for record in calls if record.get("where") == line]
        return {
            "directory": self._directory,
            "test": self._test,
            "phase": self._phase,
            "seconds": round(time.monotonic() - self._began, 3) if self._test else 0,
            "line": line,
            "waits": called(waits[-1]) if line and waits else "",
        }
