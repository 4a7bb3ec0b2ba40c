"""The main job: pytest runs the tests of the installed plugins, and no files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from qubes_itests import __version__
from qubes_itests.exc import EnvironmentNotReadyError
from qubes_itests.fixtures.session import CONTEXT
from qubes_itests.pytest_plugin import SETTINGS, header
from qubes_itests.pytest_plugin.collection import Selection, collect, nodes
from qubes_itests.pytest_plugin.tampering import ModuleGuard
from qubes_itests.report import failures
from qubes_itests.report.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from qubes_itests.configuration import Settings
    from qubes_itests.pytest_plugin.watch import FailureWatch

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
        *("-c", os.devnull, "--rootdir", str(Path.cwd()), "--noconftest"),
        *("-o", f"cache_dir={failures.state(cache) / 'pytest'}"),
        *("-o", "verbosity_test_cases=-1", "--no-header", "--strict-markers"),
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

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> Generator[None, Any, Any]:
        """Print our header; pytest's own speaks of files that are not used."""
        result = yield
        terminal = session.config.pluginmanager.get_plugin("terminalreporter")
        if terminal is None or session.config.get_verbosity() < 0:
            return result
        seed = self._settings.seed
        terminal.write_line(f"qubes-itests {__version__}, pytest {pytest.__version__}")
        for line in [*header.lines(session.config.stash[CONTEXT]), f"seed: {seed}"]:
            terminal.write_line(line)
        return result

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self, session: pytest.Session) -> bool:
        """Collect entry points; the words on the command line select among them."""
        config = session.config
        words = [] if config.args_source.name != "ARGS" else list(config.args)
        templates = self._settings.template
        collect(session, nodes(session, templates), Selection(words))
        return True

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, Any, Any]:
        """Make the testbed first: without it, no test says anything."""
        if session.items and not session.config.option.collectonly:
            try:
                session.config.stash[CONTEXT].testbed  # noqa: B018 - is made by this
            except ModuleNotFoundError:
                pass
            except EnvironmentNotReadyError as error:
                raise pytest.exit.Exception(str(error), error.exit_code) from None
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(
        self, session: pytest.Session
    ) -> Generator[None, Any, Any]:
        """End with what a person needs to go on."""
        result = yield
        config = session.config
        if config.option.collectonly:
            return result
        watch = cast(
            "FailureWatch", config.pluginmanager.get_plugin("qubes_itests-failures")
        )
        found = list(watch.failures.values())
        failures.store(failures.last_run(self._cache), found)
        terminal = config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None:
            failures.show(found, failures.COMMAND, terminal.write_line)
        return result


class JobParts:
    """What the main job changes of pytest's own parts, once they are there."""

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """Show progress our way, and guard the loaded modules."""
        config.pluginmanager.register(ModuleGuard(), "qubes_itests-modules")
        if config.pluginmanager.has_plugin("terminalreporter"):
            config.pluginmanager.register(Progress(config), "qubes_itests-progress")
