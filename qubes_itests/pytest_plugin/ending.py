"""The last lines of ``pytest -p qubes_itests``, as the main job has them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

from qubes_itests.program import COMMAND
from qubes_itests.report import failures
from qubes_itests.run.preparation import told_again

if TYPE_CHECKING:
    from collections.abc import Generator

    from qubes_itests.pytest_plugin.watch import FailureWatch
    from qubes_itests.run.settings import Settings

__all__ = ["Ending"]


class Ending:
    """A pytest plugin, of the process that speaks for the run.

    :param settings: of the run.
    :param watch: knows the failures.
    :param prefix: of our options for pytest.
    """

    def __init__(self, settings: Settings, watch: FailureWatch, prefix: str) -> None:
        self._settings = settings
        self._watch = watch
        self._prefix = prefix

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(
        self, session: pytest.Session
    ) -> Generator[None, Any, Any]:
        """Say of each failure the cause, where the artefacts are, and what to type."""
        result = yield
        terminal = session.config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None:
            words = [
                word
                for option in told_again(self._settings, self._prefix)
                for word in option
            ]
            command = [sys.executable, "-m", "pytest", "-p", "qubes_itests", *words]
            failures.show(
                list(self._watch.failures.values()),
                COMMAND,
                terminal.write_line,
                again=command,
                prefix=self._prefix,
            )
            for problem in self._watch.artifacts.problems:
                terminal.write_line(f"not all artefacts could be kept: {problem}")
        return result
