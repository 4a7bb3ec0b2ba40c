"""The main job: pytest runs the tests of the installed plugins, and no files."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import pytest

from qubes_itests import __version__
from qubes_itests.exc import HarnessError
from qubes_itests.exit_codes import ExitCode
from qubes_itests.fixtures.session import CONTEXT
from qubes_itests.program import COMMAND, NAME
from qubes_itests.pytest_plugin import SETTINGS, header
from qubes_itests.pytest_plugin.collection import Selection, collect, nodes
from qubes_itests.pytest_plugin.extensions import ExtensionSwitch
from qubes_itests.pytest_plugin.history import SUITE, earlier_times
from qubes_itests.pytest_plugin.tampering import ModuleGuard
from qubes_itests.pytest_plugin.worker import ROLE, distributes, is_worker
from qubes_itests.report import failures
from qubes_itests.report.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence

    from qubes_itests.pytest_plugin.recording import Recording
    from qubes_itests.pytest_plugin.watch import FailureWatch
    from qubes_itests.report.results import Results
    from qubes_itests.run.settings import Settings

__all__ = ["Job", "JobParts", "pytest_arguments"]


def pytest_arguments(given: Sequence[str], cache: Path) -> list[str]:
    """Return pytest's arguments for the main job in the current directory.

    The pytest.ini and the conftest.py files there belong to another suite.

    :param given: what the user gave, which wins where it can.
    :param cache: the root of the cache.
    """
    return [
        # It speaks up in every run that sets no options for it, and serves no TestCase.
        *("-p", "no:asyncio"),
        # Of all this process has, workers of pytest-xdist get the arguments.
        *("-p", "qubes_itests.pytest_plugin.job_worker"),
        *("-c", os.devnull, "--rootdir", str(Path.cwd()), "--noconftest"),
        *("-o", f"cache_dir={failures.state(cache) / 'pytest'}"),
        *("-o", "verbosity_test_cases=-1", "--no-header", "--strict-markers"),
        # Our own summary tells of failures.
        "-rN",
        *given,
    ]


class Job:
    """The pytest plugin that makes a pytest run the main job.

    :param settings: of the run.
    :param cache: the root of the cache.
    """

    def __init__(self, settings: Settings, cache: Path) -> None:
        self._settings = settings
        self._cache = cache

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """Hand the settings to the plugin proper."""
        config.stash[SETTINGS] = self._settings
        # ids of plugins' tests are the same wherever they are installed
        config.stash[SUITE] = ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self, session: pytest.Session) -> bool | None:
        """Collect entry points; the words on the command line select among them."""
        config = session.config
        if distributes(config):
            return None
        words = [] if config.args_source.name != "ARGS" else list(config.args)
        templates = self._settings.templates
        with _ending(session):
            collect(session, nodes(session, templates, words), Selection(words))
        return True

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, Any, Any]:
        """Make the testbed first: without it, no test says anything."""
        config = session.config
        if session.items and not config.option.collectonly:
            with _ending(session):
                config.stash[CONTEXT].testbed  # noqa: B018 - is made by this
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(
        self, session: pytest.Session
    ) -> Generator[None, Any, Any]:
        """Take the testbed down, and end with what a person needs to go on."""
        result = yield
        config = session.config
        if config.option.collectonly or is_worker(config):
            return result
        context = config.stash[CONTEXT]
        watch = cast(
            "FailureWatch", config.pluginmanager.get_plugin("qubes_itests-failures")
        )
        found = list(watch.failures.values())
        interrupted = session.exitstatus == ExitCode.INTERRUPTED
        results: Results | None
        results = config.pluginmanager.get_plugin("qubes_itests-results")
        ended = {result.test for result in results.ended} if results else set()
        last = failures.LastRun(
            tuple(found),
            interrupted,
            session.testscollected - len(ended | watch.failures.keys()),
        )
        try:
            failures.store(failures.last_run(self._cache), last)
        except OSError as error:  # the failures themselves are to be told
            watch.artifacts.problems.setdefault(f"{type(error).__name__}: {error}")
        leaks, panics = context.close(), watch.panics
        if distributes(config):
            controller = _role(config)
            leaks, panics = leaks + controller.leaks, panics | controller.panics
        trouble = _trouble(panics, leaks)
        _settle_status(session, trouble)
        terminal = config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None:
            failures.show(found, COMMAND, terminal.write_line)
            if config.stash[SETTINGS].app and set(filter(None, terminal.stats)) == {
                "skipped"
            }:
                terminal.write_line(_ALL_SKIPPED)
            for problem in watch.artifacts.problems:
                terminal.write_line(f"not all artefacts could be kept: {problem}")
            if ending := last.ending():
                terminal.write_line(f"\n{ending}")
            for _, text in trouble:
                terminal.write_line(text)
        return result


#: Of the tests of apps: they skip what is not installed, and that looks like success.
_ALL_SKIPPED: Final = (
    "\nAll tests were skipped: nothing is tested. What they need in their VMs is said"
    "\nby a section [qubes_itests:template:NAME] in the app's setup.cfg, or in a file"
    "\nthat --template-spec names."
)


@contextlib.contextmanager
def _ending(session: pytest.Session) -> Iterator[None]:
    """Have an error in here end the run; that of a worker is told by the controller."""
    try:
        yield
    except (pytest.UsageError, HarnessError) as error:
        status: int = ExitCode.USAGE_ERROR
        if isinstance(error, HarnessError):
            status = error.exit_code
        if is_worker(session.config):
            _role(session.config).stop(session, status, str(error))
        elif isinstance(error, HarnessError):
            raise pytest.exit.Exception(str(error), status) from None
        else:
            raise


def _role(config: pytest.Config) -> Any:
    return config.pluginmanager.get_plugin(ROLE)


def _trouble(
    panics: Mapping[str, Sequence[str]], leaks: Sequence[str]
) -> list[tuple[ExitCode, str]]:
    """Return what is wrong with the run as a whole, the most telling last."""
    return [
        *(
            (ExitCode.LEAKED_RESOURCE, f"left at the end of the run: {leak}")
            for leak in leaks
        ),
        *(
            (ExitCode.GUEST_PANIC, f"guest panic in {test}: {text}")
            for test, said in panics.items()
            for text in said
        ),
    ]


def _settle_status(
    session: pytest.Session, trouble: Sequence[tuple[ExitCode, str]]
) -> None:
    """Let a panic explain failures, and a leak spoil a success."""
    for code, _ in trouble:
        weaker = {ExitCode.OK, ExitCode.LEAKED_RESOURCE}
        if code is ExitCode.GUEST_PANIC:
            weaker |= {ExitCode.TESTS_FAILED, ExitCode.FLAKY}
        if int(session.exitstatus) in weaker:
            session.exitstatus = code


class JobParts:
    """What the main job changes of pytest's own parts, once they are there."""

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """Show progress our way; guard loaded modules, switch extensions."""
        register = config.pluginmanager.register
        register(ModuleGuard(), "qubes_itests-modules")
        register(ExtensionSwitch(), "qubes_itests-extensions")
        register(_Header(config), "qubes_itests-header")
        if is_worker(config) or not config.pluginmanager.has_plugin("terminalreporter"):
            return
        times = config.stash[SETTINGS].times
        usual = functools.partial(earlier_times, config, times)
        progress = Progress(config, usual, several=distributes(config))
        register(progress, "qubes_itests-progress")
        recording: Recording | None
        recording = config.pluginmanager.get_plugin("qubes_itests-recording")
        if recording is not None and config.get_verbosity() > 0:
            recording.listener = progress.show_record


class _Header:
    """A pytest plugin that prints our header; pytest's own speaks of unused files.

    It is made after the terminal reporter, whose line is above it, and before what
    starts workers, whose lines are below.

    :param config: pytest's.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(trylast=True)
    def pytest_sessionstart(self) -> None:
        """Print it."""
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if terminal is None or self._config.get_verbosity() < 0:
            return
        seed = self._config.stash[SETTINGS].seed
        terminal.write_line(f"{NAME} {__version__}, pytest {pytest.__version__}")
        for line in [*header.all_lines(self._config), f"seed: {seed}"]:
            terminal.write_line(line)
