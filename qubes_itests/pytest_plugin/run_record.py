"""``run.json``, how each test of a run ended, and ``report.html``, made of it."""

from __future__ import annotations

import json
import os
import platform
import sys
from typing import TYPE_CHECKING, Final

import pytest

from qubes_itests import __version__
from qubes_itests.exc import HarnessError
from qubes_itests.exit_codes import ExitCode
from qubes_itests.host import memory
from qubes_itests.pytest_plugin.history import earlier_outcomes, suite
from qubes_itests.pytest_plugin.worker import PLAN

if TYPE_CHECKING:
    from qubes_itests.pytest_plugin.watch import FailureWatch
    from qubes_itests.report.results import Results, TestResult
    from qubes_itests.run.settings import Settings

__all__ = ["NAME", "RunRecord"]

#: The name of the file in the directory of artefacts.
NAME: Final = "run.json"


class RunRecord:
    """A pytest plugin, of the process that speaks for the run.

    :param settings: of the run.
    :param watch: knows where the file goes, and what interrupted tests waited for.
    :param results: of the tests.
    """

    def __init__(
        self, settings: Settings, watch: FailureWatch, results: Results
    ) -> None:
        self._settings = settings
        self._artifacts = watch.artifacts
        self._failures = watch.failures
        self._results = results
        self._page = ""

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Write the files beside what failed tests have left; else there are none.

        In a CI, and for one of several machines, they tell of success as well.
        """
        shard = self._settings.shard
        wanted = shard or os.environ.get("CI")
        if not self._artifacts.root.is_dir() and not wanted:
            return
        plan = session.config.stash.get(PLAN, "")
        ended = self._results.ended
        outcome = "failed" if any(result.bad for result in ended) else "passed"
        told = ended
        if exitstatus in (ExitCode.INTERRUPTED, ExitCode.INTERNAL_ERROR):
            # there are tests that were not run
            outcome = "interrupted"
            told = [*ended, *self._results.unfinished]
        earlier = earlier_outcomes(session.config, self._results.run)
        document = {
            "format": "qubes_itests.run",
            "version": 1,
            "id": self._results.run,
            "started": self._results.started,
            "duration": round(self._results.took, 6),
            "command": sys.orig_argv,
            "seed": self._settings.seed,
            "outcome": outcome,
            "suite": suite(session.config),
            "shard": shard and {"number": shard[0], "of": shard[1], "plan": plan},
            "host": _host(),
            "tests": [
                self._told(result) | {"earlier": earlier.get(result.test, [])}
                for result in told
            ],
        }
        self._artifacts.write_file(NAME, json.dumps(document, indent=1).encode())
        from qubes_itests.html_report.page import write_report  # noqa: PLC0415 - here only

        try:
            self._page = f"report: {write_report(self._artifacts.root)}"
        except HarnessError as error:  # the run's own failures are to be told
            self._page = str(error)

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter
    ) -> None:
        """Say where the report is, or why there is none."""
        if self._page:
            terminalreporter.write_line(self._page)

    def _told(self, result: TestResult) -> dict[str, object]:
        directory = self._artifacts.directory(result.test)
        cause = result.cause
        if not result.outcome:
            failure = self._failures.get(result.test)
            cause = failure.cause if failure else "interrupted"
        return {
            "test": result.test,
            "outcome": result.outcome,
            "duration": round(result.duration, 6),
            "started": result.started,
            "attempts": result.attempts,
            "failed": result.failed,
            "phases": dict(result.phases),
            "cause": cause,
            "where": result.where,
            "artifacts": directory.name if directory.is_dir() else None,
            "worker": result.worker or None,
        }


def _host() -> dict[str, object]:
    return {
        "name": platform.node(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory": memory.for_vms(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qubes_itests": __version__,
    }
