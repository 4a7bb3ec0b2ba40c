"""One line for each test, when it has ended, in place of pytest's dots."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from qubes_itests import timeline
from qubes_itests.report.folding import Folding
from qubes_itests.report.heartbeat import Heartbeat, duration, real_stdout
from qubes_itests.report.names import one_line
from qubes_itests.report.results import category, phases
from qubes_itests.timeline.words import describe, doing, explains, fit

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from qubes_itests.timeline import Record

__all__ = ["Progress"]

#: Of the outcomes that are ours; those of other plugins have their name.
_MARKUP: Mapping[str, tuple[str, Mapping[str, bool]]] = {
    "passed": ("PASSED", {"green": True}),
    "failed": ("FAILED", {"red": True}),
    "error": ("ERROR", {"red": True}),
    "skipped": ("SKIPPED", {"yellow": True}),
    "xfailed": ("XFAIL", {"yellow": True}),
    "xpassed": ("XPASS", {"yellow": True}),
    "flaky": ("FLAKY", {"red": True}),
    "rerun": ("RERUN", {"yellow": True}),
}


#: Seconds from which the rest of a run is worth telling.
_WORTH_TELLING = 3.0
_LONGEST_NAME = 40


class Progress:
    """A pytest plugin; quiet with ``-q``.

    :param config: pytest's; its output is not captured when this is made.
    :param usual: returns the seconds that tests took as a rule, by id; may block.
    :param several: whether tests run beside each other, in other processes. Then those
        of a plugin make no section: they mix with others.
    """

    def __init__(
        self,
        config: pytest.Config,
        usual: Callable[[], Mapping[str, float]],
        *,
        several: bool = False,
    ) -> None:
        self._config = config
        self._output = real_stdout()
        self._read_usual = usual
        self._several = several
        # Output that is not captured and a live line would write over each other.
        beats = config.getoption("capture") != "no"
        self._heartbeat = Heartbeat(self._output, self._doing if beats else str)
        self._folding = Folding(self._write)
        self._is_running = False
        #: When each of the tests that run has begun.
        self._begun: dict[str, float] = {}
        #: The ids of those that did not end, and the seconds that they took before.
        self._left: dict[str, float | None] = {}
        self._total = 0
        self._fold = ""
        self._took: dict[str, float] = {}
        self._parts_failed: set[str] = set()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, Any, Any]:
        """Take the progress of the tests over from the terminal reporter."""
        self._is_running = True
        if session.items and not self._config.option.collectonly:
            self._expect([item.nodeid for item in session.items])
        self._heartbeat.start()
        try:
            return (yield)
        finally:
            self._is_running = False
            self._heartbeat.stop()
            self._folding.end()

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        """Learn of the tests that workers have found, of which each finds all."""
        if not self._total:
            # with their groups; see `pytest_plugin.groups`
            self._expect([test.partition("\0")[0] for test in ids])

    def _expect(self, ids: Sequence[str]) -> None:
        usual = self._read_usual()
        self._left = {test: usual.get(test) for test in ids}
        self._total = len(self._left)

    def _doing(self) -> str:
        """Return what goes on now, and how long the rest may take, in a line."""
        begun = dict(self._begun)
        if not begun:
            return ""
        now = time.monotonic()
        number = self._total - len(self._left) + 1
        parts = [f"{_short(t)} {duration(now - since)}" for t, since in begun.items()]
        said = ", ".join(parts)
        recorder = timeline.current()
        going_on = next(doing(recorder.open()), "") if recorder else ""
        if len(begun) == 1 and going_on:
            (test, since), *_ = begun.items()
            said = f"{_short(test)}: {going_on}, {duration(now - since)}"
        times = [
            seconds for seconds in dict(self._left).values() if seconds is not None
        ]
        rest = sum(times) - sum(now - since for since in begun.values())
        left = f"; about {duration(rest)} left" if rest > _WORTH_TELLING else ""
        return f"[{min(number, self._total)}/{self._total}] {said}{left}"

    def show_record(self, record: Record) -> None:
        """Show what a timeline got, from whatever thread: with ``-vv`` all of it."""
        all_of_it = self._config.get_verbosity() > 1
        if self._is_running and (all_of_it or explains(record)):
            for line in describe(record):
                self._heartbeat.write(fit(line, 0))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_report_teststatus(self) -> Generator[None, Any, Any]:
        """Have the terminal reporter count without printing."""
        result = yield
        return (result[0], "", "") if result and self._is_running else result

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Show what begins; a debugger that had the terminal is done with."""
        self._heartbeat.start()
        plugin = str(nodeid).partition("::")[0]
        if plugin != self._fold and not self._several:
            self._fold = plugin
            self._folding.begin(plugin)
        self._begun[nodeid] = time.monotonic()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Show what ended, and how."""
        if self._config.get_verbosity() <= 0:
            # pytest would tell of each failure which worker it was.
            vars(report).pop("node", None)
        if (part := getattr(report, "context", None)) is not None:
            # Those that passed are counted with their test.
            if report.failed:
                self._parts_failed.add(report.nodeid)
                names = ", ".join(f"{k}={v!r}" for k, v in dict(part.kwargs).items())
                said = f" ({one_line(str(part.msg or names))})"
                with self._heartbeat.silent():
                    self._line(report, "failed", report.duration, said)
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
        self._begun.pop(nodeid, None)
        self._left.pop(nodeid, None)

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

    def _line(
        self, report: pytest.TestReport, outcome: str, took: float, part: str = ""
    ) -> None:
        if self._config.get_verbosity() < 0 and outcome == "passed":
            return
        word, markup = _MARKUP.get(outcome, (outcome.upper(), {}))
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if terminal is None:
            return
        terminal.ensure_newline()
        terminal.write(f"{word:7} ", **markup)
        when = " in teardown" if report.when == "teardown" else part
        # of a test that ran, the times of its parts, if they are known
        times = (f"{name} {seconds:.1f}" for name, seconds in phases(report).items())
        more = _reason(report) if outcome == "skipped" else ", ".join(times)
        more = f"  ({more})" if more else ""
        terminal.write_line(f"{report.nodeid}{when}  {duration(took)}{more}")
        terminal.flush()

    def _write(self, line: str) -> None:
        # Its stream is another one, with a buffer where that is no terminal.
        if terminal := self._config.pluginmanager.get_plugin("terminalreporter"):
            terminal.flush()
        print(line, file=self._output, flush=True)


def _short(test: str) -> str:
    """Return the last part of a test's id."""
    return one_line(test.rpartition("::")[2], _LONGEST_NAME)


def _reason(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return one_line(str(report.longrepr[2]).removeprefix("Skipped: "))
    return ""
