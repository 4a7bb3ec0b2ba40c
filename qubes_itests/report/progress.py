"""One line for each test, when it has ended, in place of pytest's dots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from qubes_itests.report.folding import Folding
from qubes_itests.report.heartbeat import Heartbeat, LastWords, duration, real_stdout
from qubes_itests.report.names import one_line
from qubes_itests.report.results import PHASE, category

if TYPE_CHECKING:
    from collections.abc import Generator
    from contextlib import AbstractContextManager

__all__ = ["Progress"]

_MARKUP = {
    "passed": ("PASSED", {"green": True}),
    "failed": ("FAILED", {"red": True}),
    "error": ("ERROR", {"red": True}),
    "skipped": ("SKIPPED", {"yellow": True}),
    "xfailed": ("XFAIL", {"yellow": True}),
    "xpassed": ("XPASS", {"yellow": True}),
    "flaky": ("FLAKY", {"red": True}),
    "rerun": ("RERUN", {"yellow": True}),
}


class Progress:
    """A pytest plugin; quiet with ``-q``.

    :param config: pytest's; its output is not captured when this is made.
    :param words: what the harness says.
    :param several: whether tests run beside each other, in other processes. Then those
        of a plugin make no section: they mix with others.
    """

    def __init__(
        self, config: pytest.Config, words: LastWords, *, several: bool = False
    ) -> None:
        self._config = config
        self._output = real_stdout()
        self._words = words
        self._several = several
        self._heartbeat = Heartbeat(self._output, lambda: self._words.text)
        self._folding = Folding(self._write)
        self._running = False
        self._fold = ""
        self._took: dict[str, float] = {}
        self._parts_failed: set[str] = set()
        # Output that is not captured and a live line would write over each other.
        self._beats = config.getoption("capture") != "no"

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtestloop(self) -> Generator[None, Any, Any]:
        """Take the progress of the tests over from the terminal reporter."""
        self._running = True
        try:
            with self._words.listening():
                return (yield)
        finally:
            self._running = False
            self._heartbeat.stop()
            self._folding.end()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_report_teststatus(self) -> Generator[None, Any, Any]:
        """Have the terminal reporter count without printing."""
        result = yield
        return (result[0], "", "") if result and self._running else result

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Show what begins."""
        plugin = str(nodeid).partition("::")[0]
        if plugin != self._fold and not self._several:
            self._fold = plugin
            self._folding.begin(plugin)
        self._words.text = ""
        if self._beats:
            self._heartbeat.start(str(nodeid))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Show what ended, and how."""
        if self._config.get_verbosity() <= 0:
            # pytest would tell of each failure which worker it was.
            vars(report).pop("node", None)
        if (part := getattr(report, "context", None)) is not None:
            self._subtest(report, part)
            return
        took = self._took.get(report.nodeid, 0.0) + report.duration
        self._took[report.nodeid] = took
        outcome = category(report)
        if outcome == "passed" and report.nodeid in self._parts_failed:
            outcome = "failed"
        if outcome is not None:
            with self._heartbeat.silent():
                self._line(report, outcome, took)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Say no more of it."""
        self._heartbeat.end(str(nodeid))

    def pytest_enter_pdb(self) -> None:
        """Leave the terminal to the debugger, for the rest of what runs now."""
        self._heartbeat.stop()

    def silent(self) -> AbstractContextManager[None]:
        """Leave the terminal to somebody else for a while."""
        return self._heartbeat.silent()

    def pytest_unconfigure(self) -> None:
        """Give the output back."""
        self._heartbeat.stop()
        self._output.close()

    def _subtest(self, report: pytest.TestReport, part: Any) -> None:
        # Those that passed are counted with their test.
        if report.failed:
            self._parts_failed.add(report.nodeid)
            names = ", ".join(f"{k}={v!r}" for k, v in dict(part.kwargs).items())
            said = f" ({one_line(str(part.msg or names))})"
            with self._heartbeat.silent():
                self._line(report, "failed", report.duration, said)

    def _line(
        self, report: pytest.TestReport, outcome: str, took: float, part: str = ""
    ) -> None:
        if self._config.get_verbosity() < 0 and outcome == "passed":
            return
        word, markup = _MARKUP[outcome]
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if terminal is None:
            return
        terminal.ensure_newline()
        terminal.write(f"{word:7} ", **markup)
        when = " in teardown" if report.when == "teardown" else part
        reason = f"  ({_reason(report)})" if outcome == "skipped" else _phases(report)
        terminal.write_line(f"{report.nodeid}{when}  {duration(took)}{reason}")
        terminal.flush()

    def _write(self, line: str) -> None:
        # Its stream is another one, with a buffer where that is no terminal.
        if terminal := self._config.pluginmanager.get_plugin("terminalreporter"):
            terminal.flush()
        print(line, file=self._output, flush=True)


def _phases(report: pytest.TestReport) -> str:
    """Return the times of the parts of a test, for people, if they are known."""
    told = [
        f"{name.removeprefix(PHASE)} {float(str(value).removesuffix(' s')):.1f}"
        for name, value in report.user_properties
        if name.startswith(PHASE)
    ]
    return f"  ({', '.join(told)})" if told else ""


def _reason(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return one_line(str(report.longrepr[2]).removeprefix("Skipped: "))
    return ""
