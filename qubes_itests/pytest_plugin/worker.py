"""A worker: a process that runs tests for a controller, and reports to it."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qubes_itests.host import memory, sandbox
from qubes_itests.program import typed
from qubes_itests.run.settings import Settings, convert

if TYPE_CHECKING:
    from collections.abc import Generator

    from qubes_itests.pytest_plugin.watch import FailureWatch
    from qubes_itests.run.context import RunContext

__all__ = [
    "KEY",
    "PLAN",
    "ROLE",
    "Worker",
    "distributes",
    "is_remote",
    "is_worker",
    "part",
    "prepare",
    "refuse_options",
    "settings",
    "times",
]

#: A digest of which machine has which tests, where several share them.
PLAN = pytest.StashKey[str]()
#: Where our words are among those that a controller and its workers exchange.
KEY = "qubes_itests"
#: Brings the worker back into its own network.
_BACK = pytest.StashKey[Callable[[], None]]()
#: The name of the plugin of a process that has a part in a run with several.
ROLE = "qubes_itests-role"


def is_worker(config: pytest.Config) -> bool:
    """Return whether this process gets its tests from another."""
    return KEY in getattr(config, "workerinput", ())


def is_remote(config: pytest.Config) -> bool:
    """Return whether this process gets its tests from another machine."""
    return is_worker(config) and bool(_told(config)["remote"])


def distributes(config: pytest.Config) -> bool:
    """Return whether this process hands its tests to others."""
    option = config.option
    return (
        getattr(option, "dist", "no") != "no"
        and bool(getattr(option, "tx", None))
        and not option.collectonly
        and not hasattr(config, "workerinput")
    )


def refuse_options(config: pytest.Config) -> None:
    """Refuse what pytest-xdist offers and what is not, or is something else, here.

    :raise pytest.UsageError: with what to do instead.
    """
    option = config.option
    if is_worker(config):
        return
    # an option of its own plugin, which can be there without the other and the reverse
    if getattr(option, "looponfail", False):
        raise pytest.UsageError(
            "--looponfail runs files of tests in a process that is no part of this run:"
            f" `{typed('repl')}` loads tests again and runs them, --until-fail repeats"
        )
    if not hasattr(option, "tx"):
        return
    specs = [*(option.tx or ()), *(option.px or ())]
    restarts = option.maxworkerrestart
    if option.dist == "each":
        raise pytest.UsageError(
            "--dist=each has several workers run the same test, and what it leaves has"
            " one name: --repeat runs tests several times"
        )
    if option.px or any(re.search(r"\b(?:ssh|socket|via)=", spec) for spec in specs):
        raise pytest.UsageError(
            "--tx and --px begin no worker by ssh=, socket= or via= in a sandbox: give"
            " a command that does, --tx 'popen//on=ssh HOST'"
        )
    if option.rsyncdir:
        raise pytest.UsageError(
            "--rsyncdir copies nothing to workers that are begun by a command: have the"
            " files there before"
        )
    if restarts is not None and not str(restarts).isdigit():
        raise pytest.UsageError(
            f"--max-worker-restart: expected a number, got {restarts!r}"
        )


def prepare(config: pytest.Config) -> None:
    """Keep classes together unless another way was chosen; drop what is not here.

    Call it before pytest-xdist acts on its options.
    """
    option = config.option
    if is_worker(config):
        os.environ.update(_told(config)["environment"])
        for number in _told(config)["ignored"]:
            signal.signal(number, signal.SIG_IGN)
        if _told(config)["grouped"]:
            option.loadgroup = False
        if is_remote(config):
            option.basetemp = None
        # Plugins of others connect a worker to its controller by the loopback interface
        # (pytest-rerunfailures does), when they are set up: from then on it is apart.
        config.stash[_BACK] = sandbox.enter_outer_network()
    elif not hasattr(config, "workerinput") and not getattr(option, "distload", True):
        several = option.numprocesses or (option.tx and option.numprocesses is None)
        if several and option.dist == "no":
            option.dist = "loadgroup"


def settings(config: pytest.Config) -> Settings:
    """Return a worker's settings."""
    told = _told(config)
    words = told["settings"].items()
    values: dict[str, Any] = {n: convert(n, v, "the controller") for n, v in words}
    if is_remote(config):
        room = values["host_memory"] or memory.for_vms()
        values["host_memory"] = room // told["workers"]
    # They are started on CPUs that nobody uses, of which there is none for long here if
    # each has its worker.
    idle = told["workers"] < len(os.sched_getaffinity(0))
    values["clones_ahead"] *= idle
    values["clones_ahead"] //= told["workers"]
    return Settings(**values)


def times(config: pytest.Config) -> dict[str, float]:
    """Return the seconds that tests took earlier, as the controller knows them."""
    told: dict[str, float] = _told(config)["times"] if is_worker(config) else {}
    return told


def part(config: pytest.Config) -> tuple[Path, str] | None:
    """Return where in the run's directory a worker has its own, if it is there."""
    if not is_worker(config) or not (directory := _told(config)["directory"]):
        return None
    return Path(directory), config.workerinput["workerid"]  # type: ignore[attr-defined]


def _told(config: pytest.Config) -> dict[str, Any]:
    told: dict[str, Any] = config.workerinput[KEY]  # type: ignore[attr-defined]
    return told


class Worker:
    """A pytest plugin, of a process that runs tests for a controller.

    :param config: pytest's.
    :param context: the worker's part of the run.
    :param watch: sees tests fail.
    """

    def __init__(
        self, config: pytest.Config, context: RunContext, watch: FailureWatch
    ) -> None:
        self._config = config
        self._context = context
        self._watch = watch
        self._stop: tuple[int, str] | None = None
        # Ctrl-C comes from the terminal and, for those who are at none, from the
        # controller: the second one broke off what the first one has a worker tell.
        sandbox.interrupt_once()

    def stop(self, session: pytest.Session, status: int, text: str) -> None:
        """Run no tests, and have the controller end the run."""
        self._stop = int(status), text
        session.shouldstop = text

    @pytest.hookimpl(trylast=True)
    def pytest_sessionstart(self) -> None:
        """Be in the network of the sandbox: plugins are connected to the controller."""
        self._config.stash[_BACK]()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self) -> bool | None:
        """Wait for no tests if there will be none."""
        return self._stop and True

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection_finish(
        self, session: pytest.Session
    ) -> Generator[None, Any, Any]:
        """Have pytest-xdist tell the tests' groups with their ids."""
        if not _told(self._config)["grouped"]:
            return (yield)
        from qubes_itests.pytest_plugin.groups import with_groups  # noqa: PLC0415

        with with_groups(session):
            return (yield)

    def pytest_enter_pdb(self) -> None:
        """Say why there is no prompt; the debugger would only say that it quits."""
        pytest.fail("a breakpoint() needs a terminal, which workers lack: leave -n out")

    def _interrupted(self) -> tuple[str, str, dict[str, bytes]] | None:
        """Return a test that was interrupted, why it had not ended, and what it left.

        pytest-xdist carries no word of it; the files, too, from another machine only.
        """
        if self._watch.interrupted is None:
            return None
        test, cause = self._watch.interrupted
        remote = is_remote(self._config)
        return test, cause, self._watch.artifacts.pack(test) if remote else {}

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        """Let a signal end what has nothing to clean up any more, without a word."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number not in sandbox.ignored_signals():
                    signal.signal(number, signal.SIG_DFL)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """Take everything down, and tell what a controller cannot see."""
        output = self._config.workeroutput  # type: ignore[attr-defined]
        output[KEY] = {
            "leaks": self._context.close(),
            "panics": self._watch.panics,
            "interrupted": self._interrupted(),
            "stop": self._stop,
            "plan": self._config.stash.get(PLAN, ""),
        }
