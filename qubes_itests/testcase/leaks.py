"""Leaks of a test: tasks, open files, coroutines never awaited, VM objects."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import time
import warnings
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from qubes_itests.exc import HarnessError
from qubes_itests.host import load
from qubes_itests.host.cache import descriptors_in_use

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from qubes_itests.core.vm.base import BaseVM
    from qubes_itests.hypervisor.contract import Hypervisor
    from qubes_itests.portal import Portal

__all__ = ["LeakError", "LeakWatch"]

#: Seconds for what is ending to end, where the CPUs are not busy.
_GRACE: Final = 2.0
_INTERVAL: Final = 0.01

#: Files that the harness and its libraries open when they first need them.
_OF_THE_HARNESS: Final = ("anon_inode:", "/dev/", "/proc/", "/sys/", "/memfd:")

_NEVER_AWAITED: Final = "was never awaited"


class LeakError(HarnessError, AssertionError):
    """A test left something behind; an AssertionError, so that it fails.

    :param leaks: one sentence for each thing.
    """

    def __init__(self, leaks: Sequence[str]) -> None:
        listed = "".join(f"\n- {leak}" for leak in leaks)
        super().__init__(f"the test left something behind:{listed}")
        self.leaks = tuple(leaks)


class LeakWatch:
    """Compares what there is at the end of a test with what was there at its begin.

    :param portal: the loop whose tasks are looked at.
    :param hypervisor: whose spare domains are no test's.
    """

    #: Whether the garbage collector has what stays to be looked through still: before
    #: the first test that which the testbed has loaded, which would make collecting
    #: take five times as long; later all, where a holder was searched for among it.
    _thawed: ClassVar = True

    def __init__(self, portal: Portal, hypervisor: Hypervisor) -> None:
        if LeakWatch._thawed:
            # Not at once, or what the test before this one has left could never go.
            LeakWatch._thawed = False
            gc.collect()
            gc.freeze()
        self._portal = portal
        self._hypervisor = hypervisor
        self._exit = contextlib.ExitStack()
        self._warned = self._exit.enter_context(warnings.catch_warnings(record=True))
        warnings.filterwarnings("always", f".*{_NEVER_AWAITED}", RuntimeWarning)
        self._vms: list[tuple[str, weakref.ref[Any]]] = []
        self._files = self._open_files()
        self._tasks = self._all_tasks()
        # What the loop could not hand to anybody before this test is not its fault.
        portal.take_failures()

    def vm_added(self, _app: object, _event: str, vm: BaseVM, **_kwargs: Any) -> None:
        """Remember a VM, weakly; a handler of the event ``domain-add``."""
        self._vms.append((str(vm), weakref.ref(vm)))

    def end(self, *, objects: bool = True) -> list[str]:
        """Return what is left, one sentence each, and cancel tasks that are.

        :param objects: whether to look for VM objects: a failure's traceback holds
            some, which would not go.
        """
        # A coroutine warns when it is freed, and a file is closed then: both have to
        # happen now, not in the test after this one.
        gc.collect()
        found = [*self._leaked_tasks(), *self._leaked_files()]
        found += self._leaked_vms() if objects else []
        found += [
            f"an error that no code has handled: {e}"
            for e in self._portal.take_failures()
        ]
        # Last: freeing the objects above may have added warnings.
        self._exit.close()
        for warning in self._warned or ():
            text = str(warning.message)
            if _NEVER_AWAITED in text:
                found.append(text.partition("\n")[0])
            else:  # recorded with the others, and none of our business
                warnings.showwarning(
                    warning.message, warning.category, warning.filename, warning.lineno
                )
        return found

    def _all_tasks(self) -> set[asyncio.Task[Any]]:
        # In the loop's thread: the set of tasks changes under any other.
        loop = self._portal.loop
        return self._portal.call(lambda: loop.all_tasks() - set(loop.background))

    def _leaked_tasks(self) -> list[str]:
        _until(lambda: not self._all_tasks() - self._tasks)
        left = self._all_tasks() - self._tasks
        # Before they are cancelled: a task that has ended is nowhere in its code.
        found = [f"task {_described(task)}" for task in left]
        for task in left:
            # From this thread a plain cancel() would not wake the loop.
            self._portal.loop.call_soon_threadsafe(task.cancel)
        return found

    def _leaked_files(self) -> list[str]:
        left: dict[str, str] = {}

        def gone() -> bool:
            nonlocal left
            left = dict(self._open_files().items() - self._files.items())
            return not left

        _until(gone)
        return [f"open file {number}: {target}" for number, target in left.items()]

    def _open_files(self) -> dict[str, str]:
        """Return what each file descriptor stands for."""
        found: dict[str, str] = {}
        for entry in Path("/proc/self/fd").iterdir():
            if entry.name in descriptors_in_use():
                continue
            with contextlib.suppress(OSError):  # it was the descriptor of the listing
                target = str(entry.readlink())
                if not target.startswith(_OF_THE_HARNESS):
                    found[entry.name] = target
        # Asked for after them: of one that has just been made this has to know.
        spare = [d.spec.name for d in self._hypervisor.domains(spare=True)]
        return {
            number: target
            for number, target in found.items()
            if not any(name in target + _peer(number, target) for name in spare)
        }

    def _leaked_vms(self) -> list[str]:
        def gone() -> bool:
            # Objects of an app refer to each other; only the collector frees them.
            gc.collect()
            return all(reference() is None for _, reference in self._vms)

        _until(gone)
        return [
            f"VM object {name}, held by {self._holders(vm)}"
            for name, reference in self._vms
            if (vm := reference()) is not None
        ]

    def _holders(self, vm: object) -> str:
        """Return what kinds of objects hold a VM."""
        # What is frozen, the lists of modules among it, is not searched.
        if gc.get_freeze_count():
            LeakWatch._thawed = True
            gc.unfreeze()
        kinds = {type(holder).__name__ for holder in gc.get_referrers(vm)}
        kinds -= {"frame", "list_iterator"}
        return ", ".join(sorted(kinds)) or "nothing that is known"


def _peer(number: str, target: str) -> str:
    """Return the path to which a descriptor is connected if it is of a Unix socket."""
    if not target.startswith("socket:"):
        return ""
    try:
        of_another = socket.socket(fileno=int(number))
    except OSError:  # the number is no socket's any more
        return ""
    try:
        return str(of_another.getpeername())
    except OSError:  # it is not connected, or closed by now
        return ""
    finally:
        of_another.detach()


def _until(condition: Callable[[], bool]) -> None:
    """Wait until something is true, or the grace is over."""
    deadline = time.monotonic() + _GRACE * load.delay()
    while not condition() and time.monotonic() < deadline:
        time.sleep(_INTERVAL)


def _described(task: asyncio.Task[Any]) -> str:
    coroutine: Any = task.get_coro()
    frame = getattr(coroutine, "cr_frame", None)
    name = getattr(coroutine, "__qualname__", repr(coroutine))
    if frame is None:
        return str(name)
    return f"{name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"  # noqa: PTH119 - a name for people
