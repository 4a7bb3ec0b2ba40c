"""What is said of a run whose process has ended within a test, or beside one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from qubes_itests.host.sandbox import last_words
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["LastWords"]


class LastWords:
    """A pytest plugin that says where the run was, in case that its process ends.

    Workers have a controller, which sees that they have crashed, and goes on.

    :param distributes: whether this is the controller.
    """

    def __init__(self, *, distributes: bool) -> None:
        # of the session that this one is within: a test may call pytest.main
        self._before = last_words("before the first test: no test ran")
        self._distributes = distributes
        #: The tests that workers run now.
        self._running: dict[str, None] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Name a test that a worker runs."""
        self._running[nodeid] = None
        self._tell()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Do not, when it has ended, its worker with it or not."""
        if report.when not in ("setup", "call"):
            self._running.pop(report.nodeid, None)
            self._tell()

    def _tell(self) -> None:
        if self._distributes:
            tests = safe_text(", ".join(self._running)) or "nothing"
            last_words(
                f"while workers ran {tests}: something ended the process of the run,"
                " which hands out their tests"
            )

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Name the test."""
        test = safe_text(item.nodeid)
        last_words(
            f"in {test}: it ended the process of the run, and no test after it ran"
            " (with -n 1 they do)"
        )
        try:
            return (yield)
        finally:
            last_words(f"after {test}: something ended the process of the run")

    @pytest.hookimpl(tryfirst=True)
    def pytest_unconfigure(self) -> None:
        """Say nothing more: the run has come to its end."""
        last_words(self._before)
