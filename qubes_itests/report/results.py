"""Results of tests: what a run, its history and a CI tell of each."""

from __future__ import annotations

import dataclasses
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from qubes_itests.report import failures
from qubes_itests.report.names import one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = [
    "ATTEMPTS",
    "OUTCOMES",
    "PHASE",
    "RERUN",
    "WHERE",
    "Results",
    "TestResult",
    "category",
    "phases",
]

OUTCOMES = frozenset(
    ("passed", "failed", "error", "skipped", "xfailed", "xpassed", "flaky")
)
#: The attribute of a report of a repeated test: how often it ran, how often it failed.
ATTEMPTS = "itests_attempts"
#: The outcome of a report of a failed attempt after which others follow; that of
#: pytest-rerunfailures as well.
RERUN = "rerun"
#: The attribute of a report that says which line of a test failed: ``FILE:LINE``.
WHERE = "itests_where"
#: How names of properties of a report begin that are times of the test's parts.
PHASE = "time of "
#: What such a property says.
_SECONDS = re.compile(r"([0-9]{1,9}\.[0-9]{3}) s")


@dataclass(frozen=True, kw_only=True, slots=True)
class TestResult:
    """What came of a test.

    :param test: its id.
    :param outcome: passed, failed, error, skipped, xfailed, xpassed or flaky; flaky is
        a test that has failed and passed in one run.
    :param duration: of its last attempt, in seconds.
    :param started: seconds since the epoch.
    :param attempts: how often it ran.
    :param failed: how many of these attempts failed.
    :param cause: why it failed or was skipped, in a line.
    :param where: the place in the test, as ``FILE:LINE``.
    :param worker: which process ran it, of several.
    :param phases: the seconds that its parts took.
    """

    __test__ = False

    test: str
    outcome: str
    duration: float
    started: float = 0.0
    attempts: int = 1
    failed: int = 0
    cause: str = ""
    where: str = ""
    worker: str = ""
    phases: Mapping[str, float] = field(default_factory=dict)

    @property
    def bad(self) -> bool:
        """Whether a run with it has failed."""
        return self.outcome in ("failed", "error", "flaky")


def category(report: pytest.TestReport) -> str | None:
    """Return the outcome of a test that a report tells, None if it tells none yet."""
    if report.when != "call" and report.passed:
        return None
    if hasattr(report, "wasxfail"):
        return "xfailed" if report.skipped else "xpassed"
    made, failed = vars(report).get(ATTEMPTS, (1, 0))
    if report.failed and 0 < failed < made:
        return "flaky"
    if report.failed and report.when != "call":
        return "error"
    return report.outcome


def phases(report: pytest.TestReport) -> dict[str, float]:
    """Return the seconds that the parts of a test took, by name, as its report tells.

    Tests record properties as well: one whose name is such and that is no time is not
    meant.
    """
    return {
        str(name).removeprefix(PHASE): float(seconds[1])
        for name, value in report.user_properties
        if str(name).startswith(PHASE) and (seconds := _SECONDS.fullmatch(str(value)))
    }


class Results:
    """A pytest plugin that knows what came of the tests of a run, also of workers.

    :param listener: is told each result as soon as it is known.
    """

    def __init__(self, listener: Callable[[TestResult], None]) -> None:
        self._listener = listener
        self._open: dict[str, TestResult] = {}
        #: Of the run, unlike that of any other.
        self.run = uuid.uuid4().hex
        self.started = time.time()
        self._zero = time.monotonic()
        #: In the order in which they ended.
        self.ended: list[TestResult] = []

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Note when a test begins."""
        self._open.setdefault(
            nodeid,
            TestResult(test=nodeid, outcome="", duration=0.0, started=time.time()),
        )

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Take a report of a test's set-up, call or tear-down."""
        known = self._open.get(report.nodeid) or TestResult(
            test=report.nodeid, outcome="", duration=0.0, started=time.time()
        )
        worker = vars(report).get("worker_id", "")
        if report.outcome == RERUN:
            known = dataclasses.replace(
                known,
                attempts=known.attempts + 1,
                failed=known.failed + 1,
                duration=0.0,
                cause=known.cause or failures.cause(report),
                where=known.where or self._where(report),
            )
        else:
            known = self._with(known, report)
        self._open[report.nodeid] = dataclasses.replace(known, worker=worker)
        # pytest-xdist tells of a test that ended its worker only once. Without an
        # outcome others follow: pytest-rerunfailures tells of the tear-down of each.
        if report.when not in ("setup", "call") and known.outcome:
            self._end(report.nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(
        self, report: Any
    ) -> tuple[str, str, tuple[str, dict[str, bool]]] | None:
        """Count what no outcome of pytest's own says."""
        if report.outcome == RERUN:
            return "rerun", "R", ("RERUN", {"yellow": True})
        if category(report) == "flaky":
            return "flaky", "F", ("FLAKY", {"red": True})
        return None

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        """Take what was interrupted in its tear-down for ended."""
        for test in [test for test, known in self._open.items() if known.outcome]:
            self._end(test)

    @property
    def took(self) -> float:
        """The seconds since the run began, whatever became of the clock."""
        return time.monotonic() - self._zero

    @property
    def unfinished(self) -> list[TestResult]:
        """Those that have begun, and of which no outcome is known."""
        return list(self._open.values())

    def _with(self, known: TestResult, report: Any) -> TestResult:
        part = vars(report).get("context")
        outcome = category(report) or ""
        if part is not None and not report.failed:
            return known
        # of a failure nothing that follows makes anything else, but a flaky test
        if known.bad or not outcome:
            outcome = known.outcome
        attempts, failed = vars(report).get(ATTEMPTS, (known.attempts, known.failed))
        cause, where = known.cause, known.where
        if report.failed:
            failed = max(failed, 1)
            cause = known.cause or failures.cause(report)
            where = known.where or self._where(report)
        elif report.skipped:
            cause = vars(report).get("wasxfail") or failures.cause(report)
        elif outcome and outcome not in OUTCOMES:
            # of another plugin, for which it is no failure
            outcome, cause = "skipped", one_line(outcome)
        return dataclasses.replace(
            known,
            outcome=outcome,
            duration=known.duration + (0.0 if part is not None else report.duration),
            attempts=attempts,
            failed=failed,
            cause=cause,
            where=where,
            phases=phases(report) or known.phases,
        )

    def _where(self, report: Any) -> str:
        """Return the line of the test's own file where a report says that it failed."""
        if where := vars(report).get(WHERE):
            return str(where)
        file, line, _ = report.location
        line = (line or 0) + 1
        traceback = getattr(report.longrepr, "reprtraceback", None)
        entries = traceback.reprentries if traceback is not None else ()
        for entry in entries:
            place = getattr(entry, "reprfileloc", None)
            if place is not None and place.path.endswith(file.rpartition("/")[2]):
                line = place.lineno
        return f"{file}:{line}"

    def _end(self, test: str) -> None:
        result = self._open.pop(test)
        if result.outcome == "passed" and result.failed:
            result = dataclasses.replace(result, outcome="flaky")
        self.ended.append(result)
        self._listener(result)
