"""Answers those who ask what a run does, and want a shell in its VMs."""

from __future__ import annotations

import logging
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from qubes_itests import timeline
from qubes_itests.exc import HarnessError
from qubes_itests.serve.calls import CallServer
from qubes_itests.serve.place import Place
from qubes_itests.timeline import line_of
from qubes_itests.timeline.words import waited_for

if TYPE_CHECKING:
    from collections.abc import Generator

    from qubes_itests.core.app import Qubes
    from qubes_itests.pytest_plugin.deadline import Deadline
    from qubes_itests.run.context import RunContext

__all__ = ["RunReach"]

log = logging.getLogger(__name__)


class RunReach:
    """A pytest plugin of each process that runs tests: ``ps`` and ``attach`` ask it.

    :param config: pytest's.
    :param context: the run.
    :param deadline: stands still while somebody is in a shell of ``attach``.
    """

    def __init__(
        self, config: pytest.Config, context: RunContext, deadline: Deadline
    ) -> None:
        self._deadline = deadline
        self._directory = str(config.invocation_params.dir)
        self._context = context
        self._test = self._phase = ""
        self._began = 0.0

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, Any, Any]:
        """Answer while tests run."""
        if session.config.option.collectonly:
            return (yield)
        try:
            # a directory of its own: that of the run is locked as long as it lives
            path = Place.of_run(self._context.directory).relay_socket
            path.parent.mkdir(mode=0o700)
            server = CallServer(self._apps, path, self._doing, self._deadline.stopped)
            self._context.portal.run(server.__aenter__())
        except (OSError, HarnessError) as error:
            # tests that need none of this may run all the same
            log.warning("nobody can look into this run: %s", str(error))
            return (yield)
        try:
            return (yield)
        finally:
            # before the VMs end, and the event loop with them
            self._context.portal.run(server.__aexit__())

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Take note of the test."""
        self._test, self._phase, self._began = nodeid, "", time.monotonic()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        """Take note of the phase."""
        self._phase = "setup"

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self) -> None:
        """Take note of the phase."""
        self._phase = "call"

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self) -> None:
        """Take note of the phase."""
        self._phase = "teardown"

    def pytest_runtest_logfinish(self) -> None:
        """Take note that no test runs."""
        self._test = ""

    def _apps(self) -> tuple[Qubes, ...]:
        testbed = self._context.opened_testbed
        return testbed.apps if testbed else ()

    def _doing(self) -> dict[str, object]:
        """Return what is told to who asks; on the event loop, while a test runs."""
        told: dict[str, object] = {"directory": self._directory, "test": self._test}
        if self._test:
            main = threading.main_thread().ident or 0
            line = line_of(sys._current_frames().get(main))  # noqa: SLF001
            recorder = timeline.current()
            waits = waited_for(recorder.open() if recorder else [], line)
            seconds = round(time.monotonic() - self._began, 3)
            told |= {"phase": self._phase, "seconds": seconds, "waits": waits}
            told["stopped"] = self._deadline.is_stopped
        return told
