"""The history of tests in a run: it gets their results, and gives earlier times."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

import pytest

from qubes_itests.exc import EnvironmentNotReadyError
from qubes_itests.exit_codes import ExitCode
from qubes_itests.host.cache import Cache
from qubes_itests.report.history import History, times_in
from qubes_itests.report.merge import read_results
from qubes_itests.report.result_file import HistoryError, Log, Run
from qubes_itests.report.results import Results, TestResult

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["SUITE", "HistoryKeeper", "earlier_outcomes", "earlier_times", "suite"]

#: Whose ids of tests a run has, where it is not that of a directory: see `Run`.
SUITE = pytest.StashKey[str]()
_OUTCOMES: Mapping[int, str] = {
    ExitCode.OK: "passed",
    ExitCode.NO_TESTS_COLLECTED: "passed",
    ExitCode.INTERRUPTED: "interrupted",
    ExitCode.INTERNAL_ERROR: "interrupted",
}


class HistoryKeeper:
    """A pytest plugin, of the process that speaks for the run.

    No run fails because of it: what goes wrong is told in a line.

    :param config: pytest's.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._history: History | None = None
        self._log: Log | None = None
        self._problems: list[str] = []
        self.results = Results(self._add)

    def _add(self, result: TestResult) -> None:
        if self._problems:
            return
        try:
            if self._log is None:
                self._history = History(Cache().root)
                self._log = self._history.begin(
                    Run(
                        id=self.results.run,
                        suite=suite(self._config),
                        machine=platform.node(),
                        started=self.results.started,
                    )
                )
            self._log.add(result)
        except (OSError, EnvironmentNotReadyError) as error:
            self._problems.append(f"the rest of this run is not kept: {error}")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Put the results where `history` finds them."""
        bad = [result for result in self.results.ended if result.bad]
        only_flaky = bad and all(result.outcome == "flaky" for result in bad)
        if session.exitstatus == ExitCode.TESTS_FAILED and only_flaky:
            session.exitstatus = ExitCode.FLAKY
        if self._log is not None and self._history is not None:
            status: int = session.exitstatus
            took = self.results.took
            try:
                with self._log as log:
                    if not self._problems:
                        log.end(took, _OUTCOMES.get(status, "failed"))
                self._history.collect()
            except OSError as error:
                self._problems.append(str(error))
            self._problems += self._history.problems
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        for problem in self._problems:
            if terminal is not None:
                terminal.write_line(f"history: {problem}")


def suite(config: pytest.Config) -> str:
    """Return whose ids of tests a run has: see `Run`."""
    return config.stash.get(SUITE, config.rootpath.name)


def earlier_times(config: pytest.Config, file: Path | None) -> Mapping[str, float]:
    """Return the seconds that the tests of a suite took as a rule, by id. Blocking.

    :param file: with the results that say it; by default this machine's history.
    :raise pytest.UsageError: the file cannot be read.
    """
    if file is not None:
        try:
            return times_in(read_results(file), suite(config))
        except HistoryError as error:
            raise pytest.UsageError(f"--times: {error}") from None
    history = _history()
    return history.times(suite(config)) if history else {}


def earlier_outcomes(config: pytest.Config, run: str) -> Mapping[str, list[str]]:
    """Return what came of the tests of a suite in earlier runs, by id. Blocking.

    :param run: the id of this one.
    """
    history = _history()
    return history.recent(suite(config), run) if history else {}


def _history() -> History | None:
    """Return that of this machine, None if it has none that could be read."""
    try:
        history = History(Cache().root)
        history.collect()
    except (OSError, EnvironmentNotReadyError):
        return None
    return history
