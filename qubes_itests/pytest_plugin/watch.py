"""Sees tests fail at the moment they do, while their VMs are there to be looked at."""

from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import qubes_itests
from qubes_itests.balancing.app_memory import timeline_files
from qubes_itests.exc import HarnessError
from qubes_itests.pytest_plugin.deadline import stacks
from qubes_itests.pytest_plugin.tracebacks import hide_machinery
from qubes_itests.pytest_plugin.worker import distributes, is_remote, is_worker
from qubes_itests.report import failures
from qubes_itests.report.artifacts import LOG_LIMIT, Artifacts
from qubes_itests.report.failures import Failure
from qubes_itests.report.guest_logs import GuestLogs, panic_words
from qubes_itests.report.heartbeat import duration
from qubes_itests.report.results import RERUN, WHERE
from qubes_itests.report.safe_report import make_safe
from qubes_itests.run.app_templates import TemplateProblemError, wishes_of
from qubes_itests.run.result import Prepared
from qubes_itests.run.settings import Keep
from qubes_itests.shell import WAY_OUT, open_shell, require_terminal
from qubes_itests.timeline import current, note, raised_at
from qubes_itests.timeline.document import NAME as TIMELINE
from qubes_itests.timeline.document import load
from qubes_itests.timeline.words import last_lines, waited_for

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from qubes_itests.pytest_plugin.deadline import Deadline
    from qubes_itests.report.progress import Progress
    from qubes_itests.run.context import RunContext
    from qubes_itests.run.testbed import Panic, Testbed
    from qubes_itests.timeline.words import Line

__all__ = ["PANICS", "FailureWatch"]

#: Lines of a timeline that are shown with a failure.
_TIMELINE_LINES = 10
#: The mark of a test that has a guest's kernel panic on purpose.
PANICS = "guest_panics"
#: Lines of an error in the timeline.
_REASON_LINES = 10
#: The attribute of a report that has the artefacts.
_FILES = "itests_files"
#: And the one that has what could not be kept, in a worker.
_PROBLEMS = "itests_problems"


class FailureWatch:
    """A pytest plugin that keeps artefacts of failed tests and a list of them.

    :param config: pytest's.
    :param context: the run.
    """

    def __init__(self, config: pytest.Config, context: RunContext) -> None:
        self._config = config
        self._context = context
        self._settings = context.settings
        self._start = config.invocation_params.dir
        self.artifacts = Artifacts(self._start / context.settings.artifacts)
        self._guest_files = wishes_of(context.settings).artifacts
        self._logs = GuestLogs(None)
        self._seen = ""
        self._began = 0.0
        # In tests of the harness its frames are what one wants to see.
        ours, settings = Path(qubes_itests.__file__), config.inipath
        self._hides = not settings or not ours.is_relative_to(settings.parent)
        self.deadline: Deadline | None = None
        #: The test that was interrupted, and what it was doing.
        self.interrupted: tuple[str, str] | None = None
        self._panics_seen = 0
        #: By test.
        self.failures: dict[str, Failure] = {}
        #: What guests' kernels said when they gave up, by test.
        self.panics: dict[str, list[str]] = {}

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Begin and end a test: its artefacts, its random numbers, its guests."""
        self.artifacts.begin(item.nodeid)
        self._seen = ""
        self._began = time.monotonic()
        self._logs = self._begin_logs()
        testbed = self._context.opened_testbed
        before = self._panics_seen = len(testbed.panics) if testbed else 0
        random.seed(f"{self._settings.seed}:{item.nodeid}")
        try:
            result = yield
        except KeyboardInterrupt as error:
            # here, for fixtures start VMs: a set-up hangs as a test does
            self._interrupted(item, error)
            raise
        if (directory := self._vm_directory()) is not None:
            self._logs.found(directory)
        testbed = self._context.opened_testbed
        panics = testbed.panics[before:] if testbed else []
        if panics and not item.get_closest_marker(PANICS):
            self.panics[item.nodeid] = [_panic(panic) for panic in panics]
        return result

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Tell JUnit XML what the test runs on."""
        if template := getattr(getattr(item, "cls", None), "template", None):
            item.user_properties.append(("template", str(template)))
        try:
            return (yield)
        except Exception as error:
            self._failed(item, error)
            raise

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Run a test; a TestCase tells of its failure before its own tearDown."""
        if isinstance(item, pytest.Function) and hasattr(item, "addError"):
            self._listen(item)
        try:
            result = yield
        except BaseException as error:
            if not isinstance(error, (pytest.skip.Exception, KeyboardInterrupt)):
                self._failed(item, error)
            raise
        self._check_panics(item)
        testbed = self._context.opened_testbed
        if testbed is not None and self._settings.keep is Keep.ALWAYS:
            self.artifacts.keep_disks(item.nodeid, testbed)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Fail the test for what is known only when its VMs have ended."""
        result = yield
        self._check_panics(item)
        return result

    def _check_panics(self, item: pytest.Item) -> None:
        """Fail a test of which a guest's kernel has panicked, unless it is meant to."""
        testbed = self._context.opened_testbed
        panics = testbed.panics[self._panics_seen :] if testbed else []
        if item.get_closest_marker(PANICS):
            return
        if panics and item.nodeid not in self.failures:
            self._panics_seen += len(panics)
            text = "\n".join(f"a guest's kernel panicked: {_panic(p)}" for p in panics)
            error = pytest.fail.Exception(text, pytrace=False)
            # here, for in a test that is no TestCase all its VMs are there still
            self._failed(item, error, panics[0].vm)
            raise error

    def _interrupted(self, item: pytest.Item, error: KeyboardInterrupt) -> None:
        """Keep what a test has that is interrupted, and what it was waiting for."""
        took = duration(time.monotonic() - self._began)
        recorder = current()
        what = waited_for(recorder.open() if recorder else [], raised_at(error))
        self.interrupted = item.nodeid, f"interrupted after {took}: {what}"
        self._failed(item, error)

    @pytest.hookimpl(tryfirst=True)
    def pytest_keyboard_interrupt(self) -> None:
        """Tell of the test as of those that have failed; no report does."""
        if self.interrupted is not None:
            test, cause = self.interrupted
            self._keep_logs(test)
            self.tell(test, cause)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Have the report tell which line of the test failed, and show its author's.

        What is wrong with a template is told without where a test needed it.
        """
        if call.excinfo is not None and self._hides:
            hide_machinery(call.excinfo.value)
        report = yield
        if call.excinfo is not None and call.excinfo.errisinstance(
            TemplateProblemError
        ):
            report.longrepr = str(call.excinfo.value)
        if report.failed and call.excinfo is not None:
            setattr(report, WHERE, raised_at(call.excinfo.value))
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: Any) -> None:
        """Make the report safe to show, and note a failure, before others are told."""
        make_safe(report)
        test = report.nodeid
        # A worker may have begun with the next attempt, and keeps this one itself.
        if report.outcome == RERUN and not distributes(self._config):
            self.artifacts.text(test, "failure.txt", report.longreprtext)
            self._keep_logs(test)
        problems = self.artifacts.problems
        problems |= dict.fromkeys(vars(report).pop(_PROBLEMS, ()))
        # From another machine they come with the report; timelines of tests that have
        # passed, too, if they are wanted.
        self.artifacts.add(test, vars(report).pop(_FILES, {}))
        if report.failed:
            self.artifacts.text(test, "failure.txt", report.longreprtext)
            self._keep_logs(test)
        if is_remote(self._config):
            setattr(report, _FILES, self.artifacts.pack(test))
        if is_worker(self._config):
            setattr(report, _PROBLEMS, list(problems))
        if report.failed:
            self.tell(test, failures.cause(report))

    def tell(self, test: str, cause: str) -> None:
        """Have the end of the run tell of a failure; its first cause is the one."""
        directory = self.artifacts.directory(test)
        if directory.is_relative_to(self._start):
            directory = directory.relative_to(self._start)
        first = self.failures.get(test)
        why = first.cause if first else cause
        files = self.artifacts.files(test)
        self.failures[test] = Failure(
            test,
            why,
            str(directory),
            files,
            (*Prepared.told().words, "--seed", str(self._settings.seed)),
            first.timeline if first else self._last_lines(test),
        )

    def _last_lines(self, test: str) -> tuple[Line, ...]:
        """Return the end of a test's timeline, wherever it was recorded."""
        try:
            _, records = load(self.artifacts.read(test, TIMELINE))
        except (OSError, ValueError):
            return ()
        return tuple(last_lines(records, _TIMELINE_LINES))

    def begin_attempt(self, test: str, number: int) -> None:
        """Begin with a further attempt of the test that runs.

        :param number: of the one that has ended, from 1.
        """
        self.artifacts.begin_attempt(test, number)
        self._seen = ""
        self._logs = self._begin_logs()

    def keep_logs(self, test: str, directory: Path, since: float) -> None:
        """Keep the logs of VMs whose run has ended without keeping them.

        :param directory: of the run that they were of.
        :param since: the seconds since the epoch when the test began.
        """
        # each testbed of a run has its own directory in it
        logs = [log for vms in directory.glob("*/vm") for log in GuestLogs(vms).all()]
        self.artifacts.logs(test, [p for p in logs if p.stat().st_mtime >= since])

    def keep_stacks(self, test: str) -> None:
        """Keep what all threads and tasks are doing in a test that does not end."""
        self.artifacts.text(test, "stacks.txt", stacks(self._context.loop))

    def _begin_logs(self) -> GuestLogs:
        testbed = self._context.opened_testbed
        if testbed is None or testbed.machine is not None:
            # of a core under test nobody knows which VMs are over
            return GuestLogs(self._vm_directory())
        return GuestLogs(
            testbed.parts.run_directory, [app.directory for app in testbed.apps]
        )

    def _vm_directory(self) -> Path | None:
        testbed = self._context.opened_testbed
        return testbed.parts.run_directory if testbed else None

    def _keep_logs(self, test: str) -> None:
        if (directory := self._vm_directory()) is not None:
            self._logs.found(directory)
            self.artifacts.logs(test, self._logs.written())

    def _listen(self, item: Any) -> None:
        for name in ("addError", "addFailure"):
            report = getattr(item, name)

            def told(testcase: Any, error: Any, report: Any = report) -> None:
                if not isinstance(error[1], pytest.skip.Exception):
                    self._failed(item, error[1])
                report(testcase, error)

            setattr(item, name, told)

    def _failed(
        self, item: pytest.Item, error: BaseException, vm: str | None = None
    ) -> None:
        if self._hides:
            # TestCases tell pytest of their errors later, and in a way of their own
            hide_machinery(error)
        if self._seen != item.nodeid:
            note("failure", vm, text=_reason(error), where=raised_at(error))
        testbed = self._context.opened_testbed
        if testbed is None or self._seen == item.nodeid:
            return
        self._seen = item.nodeid
        if self._settings.keep is Keep.STATE:
            # first, for what the guests are asked below they do
            with self.deadline.stopped() if self.deadline else contextlib.nullcontext():
                self.artifacts.freeze(item.nodeid, testbed)
        hook = self._context.plugins.hook
        self.artifacts.collect(item.nodeid, testbed, hook, self._guest_files)
        # of apps of ours, and of dom0 of a core under test
        dom0 = testbed.parts.run_directory / "apps" / "dom0"
        for directory in (*(app.directory for app in testbed.apps), dom0):
            self.artifacts.add(item.nodeid, timeline_files(directory, LOG_LIMIT))
        self._keep_logs(item.nodeid)
        if self._settings.keep in {Keep.FAILED, Keep.ALWAYS}:
            self.artifacts.keep_disks(item.nodeid, testbed)
        if self._settings.shell_on_failure:
            self._open_shell(item, testbed)

    def require_terminal(self) -> None:
        """Refuse `--shell-on-failure` where nobody could use it.

        :raise pytest.UsageError: there is no terminal.
        """
        with self._uncaptured():
            try:
                require_terminal("--shell-on-failure")
            except HarnessError as error:
                raise pytest.UsageError(str(error)) from None

    @contextlib.contextmanager
    def _uncaptured(self) -> Iterator[None]:
        """Have pytest's own terminal as input and output again, for a while."""
        capture = self._config.pluginmanager.get_plugin("capturemanager")
        if capture is None:
            yield
            return
        with capture.global_and_fixture_disabled():
            # That is the outputs; the input, too, was another one from the beginning.
            capture.suspend_global_capture(in_=True)
            try:
                yield
            finally:
                # There is no way to resume the input alone.
                capture.resume_global_capture()
                capture.suspend_global_capture(in_=False)

    def _open_shell(self, item: pytest.Item, testbed: Testbed) -> None:
        """Let a person look at the VMs of a failed test, one after the other.

        The run goes on whatever becomes of that.
        """
        plugins = self._config.pluginmanager
        progress: Progress | None = plugins.get_plugin("qubes_itests-progress")
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._uncaptured())
            if self.deadline:
                stack.enter_context(self.deadline.stopped())
            if progress:
                stack.enter_context(progress.silent())
            for vm in [vm for app in testbed.apps for vm in app.domains.startable()]:
                if not vm.is_running():
                    continue
                print(  # noqa: T201
                    f"\n{item.nodeid} failed. A root shell in {vm.name};"
                    f" exit goes on with the run. {WAY_OUT}.",
                    flush=True,
                )
                try:
                    open_shell(testbed.portal, vm.running_agent())
                except Exception as error:  # noqa: BLE001 - it is told; see above
                    print(f"No shell in {vm.name}: {error!r}", flush=True)  # noqa: T201


def _panic(panic: Panic) -> str:
    return f"VM {panic.vm}: {panic_words(panic.console)}"


def _reason(error: BaseException) -> str:
    """Return what an error says, in its first lines."""
    # pytest's own class says nothing
    text = f"{type(error).__name__}: {error}".removeprefix("Failed: ")
    return "\n".join(text.splitlines()[:_REASON_LINES])
