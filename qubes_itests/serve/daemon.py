"""The daemon: one app, its VMs, and the sockets that it answers on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import threading
from dataclasses import dataclass
from logging.handlers import QueueHandler, QueueListener, RotatingFileHandler
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final

from qubes_itests.admin.server import AdminServer
from qubes_itests.admin.vm_calls import offer_to_vms
from qubes_itests.core.exc import QubesException
from qubes_itests.exc import HarnessError
from qubes_itests.host import sandbox
from qubes_itests.host.cache import Cache
from qubes_itests.host.rundir import RunDirectory, short_name
from qubes_itests.portal import Portal
from qubes_itests.run.app_templates import policy_of
from qubes_itests.run.testbed import open_testbed
from qubes_itests.serve.calls import CallServer
from qubes_itests.serve.environment import offer_programs
from qubes_itests.serve.place import Place
from qubes_itests.serve.state import State
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pluggy

    from qubes_itests.core.app import Qubes
    from qubes_itests.core.vm.qubesvm import QubesVM
    from qubes_itests.run.settings import Settings

__all__ = ["Serving", "serving", "wait_for_end"]

log = logging.getLogger("qubes_itests.serve")

#: Seconds that VMs have to shut down when the daemon ends.
_SHUTDOWN_TIMEOUT: Final = 30.0
#: Descriptors: an eighth is for clients of the Admin API, a VM takes about twenty.
_DESCRIPTORS: Final = 4096
#: Bytes of the log; what was before that is kept too, in a file of the same size.
_LONGEST_LOG: Final = 8 << 20
#: Records that wait for a terminal that is stopped.
_MOST_WAITING: Final = 1000
#: Seconds in which they come to the terminal at the end.
_LAST_WORDS: Final = 5.0
_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@dataclass(frozen=True, slots=True)
class Serving:
    """A server that is ready.

    :param place: where its sockets and programs are.
    :param state: what it keeps.
    :param kept: whether that stays when it ends.
    """

    place: Place
    state: State
    kept: bool


@contextlib.contextmanager
def serving(
    settings: Settings, plugins: pluggy.PluginManager, directory: Path | None
) -> Iterator[Serving]:
    """Serve an app while the context lasts; its VMs end with it.

    :param settings: which templates, hypervisor, filesystem and memory there are.
    :param directory: where the app's state is kept; None to forget it.
    :raise EnvironmentNotReadyError: when the machine lacks something.
    :raise UsageError: when another server has the directory.
    :raise StoreError: when what is in it is no state of an app.
    """
    sandbox.require()
    _allow_descriptors()
    cache = Cache()
    with contextlib.ExitStack() as stack:
        # All of this ends in the reverse order: first the sockets, so that nobody
        # starts a VM while the others shut down; what is mounted goes when nothing uses
        # it.
        run = stack.enter_context(RunDirectory(cache)).path
        short = stack.enter_context(short_name(run))
        state = stack.enter_context(State(directory or run / "state"))
        place = Place.of_run(run)
        place.directory.mkdir(mode=0o750)
        stack.enter_context(_log(place.directory / "log"))
        portal = stack.enter_context(Portal())
        pool = state.mount_point(settings.filesystem)
        testbed = stack.enter_context(
            open_testbed(
                *(portal, cache, short, settings, plugins),
                pool=pool,
                policy=policy_of(settings),
            )
        )
        app = portal.run(testbed.open_app(state.store, *settings.templates))
        stack.callback(lambda: portal.run(_shut_down(app)))
        portal.run(_report_orphans(app))
        # the app's directory is the sandbox's own
        (app.directory / "block").symlink_to(state.block)
        offer_programs(place, state.block)
        # by its short name, for the paths of sockets are limited; after the app is
        # whole, as a client may ask for anything from now on
        sockets = portal.run(_open_sockets(app, Place.of_run(short)))
        stack.callback(lambda: portal.run(sockets.aclose()))
        for name, error in portal.run(app.start_autostart()).items():
            log.error("%s did not start: %s", name, str(error))
        yield Serving(place, state, kept=directory is not None)


def _allow_descriptors() -> None:
    """Let this process have as many descriptors as its clients and VMs may take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def wait_for_end() -> None:
    """Wait until this process is told to end: Ctrl-C, SIGTERM or SIGHUP."""
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            signal.pause()


async def _open_sockets(app: Qubes, place: Place) -> contextlib.AsyncExitStack:
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(CallServer(lambda: (app,), place.relay_socket))
        # last: who finds this one may go on
        admin = await stack.enter_async_context(AdminServer(app, place.admin_socket))
        offer_to_vms(app, admin.dispatcher)
        return stack.pop_all()


async def _report_orphans(app: Qubes) -> None:
    for pool in app.pools.values():
        try:
            orphans = await app.find_orphans(pool)
        except QubesException as error:
            log.warning("%s", str(error))
            continue
        for vid in orphans:
            log.warning(
                "no VM has volume %s of pool %s: see the command `orphans`", vid, pool
            )


async def _shut_down(app: Qubes) -> None:
    """Give the VMs time to write what they keep; who takes longer is killed."""
    running = [vm for vm in app.domains.startable() if vm.is_running()]
    if running:
        ends = [asyncio.ensure_future(_end(vm)) for vm in running]
        await asyncio.wait(ends, timeout=_SHUTDOWN_TIMEOUT)
        for end in ends:
            # who waited for a VM no longer does; the testbed kills what still runs
            end.cancel()


async def _end(vm: QubesVM) -> None:
    name = vm.name
    try:
        if vm.is_paused():
            await vm.unpause()
        await vm.shutdown(force=True, wait=True)
    except (HarnessError, QubesException) as error:
        log.warning("%s is killed: %s", name, str(error))


class _SafeFormatter(logging.Formatter):
    """Begins a new line for each record, and for no text within one."""

    def format(self, record: logging.LogRecord) -> str:
        text = safe_text(super().format(record), lines=True, limit=None)
        return text.replace("\n", "\n  | ")


class _Waiting(QueueHandler):
    """Hands records on to another thread; those for which there is no room are lost."""

    queue: SimpleQueue[logging.LogRecord]

    def enqueue(self, record: logging.LogRecord) -> None:
        # no bound of the queue's own: there has to be room for its end
        if self.queue.qsize() < _MOST_WAITING:
            super().enqueue(record)


@contextlib.contextmanager
def _log(path: Path) -> Iterator[None]:
    """Have what happens in a file and the one before it, and warnings on stderr too."""
    file = RotatingFileHandler(
        path, maxBytes=_LONGEST_LOG, backupCount=1, encoding="utf-8"
    )
    terminal = logging.StreamHandler()
    file.setFormatter(_SafeFormatter(_FORMAT))
    terminal.setFormatter(_SafeFormatter(_FORMAT))
    # The event loop logs, and must not wait for a terminal that somebody has stopped.
    waiting = _Waiting(SimpleQueue())
    waiting.setLevel(logging.WARNING)
    listener = QueueListener(waiting.queue, terminal)
    listener.start()
    root = logging.getLogger()
    former = root.level
    root.setLevel(logging.INFO)
    for handler in (file, waiting):
        root.addHandler(handler)
    try:
        yield
    finally:
        root.setLevel(former)
        for handler in (file, waiting):
            root.removeHandler(handler)
            handler.close()
        # nor does the end of this process
        ending = threading.Thread(target=listener.stop, daemon=True)
        ending.start()
        ending.join(_LAST_WORDS)
