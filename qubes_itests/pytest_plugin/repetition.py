"""Tests that run more than once: as asked, until they fail, or again when they failed.

A test of which one attempt failed and another passed is flaky. It fails the run: what
is reported of it is a failure, with that of its first failed attempt.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import pytest
from _pytest._code.code import ExceptionRepr
from _pytest.runner import runtestprotocol

from qubes_itests.pytest_plugin.worker import distributes
from qubes_itests.report.failures import cause
from qubes_itests.report.results import ATTEMPTS, RERUN, WHERE

if TYPE_CHECKING:
    from qubes_itests.pytest_plugin.watch import FailureWatch
    from qubes_itests.run.settings import Settings

__all__ = ["Repetition"]

log = logging.getLogger("qubes_itests.repetition")


class Repetition:
    """A pytest plugin, of runs with such an option.

    :param config: pytest's.
    :param settings: of the run.
    :param watch: keeps what failures leave.
    :raise pytest.UsageError: options contradict each other.
    """

    def __init__(
        self, config: pytest.Config, settings: Settings, watch: FailureWatch
    ) -> None:
        self._watch = watch
        self._again = settings.rerun_failed
        self._until_fail = settings.until_fail
        self._most = settings.repeat or (math.inf if self._until_fail else 1)
        if self._again and (settings.repeat or self._until_fail):
            raise pytest.UsageError(
                "--rerun-failed and --repeat or --until-fail are two ways to find flaky"
                " tests: leave one out"
            )
        if self._again and config.getoption("reruns", None):
            raise pytest.UsageError(
                "--rerun-failed and --reruns of pytest-rerunfailures do the same:"
                " leave one out"
            )
        if self._most == math.inf and distributes(config):
            raise pytest.UsageError(
                "--until-fail has no end with several workers: say --repeat=NUMBER too"
            )

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> None:
        """Refuse to repeat the first of several tests for ever.

        :raise pytest.UsageError: when that was asked for.
        """
        if self._most == math.inf and len(session.items) > 1:
            raise pytest.UsageError(
                f"--until-fail would repeat the first of {len(session.items)} tests"
                " without an end: select one, or say --repeat=NUMBER too"
            )

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> bool:
        """Run a test as often as it takes, and report it once."""
        hook, name = item.ihook, item.nodeid
        hook.pytest_runtest_logstart(nodeid=name, location=item.location)
        made, bad, properties = 0, [], len(item.user_properties)
        while True:
            if made:
                # else each report tells of all attempts before it, and grows with them
                del item.user_properties[properties:]
                item._report_sections.clear()  # noqa: SLF001 - there is no other way
                log.info("attempt %d of %s", made + 1, max(self._most, self._again + 1))
                self._watch.begin_attempt(name, made)
            reports = runtestprotocol(item, log=False, nextitem=nextitem)
            made += 1
            failure = next((report for report in reports if report.failed), None)
            bad += [failure] if failure else []
            if self._again:
                goes_on = failure is not None and made <= self._again
            else:
                goes_on = made < self._most and not (self._until_fail and bad)
            if not goes_on or any(report.skipped for report in reports):
                break
            if failure:
                failure.outcome = RERUN  # type: ignore[assignment]
                hook.pytest_runtest_logreport(report=failure)
        if bad and not failure:
            _make_flaky(reports, bad[0], f"{len(bad)} of {made}")
        for report in reports:
            setattr(report, ATTEMPTS, (made, len(bad)))
            hook.pytest_runtest_logreport(report=report)
        hook.pytest_runtest_logfinish(nodeid=name, location=item.location)
        return True


def _make_flaky(
    reports: list[pytest.TestReport], first: pytest.TestReport, how_often: str
) -> None:
    """Have the reports of a good attempt tell of the bad ones."""
    why = f"flaky: {how_often} attempts failed: {cause(first)}"
    for report in reports:
        if report.when == "call":
            report.outcome = "failed"
            setattr(report, WHERE, vars(first).get(WHERE))
            if isinstance(first.longrepr, ExceptionRepr) and first.longrepr.reprcrash:
                report.longrepr = first.longrepr
                first.longrepr.reprcrash.message = why
            else:
                report.longrepr = f"{why}\n\n{first.longreprtext}"
