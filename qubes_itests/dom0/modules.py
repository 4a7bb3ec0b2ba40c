"""The modules that a core imports of its platform, as long as they are wanted."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, NoReturn

from qubes_itests.exc import HarnessError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator

    from qubes_itests.dom0.machine import Machine

__all__ = ["install", "machine", "missing", "place", "uncovered", "use"]

_PLACE: Final = "qubes_itests.dom0"
#: By the name that a core imports.
_MODULES: Final = {
    "libvirt": "libvirt_module",
    "libvirtaio": "libvirt_module",
    "qubesdb": "qubesdb_module",
    "xen.lowlevel.xc": "xc_module",
    "xen.lowlevel.xs": "xs_module",
}
#: Back ends that need the real one, which have to have it before it is covered.
_BEFORE: Final = (
    "qubes_itests.hypervisor.libvirt_hypervisor",
    "qubes_itests.hypervisor.qemu",
)

_LACKING: Final = Path(__file__).with_name("lacking")
_OURS: Final = ("qubes_itests", "qubes_storage")
_as_completed = asyncio.as_completed
_all_entry_points = importlib.metadata.entry_points

_machine: list[Machine] = []
#: The real ones, by name.
_covered: dict[str, ModuleType] = {}


def install() -> None:
    """Have imports from now on find them, in this process."""
    for name in _BEFORE:
        importlib.import_module(name)
    _covered.update({n: sys.modules[n] for n in _MODULES if n in sys.modules})
    for name, module in _MODULES.items():
        place(name, importlib.import_module(f"{_PLACE}.{module}"))
    importlib.metadata.entry_points = _entry_points  # type: ignore[assignment]
    if importlib.util.find_spec("pkg_resources"):
        # by which older cores look them up
        older: Any = importlib.import_module("pkg_resources")
        older.iter_entry_points = lambda group, name=None: iter(
            _entry_points(group=group, **({"name": name} if name else {}))
        )
    logging.setLogRecordFactory(_record)
    with warnings.catch_warnings(), contextlib.suppress(ModuleNotFoundError):
        # core-qrexec has it imported by pyinotify: a line of warning in each run
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("asyncore")
    if sys.version_info < (3, 13):
        # tests call this when they close servers that have no client any more
        asyncio.Server.close_clients = lambda _server: None  # type: ignore[attr-defined]
        # a core waits so for what comes first while a disposable VM is made ahead
        asyncio.as_completed = _Completed  # type: ignore[assignment]
    # behind all others: for programs that this machine may have
    path = os.environ.get("PATH", os.defpath)
    if os.fspath(_LACKING) not in path.split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([path, os.fspath(_LACKING)])


def place(name: str, module: ModuleType) -> None:
    """Have a module found by a name, with the packages that it is in."""
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        if parent not in sys.modules:
            package = ModuleType(parent)
            package.__path__ = []
            place(parent, package)
        setattr(sys.modules[parent], child, module)


class _Completed:
    """`asyncio.as_completed` as it is since Python 3.13: also for ``async for``."""

    def __init__(
        self, fs: Iterable[Awaitable[Any]], *, timeout: float | None = None
    ) -> None:
        self._futures = [asyncio.ensure_future(one) for one in fs]
        self._timeout = timeout
        self._each = _as_completed(self._futures, timeout=timeout)

    def __iter__(self) -> Iterator[Awaitable[Any]]:
        return self._each

    def __next__(self) -> Awaitable[Any]:
        return next(self._each)

    async def __aiter__(self) -> AsyncIterator[asyncio.Future[Any]]:
        rest = set(self._futures)
        async with asyncio.timeout(self._timeout):
            while rest:
                first = asyncio.FIRST_COMPLETED
                done, rest = await asyncio.wait(rest, return_when=first)
                for one in done:
                    yield one


def _record(*arguments: Any, **more: Any) -> logging.LogRecord:
    """Return a record that is text alone.

    Handlers of pytest keep records; their arguments and tracebacks would keep VMs, and
    the tests of core-admin fail when one is left after them.
    """
    record = logging.LogRecord(*arguments, **more)
    try:
        text = record.getMessage()
    except Exception:  # noqa: BLE001 - whatever an argument raises; a log never does
        text = f"{record.msg} {record.args!r}"
    record.msg, record.args = text, None
    if record.exc_info:
        record.exc_text = logging.Formatter().formatException(record.exc_info)
        record.exc_info = None
    return record


def _entry_points(**selection: Any) -> importlib.metadata.EntryPoints:
    """Return entry points without those of ours, such as drivers of the same name."""
    found: Any = _all_entry_points(**selection)
    return importlib.metadata.EntryPoints(
        entry for entry in found if entry.module.partition(".")[0] not in _OURS
    )


@contextlib.contextmanager
def uncovered() -> Iterator[None]:
    """Have the real ones found within, if they are covered.

    The C part of the real libvirt looks the Python part up by its name: once, when it
    first adds a timer to an event loop, which it does as a hypervisor is opened.
    """
    ours = {name: sys.modules.get(name) for name in _MODULES}
    for name, module in ours.items():
        if module is not None and name in _covered:
            sys.modules[name] = _covered[name]
    try:
        yield
    finally:
        sys.modules.update({n: module for n, module in ours.items() if module})


def use(found: Machine | None) -> None:
    """Have them work on a machine; None for none."""
    _machine[:] = [] if found is None else [found]


def machine() -> Machine:
    """Return the machine that they work on; HarnessError before there is one."""
    if not _machine:
        raise HarnessError("no machine: a core is asked for something outside a test")
    return _machine[0]


def missing(what: str, name: str) -> NoReturn:
    """Raise for something that no core has asked for so far.

    :param what: its full name.
    :param name: as it was asked for.
    :raise AttributeError: names it; so `hasattr` works, as with the real module.
    """
    raise AttributeError(
        f"qubes_itests has no {what}: it offers what core-admin calls, and this was"
        " never called before",
        name=name,
    )
