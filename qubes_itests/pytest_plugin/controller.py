"""The process that hands the tests of a run to workers, with pytest-xdist.

Each worker is in its own sandbox within that of the run, so that it mounts, names
and kills as if it were alone, and ends with the run whatever becomes of either.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from execnet import XSpec
from execnet.gateway_io import popen_bootstrapline
from xdist.dsession import Interrupted
from xdist.workermanage import parse_tx_spec_config

from qubes_itests.exc import UsageError
from qubes_itests.exit_codes import ExitCode
from qubes_itests.host import memory, sandbox
from qubes_itests.pytest_plugin.groups import GroupScheduling
from qubes_itests.pytest_plugin.history import earlier_times
from qubes_itests.pytest_plugin.sharding import SHARD
from qubes_itests.pytest_plugin.worker import KEY, PLAN
from qubes_itests.report.heartbeat import duration
from qubes_itests.run.settings import plain

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Generator, Sequence

    from execnet import Gateway
    from xdist.workermanage import WorkerController

    from qubes_itests.pytest_plugin.sharding import Shard
    from qubes_itests.pytest_plugin.watch import FailureWatch
    from qubes_itests.report.results import Results
    from qubes_itests.run.context import RunContext

__all__ = ["Controller", "most_workers"]

#: MiB of a `--memory-budget` that are dom0's, and so a number only.
_DOM0 = 1024
#: Seconds that workers have after Ctrl-C to keep what their tests leave, and to end.
_LAST_WORDS = 60.0
_SELECTING = (
    "QUBES_TEST_EXTRA_INCLUDE",
    "QUBES_TEST_EXTRA_EXCLUDE",
    "QUBES_TEST_TEMPLATES",
)


class Controller:
    """A pytest plugin, of the process that distributes tests.

    :param config: pytest's.
    :param context: the run.
    :param watch: keeps what failures leave.
    :raise pytest.UsageError: when the options do not go with so many workers.
    """

    def __init__(
        self, config: pytest.Config, context: RunContext, watch: FailureWatch
    ) -> None:
        self._config = config
        self._context = context
        self._watch = watch
        if context.settings.shell_on_failure:
            raise pytest.UsageError(
                "--shell-on-failure is for one test at a time: leave -n and --tx out"
            )
        specs = [XSpec(text) for text in parse_tx_spec_config(config)]
        self._workers = len(specs)
        self._places = [_place(spec) for spec in specs]
        self._share = self._share_here()
        self._nodes: list[WorkerController] = []
        self._begun: dict[str, float] = {}
        self._starting: list[XSpec] = []
        #: Why workers ended before their tests: exit statuses and sentences.
        self.stops: list[tuple[int, str]] = []
        #: What could not be taken down: a sentence each.
        self.leaks: list[str] = []
        #: What guests' kernels said when they gave up, by test.
        self.panics: dict[str, list[str]] = {}

    def header(self) -> str:
        """Return a line about the workers."""
        own = ", each in its own sandbox" if sandbox.active() else ""
        share = f", with {self._share} MiB of memory for VMs" if self._share else ""
        return f"workers: {self._workers}{own}{share}"

    def _share_here(self) -> int:
        """Return what each worker on this machine may give to VMs, MiB."""
        workers = self._places.count("")
        if not workers:
            return 0
        settings = self._context.settings
        total = settings.host_memory or memory.for_vms()
        try:
            return memory.share(total, workers, settings.memory_budget - _DOM0)
        except UsageError as error:
            raise pytest.UsageError(str(error)) from None

    @pytest.hookimpl(tryfirst=True)
    def pytest_xdist_setupnodes(self, specs: Sequence[XSpec]) -> None:
        """Have each worker's Python start in a sandbox, here or elsewhere."""
        self._starting = list(specs)
        for spec in specs:
            if sandbox.active():
                spec.python = shlex.join(_command(spec))

    @pytest.hookimpl
    def pytest_xdist_newgateway(self, gateway: Gateway) -> None:
        """End the run if a worker's Python did not start.

        :raise pytest.exit.Exception: with the status of what should have started it.
        """
        process = _process(gateway)
        if process and (status := process.poll()) is not None:
            raise _not_started(gateway.spec, status)
        self._starting = self._starting[1:]

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionstart(self) -> Generator[None, Any, Any]:
        """End the run if a worker's Python ended before it was spoken to.

        :raise pytest.exit.Exception: as above.
        """
        try:
            return (yield)
        except BrokenPipeError:
            spec = self._starting[0]
            raise _not_started(spec, ExitCode.USAGE_ERROR) from None

    @pytest.hookimpl
    def pytest_configure_node(self, node: WorkerController) -> None:
        """Send a worker what is on no command line."""
        self._nodes.append(node)
        place = _place(node.gateway.spec)
        told = plain(self._context.settings)
        shard: Shard | None = self._config.pluginmanager.get_plugin(SHARD)
        if not place:
            told["host_memory"] = self._share
        node.workerinput[KEY] = {
            "settings": told,
            "remote": bool(place),
            "workers": self._places.count(place),
            "directory": "" if place or not sandbox.active() else self._directory(),
            # They select plugins and templates, and must everywhere.
            "environment": {n: v for n, v in os.environ.items() if n in _SELECTING},
            # We ignore them ourselves alone, and a worker is in our process group.
            "ignored": [] if place else sandbox.ignored_signals(),
            "times": dict(shard.times) if shard else {},
            "grouped": self._config.getoption("dist") == "loadgroup",
        }

    def _directory(self) -> str:
        return str(self._context.place)

    @pytest.hookimpl(tryfirst=True)
    def pytest_xdist_make_scheduler(
        self, config: pytest.Config, log: Any
    ) -> GroupScheduling | None:
        """Keep the tests of a group together; other ways are pytest-xdist's own."""
        if config.getoption("dist") != "loadgroup":
            return None
        return GroupScheduling(
            config, log, earlier_times(config, self._context.settings.times)
        )

    @pytest.hookimpl
    def pytest_testnodedown(self, node: WorkerController) -> None:
        """Take up what a worker has found out."""
        if node in self._nodes:
            self._nodes.remove(node)
        output = _output(node)
        self.leaks += output.get("leaks", ())
        self.panics |= output.get("panics", {})
        if plan := output.get("plan"):
            self._config.stash[PLAN] = plan
        if stop := output.get("stop"):
            self.stops.append(tuple(stop))
        if told := output.get("interrupted"):
            test, cause, files = told
            self._watch.artifacts.add(test, files)
            self._watch.tell(test, f"in {node.gateway.id}: {cause}")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Remember when a test began."""
        self._begun[nodeid] = time.time()

    @pytest.hookimpl
    def pytest_handlecrashitem(self, crashitem: str, report: Any) -> None:
        """Keep what the guests of a worker said that was killed."""
        if sandbox.active() and not _place(report.node.gateway.spec):
            run = self._context.place / report.node.gateway.id
            self._watch.keep_logs(crashitem, run, self._begun.get(crashitem, 0))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, Any, Any]:
        """End the run as it would end without workers.

        :raise pytest.exit.Exception: when the machine was not ready.
        :raise pytest.UsageError: when no such test was found.
        :raise pytest.Session.Failed: when there were too many failures.
        """
        try:
            return (yield)
        except Interrupted as why:
            raise self._ending(session, why) from None

    def _ending(self, session: pytest.Session, why: BaseException) -> BaseException:
        for status, text in self.stops:
            if status == ExitCode.USAGE_ERROR:
                return pytest.UsageError(text)
            return pytest.exit.Exception(text, status)
        failures = self._config.getoption("maxfail")
        if failures and session.testsfailed >= failures:
            return session.Failed(str(why))
        return why

    @pytest.hookimpl
    def pytest_keyboard_interrupt(
        self, excinfo: pytest.ExceptionInfo[BaseException]
    ) -> None:
        """Have the workers clean up now, who may not have heard of it, and tell.

        pytest-xdist listens to none of them any more.
        """
        if isinstance(excinfo.value, Interrupted):
            return
        for node in self._nodes:
            if (process := _process(node.gateway)) and process.poll() is None:
                process.send_signal(signal.SIGINT)
        end = time.monotonic() + _LAST_WORDS
        # A second Ctrl-C does not wait for them. If it were raised from here, pytest
        # would keep the exit status that it begins with, which is that of a good run.
        with contextlib.suppress(KeyboardInterrupt):
            while time.monotonic() < end and not all(map(_has_ended, self._nodes)):
                time.sleep(0.05)
        for node in tuple(self._nodes):
            self.pytest_testnodedown(node)
        results: Results | None
        results = self._config.pluginmanager.get_plugin("qubes_itests-results")
        for result in results.unfinished if results else ():
            if result.test not in self._watch.failures:
                took = duration(time.time() - result.started)
                cause = f"interrupted after {took}; its worker did not say where"
                self._watch.tell(result.test, cause)


def _process(gateway: Gateway) -> subprocess.Popen[bytes] | None:
    """Return the process here that a worker is, or by which it is reached, if any."""
    process: subprocess.Popen[bytes] | None
    process = getattr(gateway._io, "popen", None)  # noqa: SLF001
    return process


def _output(node: WorkerController) -> dict[str, Any]:
    """Return what a worker said at its end; nothing before, or if it said nothing."""
    output: dict[str, Any] = vars(node).get("workeroutput", {}).get(KEY, {})
    return output


def _has_ended(node: WorkerController) -> bool:
    # one that was about to begin has no channel yet
    channel = vars(node).get("channel")
    return channel is None or bool(_output(node)) or bool(channel.isclosed())


def _place(spec: XSpec) -> str:
    """Return how another machine is reached; an empty string for this one."""
    return str(spec.on or "")


def _command(spec: XSpec) -> list[str]:
    """Return what starts a worker's Python; pytest-xdist adds Python's arguments."""
    python = shlex.split(spec.python) if spec.python else [sys.executable]
    if sys.flags.safe_path:
        python.append("-P")
    if not spec.on:
        return sandbox.command(python, outer_network=True)
    command = sandbox.command(python)
    # There the words are a shell's: it gets all of them from us, and takes those that
    # are added for a comment.
    line = shlex.join([*command, "-u", "-c", popen_bootstrapline])
    here = shlex.quote(str(Path.cwd()))
    return [*shlex.split(str(spec.on)), f"cd {here} && exec {line} #"]


def _not_started(spec: XSpec, status: int) -> BaseException:
    not_ready = ExitCode.NOT_ROOT <= status <= ExitCode.NO_NETWORK
    return pytest.exit.Exception(
        f"`{spec.on or spec.python}` ended and started no worker;"
        " what it said is above",
        status if not_ready else ExitCode.USAGE_ERROR,
    )


def most_workers() -> int:
    """Return how many workers `-n auto` starts: one per CPU that has memory too."""
    room = memory.for_vms() // memory.LEAST
    return max(1, min(len(os.sched_getaffinity(0)), room))
