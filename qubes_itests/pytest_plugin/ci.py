"""The end of a run in a CI."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from qubes_itests.report import ci

if TYPE_CHECKING:
    from pathlib import Path

    from qubes_itests.report.results import Results
    from qubes_itests.run.settings import Settings

__all__ = ["CIReport"]


class CIReport:
    """A pytest plugin, of the process that speaks for the run.

    :param settings: of the run.
    :param artifacts: the directory of the artefacts.
    :param results: of the tests.
    """

    def __init__(self, settings: Settings, artifacts: Path, results: Results) -> None:
        self._settings = settings
        self._artifacts = artifacts
        self._results = results

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the summary, and print what the CI shows in the code."""
        if not self._results.ended:
            return
        seconds = self._results.took
        terminal = session.config.pluginmanager.get_plugin("terminalreporter")
        try:
            lines = ci.write(
                self._results.ended,
                self._settings.app,
                seconds,
                self._artifacts,
                self._settings.summary,
            )
        except OSError as error:
            lines = [f"the summary cannot be written: {error}"]
        if terminal is not None:
            # a command has to be at the beginning of a line
            terminal.ensure_newline()
            for line in lines:
                terminal.write_line(line)
