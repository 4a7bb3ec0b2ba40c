"""Records the timeline of each test, and keeps it among the artefacts."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from qubes_itests.report.results import PHASE, RERUN
from qubes_itests.run.settings import Trace
from qubes_itests.testcase.outcomes import TimedTestCase
from qubes_itests.timeline import Record, Recorder, begin, recording
from qubes_itests.timeline.document import NAME, Header, dump
from qubes_itests.timeline.logs import recording_logs

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from qubes_itests.report.artifacts import Artifacts
    from qubes_itests.run.settings import Settings

__all__ = ["Recording"]


class Recording:
    """A pytest plugin; it has to be outside of those that fail tests.

    :param settings: of the run.
    :param artifacts: where timelines go.
    :param follow_logs: as `Recorder` has it.
    """

    def __init__(
        self, settings: Settings, artifacts: Artifacts, *, follow_logs: bool = False
    ) -> None:
        self._settings = settings
        self._follow_logs = follow_logs
        self._artifacts = artifacts
        #: Is told each record, as `Recorder` tells it.
        self.listener: Callable[[Record], None] | None = None
        self._recorder: Recorder | None = None
        self._recording = contextlib.ExitStack()
        self._outcome = ""
        self._is_over = False
        #: What reports have told already.
        self._starts: list[Record] = []

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Record one test, which may be repeated in here."""
        self._begin()
        try:
            with recording_logs():
                return (yield)
        except KeyboardInterrupt:
            self._outcome = "interrupted"
            self._keep(item.nodeid)
            raise
        finally:
            self._recording.close()
            self._recorder = None

    def _begin(self) -> None:
        self._recording.close()
        self._outcome, self._starts, self._is_over = "", [], False
        self._recorder = Recorder(
            events=self._settings.trace_events,
            follow_logs=self._follow_logs,
            listener=self.listener,
        )
        self._recording.enter_context(recording(self._recorder))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self) -> Generator[None, Any, Any]:
        """Record the phase; each attempt has its own timeline."""
        if self._is_over:
            self._begin()
        with begin("phase", name="setup"):
            return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self) -> Generator[None, Any, Any]:
        """Record the phase."""
        with begin("phase", name="call"):
            return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self) -> Generator[None, Any, Any]:
        """Record the phase."""
        self._is_over = True
        with begin("phase", name="teardown"):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, Any, Any]:
        """Tell JUnit XML how long starts of VMs and phases of a TestCase took."""
        times = []
        if self._recorder is not None:
            starts = self._recorder.records("start")
            starts, self._starts = starts[len(self._starts) :], starts
            times += [(f"start of {s['vm']}", s["duration"]) for s in starts]
        case = item.instance if isinstance(item, pytest.Function) else None
        if call.when == "call" and isinstance(case, TimedTestCase):
            times += [(f"{PHASE}{name}", took) for name, took in case.phases.items()]
        item.user_properties += [(n, f"{t:.3f} s") for n, t in times if t is not None]
        return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the timeline as it is now, if that is wanted."""
        if self._recorder is None:
            return
        bad = report.failed or report.outcome == RERUN  # with others to follow
        if bad and self._outcome != "failed":
            self._outcome = "failed" if report.when == "call" else "error"
        elif report.when == "call" or report.skipped:
            self._outcome = self._outcome or report.outcome
        failed = self._outcome in ("failed", "error")
        if failed or (self._settings.trace is Trace.ON and report.when == "teardown"):
            self._keep(report.nodeid)

    def _keep(self, test: str) -> None:
        if self._recorder is None:
            return
        header = Header(
            test=test,
            started=self._recorder.started,
            outcome=self._outcome,
            duration=round(self._recorder.time(), 6),
            dropped=self._recorder.dropped,
        )
        self._artifacts.add(test, {NAME: dump(header, self._recorder.records())})
