"""The parts of the plugin, put together for one process of a run."""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from qubes_itests.fixtures.session import CONTEXT
from qubes_itests.hookspec import PROJECT
from qubes_itests.pytest_plugin import async_tests, worker
from qubes_itests.pytest_plugin.ci import CIReport
from qubes_itests.pytest_plugin.collection import PluginNode
from qubes_itests.pytest_plugin.deadline import Deadline
from qubes_itests.pytest_plugin.debugger import FailurePrompt
from qubes_itests.pytest_plugin.ending import Ending
from qubes_itests.pytest_plugin.guest_complaints import COMPLAINS, GuestComplaints
from qubes_itests.pytest_plugin.history import HistoryKeeper, earlier_times
from qubes_itests.pytest_plugin.known_issues import KnownIssues
from qubes_itests.pytest_plugin.last_words import LastWords
from qubes_itests.pytest_plugin.reach import RunReach
from qubes_itests.pytest_plugin.recording import Recording
from qubes_itests.pytest_plugin.repetition import Repetition
from qubes_itests.pytest_plugin.run_record import RunRecord
from qubes_itests.pytest_plugin.sharding import SHARD, Shard
from qubes_itests.pytest_plugin.watch import PANICS, FailureWatch
from qubes_itests.run.app_templates import plugins_for
from qubes_itests.run.context import RunContext
from qubes_itests.run.result import Prepared
from qubes_itests.run.settings import DEFAULT_TIMEOUT, Settings, Trace

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pluggy

__all__ = ["register_parts"]


def register_parts(
    config: pytest.Config, settings: Settings, prefix: str | None
) -> None:
    """Register what a process of a run needs, by its part in it and the settings.

    :param prefix: how our options begin where plain pytest runs; None for the main job.
    :raise pytest.UsageError: when settings or options do not go together.
    """
    words = LastWords(distributes=worker.distributes(config))
    config.pluginmanager.register(words, "qubes_itests-last-words")
    context = RunContext(settings, plugins_for(settings), worker.part(config))
    config.stash[CONTEXT] = context
    config.pluginmanager.register(_Offers(context.plugins), "qubes_itests-offers")
    config.addinivalue_line(
        "markers", f"{PANICS}: a guest's kernel panics in this test, as it is meant to"
    )
    config.addinivalue_line(
        "markers",
        f"{COMPLAINS}(*patterns): guests log errors or dump core in this test, as they"
        " are meant to; with regular expressions, lines in which one is found",
    )
    watch = FailureWatch(config, context)
    config.pluginmanager.register(watch, "qubes_itests-failures")
    of_apps = Prepared.told().complaints.values()
    complaints = bool(settings.fail_on) or any(each["fail_on"] for each in of_apps)
    if complaints and settings.trace is Trace.OFF:
        raise pytest.UsageError(
            "fail_on: lines of guests are looked for in timelines, of which --trace=off"
            " records none"
        )
    if complaints:
        guests = GuestComplaints(context)
        config.pluginmanager.register(guests, "qubes_itests-complaints")
    if settings.trace is not Trace.OFF and not worker.distributes(config):
        follow = complaints or settings.trace is Trace.ON
        recording = Recording(settings, watch.artifacts, follow_logs=follow)
        config.pluginmanager.register(recording, "qubes_itests-recording")
    deadline = Deadline(functools.partial(_time_limit, settings), watch.keep_stacks)
    watch.deadline = deadline
    if worker.distributes(config):
        from qubes_itests.pytest_plugin.controller import (  # noqa: PLC0415
            Controller,
        )

        controller = Controller(config, context, watch)
        config.pluginmanager.register(controller, worker.ROLE)
    else:
        reach = RunReach(config, context, deadline)
        config.pluginmanager.register(reach, "qubes_itests-reach")
        if worker.is_worker(config):
            one = worker.Worker(config, context, watch)
            config.pluginmanager.register(one, worker.ROLE)
    _register_results(config, settings, watch, prefix)
    _register_choices(config, settings, watch)
    if settings.shell_on_failure and not config.option.collectonly:
        watch.require_terminal()
    if config.getoption("usepdb"):
        config.pluginmanager.register(FailurePrompt(), "qubes_itests-debugger")
    config.pluginmanager.register(async_tests, "qubes_itests-async-tests")
    # the last, so that its clock runs around what the others do
    config.pluginmanager.register(deadline, "qubes_itests-deadline")


def _register_results(
    config: pytest.Config, settings: Settings, watch: FailureWatch, prefix: str | None
) -> None:
    """Have what came of tests told: to the history, in run.json, to a CI."""
    if worker.is_worker(config):
        return
    keeper = HistoryKeeper(config)
    register = config.pluginmanager.register
    register(keeper.results, "qubes_itests-results")
    register(keeper, "qubes_itests-history")
    if not config.option.collectonly:
        record = RunRecord(settings, watch, keeper.results)
        register(record, "qubes_itests-run-record")
        ends = CIReport(settings, watch.artifacts.root, keeper.results)
        register(ends, "qubes_itests-ci")
        if prefix is not None:
            register(Ending(settings, watch, prefix), "qubes_itests-ending")


def _register_choices(
    config: pytest.Config, settings: Settings, watch: FailureWatch
) -> None:
    """Set up what decides which tests run, how often, and which may fail."""
    if settings.shard:
        # Machines that share the tests must come to the same plan: they have histories
        # of their own, but the same file.
        known: Mapping[str, float] = worker.times(config)
        if settings.times and not worker.is_worker(config):
            known = earlier_times(config, settings.times)
        config.pluginmanager.register(Shard(*settings.shard, known), SHARD)
    if settings.repeat or settings.until_fail or settings.rerun_failed:
        repetition = Repetition(config, settings, watch)
        config.pluginmanager.register(repetition, "qubes_itests-repetition")
    told = map(Path, Prepared.told().known_issues)
    if files := [*settings.known_issues, *told]:
        issues = KnownIssues.of_files(files)
        config.pluginmanager.register(issues, "qubes_itests-known-issues")


def _time_limit(settings: Settings, item: pytest.Item) -> float:
    """Return the seconds for a test: as told, as its app says, or as usual."""
    limit = settings.timeout
    if limit is None:
        node = item.getparent(PluginNode)
        of_apps = Prepared.told().timeouts
        limit = of_apps.get(node.plugin.name if node else "", DEFAULT_TIMEOUT)
    # A process has one timer for signals: what pytest-timeout wants of it we do.
    if (theirs := item.config.pluginmanager.get_plugin("timeout")) is not None:
        asked: Any = theirs._get_item_settings(item)  # noqa: SLF001 - it tells nobody else
        if asked.timeout and asked.method == "signal":
            return float(min(limit or asked.timeout, asked.timeout))
    return limit


class _Offers:
    """Takes up the hooks of `qubes_itests.hookspec` that conftest modules have.

    :param registry: who is asked for templates, back ends and the others.
    """

    def __init__(self, registry: pluggy.PluginManager) -> None:
        self._registry = registry

    @pytest.hookimpl
    def pytest_plugin_registered(self, plugin: object) -> None:
        """Register a module that has such hooks; also called for earlier ones."""
        if isinstance(plugin, ModuleType):
            names = [name for name in vars(plugin) if name.startswith(f"{PROJECT}_")]
            if names and not self._registry.is_registered(plugin):
                self._registry.register(plugin)
