"""The suites of a checkout of core-admin."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import sys
import time
import traceback
import unittest
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

import pytest

from qubes_itests.discovery.extensions import PluginExtensions
from qubes_itests.discovery.inspection import has_tests
from qubes_itests.discovery.result import Plugin, Problem, TestClass
from qubes_itests.discovery.selection import TEMPLATES
from qubes_itests.dom0 import modules, qubesdb_module
from qubes_itests.dom0.opening import in_time, start_net_vm
from qubes_itests.dom0.programs import PROGRAMS
from qubes_itests.qmemman.sizes import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

__all__ = ["core_imports", "core_suites", "suite_names", "suites_for_ours"]

_GROUP: Final = "core"
_PACKAGE: Final = "qubes.tests"
_INTEGRATION: Final = "integ."
#: Modules beside the suites.
_OTHERS: Final = ("extra", "never_awaited", "run")
#: Suites that are ours, for what the core has: by their modules.
_OURS: Final = {"conformance": "qubes_itests.conformance.core_storage"}
_DISPLAY: Final = "it needs a display in dom0 and in VMs"
_FEDORA: Final = "it needs dom0's Fedora"
_NETWORK: Final = {
    "test_100_late_xldevd_startup": "in net VMs here no daemon sets interfaces up"
}
#: Suites that cannot run here, and what they need.
_NOT_HERE: Final = {
    "integ.audio": "it needs sound in dom0 and in VMs",
    "integ.backupdispvm": "it restores in an xterm of a VM, with the client in there",
    "integ.devices_pci": "it needs a PCI device that VMs may have",
    "integ.dom0_update": _FEDORA,
    "integ.grub": f"{_FEDORA}, with dracut and grub2",
    "integ.mime": _DISPLAY,
    "integ.salt": "it needs Salt in dom0",
    "integ.vm_update": _FEDORA,
}
#: Tests of other suites that cannot, and would not say so themselves.
_TESTS_NOT_HERE: Final = {
    "integ.basic": {"test_121_start_uefi": _DISPLAY},
    "integ.network": _NETWORK,
    "integ.network_ipv6": _NETWORK,
    "integ.vm_qrexec_gui": {
        "test_210_time_sync": "it sets the clock of this machine",
        "test_401_long_window_title_utf8": _DISPLAY,
    },
}

#: Drivers of storage whose tests skip themselves where the machine has no such storage.
_ABSENT: Final = (
    "qubes.storage.file",
    "qubes.storage.lvm",
    "qubes.storage.zfs",
)
#: Tests, of any suite, in which a guest's kernel panics on purpose.
_PANICS: Final = ("test_114_reattach_after_provider_crash",)
#: What tests of a class share that makes a file, has the driver copy it, and expects
#: the copy to have another time. The kernel's clock for those may be some ms behind.
#: Only this call is made later: all else that the driver does is as it is.
_COPIES: Final = "_test_copy_file"
#: What the kernel gives new files, by its number in <linux/time.h>.
_CLOCK_REALTIME_COARSE: Final = 5
#: Of a suite that computes checksums of whole volumes, twice in each test, for minutes
#: of a CPU, though most of each is a hole: they are as large as what is put into them.
#: Bytes.
_SIZES: Final = {
    "integ.backup": {"private_img_size": 256 * MIB, "root_img_size": 2048 * MIB}
}
_PROGRAMS: Final = ("qrexec_daemon", "qrexec_client", "qubesdb_daemon")


class _Programs(PluginExtensions):
    """Has the core find the programs of dom0, and a net VM, while tests with VMs run.

    Unit tests expect the paths that they have in Qubes OS.

    :param sizes: of new volumes, where they are not those of Qubes OS.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        super().__init__("", ())
        self._sizes = sizes
        self._undo = contextlib.ExitStack()

    def enter(self) -> None:
        config: Any = importlib.import_module("qubes.config")
        paths = {
            f"{name}_path": os.fspath(PROGRAMS / name.replace("_", "-"))
            for name in _PROGRAMS
        }
        self._undo.enter_context(mock.patch.dict(config.system_path, paths))
        self._undo.enter_context(mock.patch.dict(config.defaults, self._sizes))
        if self._sizes:
            # this class has looked its size up when it was imported
            appvm: Any = importlib.import_module("qubes.vm.appvm")
            private = appvm.AppVM.default_volume_config["private"]
            sized = mock.patch.dict(private, size=self._sizes["private_img_size"])
            self._undo.enter_context(sized)
        # it looks for what tells dom0 as it is imported, which is outside of dom0
        client: Any = sys.modules.get("qubesadmin")
        if client is not None:
            local = mock.patch.object(client, "Qubes", client.app.QubesLocal)
            self._undo.enter_context(local)
        start_net_vm()

    def leave(self) -> None:
        self._undo.close()


class _UnitTests(PluginExtensions):
    """Has unit tests find what core-admin's own recipe for them gives.

    :param source: the copy of the core that is imported.
    """

    def __init__(self, source: Path) -> None:
        super().__init__("", ())
        self._source = source
        self._undo = contextlib.ExitStack()

    def enter(self) -> None:
        # schemas are named from there
        self._undo.enter_context(contextlib.chdir(self._source))
        needless = mock.patch.object(qubesdb_module, "needs_daemon", new=False)
        self._undo.enter_context(needless)

    def leave(self) -> None:
        self._undo.close()


def _copying_later(test: Callable[..., None]) -> Callable[..., None]:
    """Return a test whose own call of the driver waits until files get another time."""

    @functools.wraps(test)
    def later(*words: Any, **options: Any) -> None:
        driver: Any = importlib.import_module("qubes.storage.reflink")
        copy = driver._copy_file  # noqa: SLF001 - which the test calls
        with mock.patch.object(
            driver, "_copy_file", wraps=copy, side_effect=_wait_for_tick
        ):
            test(*words, **options)

    return later


def _wait_for_tick(*_words: object, **_options: object) -> object:
    now = time.time_ns()
    while time.clock_gettime_ns(_CLOCK_REALTIME_COARSE) <= now:
        time.sleep(0.001)
    return mock.DEFAULT  # for a mock to go on with what it wraps


def suite_names(source: Path) -> list[str]:
    """Return the names of all suites of a checkout, in their order.

    :param source: the checkout, or its copy.
    """
    top = source.joinpath(*_PACKAGE.split("."))
    names = sorted(
        ".".join(path.relative_to(top).with_suffix("").parts)
        for path in top.rglob("*.py")
        if path.name != "__init__.py"
    )
    return [name for name in names if name not in _OTHERS]


def core_suites(
    source: Path, programs: PluginExtensions, words: Sequence[str] = ()
) -> list[Plugin]:
    """Load suites, within `core_imports`.

    :param source: the copy that is imported.
    :param programs: of dom0, for integration suites.
    :param words: ids of tests or how ids begin; suites that none can mean are not
        loaded. None for all.
    :return: one for each suite, with the name that ids of its tests begin with.
    """
    names = suite_names(source)
    if words:  # those of the checkout are all that "all" means
        names += _OURS
    ids = {f"{_GROUP}::{name}": name for name in names}
    # ours keep what they find where the run is, and not in the copy
    unit, ours = _UnitTests(source), PluginExtensions("", ())

    def extensions(name: str) -> PluginExtensions:
        if name.startswith(_INTEGRATION):
            return _Programs(_SIZES[name]) if name in _SIZES else programs
        return ours if name in _OURS else unit

    return [
        _suite(begin, name, extensions(name))
        for begin, name in ids.items()
        if not words or any(_may_mean(word, begin) for word in words)
    ]


class _Absent(ModuleType):
    """A driver that we have not: what it has is there to be named, and does nothing."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name=name, obj=self)
        return type(name, (), {})


def suites_for_ours(
    checkout: Path, templates: Sequence[str], words: Sequence[str] = ()
) -> list[Plugin]:
    """Load the integration suites of a checkout, to test our own core.

    The names of Qubes OS that they import are those of ours; nothing else of the
    checkout is imported but its other tests, as some suites use those.

    :param words: as for `core_suites`.
    :return: as `core_suites` does.
    """
    tests = importlib.import_module(_PACKAGE)
    tests.__path__ = [os.fspath(checkout.joinpath(*_PACKAGE.split(".")))]
    importlib.import_module("qubes.storage")
    for name in _ABSENT:
        modules.place(name, _Absent(name))
    with (
        mock.patch.dict(os.environ, {TEMPLATES: " ".join(templates)}),
        # nothing is written into the checkout
        mock.patch.object(sys, "dont_write_bytecode", new=True),
    ):
        return [
            plugin
            for plugin in core_suites(checkout, PluginExtensions("", ()), words)
            if plugin.name.startswith(f"{_GROUP}::{_INTEGRATION}")
        ]


def _may_mean(word: str, begin: str) -> bool:
    return begin.startswith(word) or word.startswith(f"{begin}::")


@contextlib.contextmanager
def core_imports(
    source: Path, checkout: Path, templates: Sequence[str]
) -> Iterator[PluginExtensions]:
    """Set what suites of a core look up while they are imported.

    The modules of the core and of its platform can be imported.

    :param source: the copy of the core that is imported.
    :param checkout: what that is a copy of, for git.
    :param templates: for classes that are made for each template.
    :return: has the core find the programs of dom0 while tests with VMs run.
    :raise HarnessError: the core itself cannot be imported, or not in time; says why.
    """
    variables = {TEMPLATES: " ".join(templates)}
    if (checkout / ".git").exists():
        # they find their files by the working tree that they are in
        variables |= {
            "GIT_DIR": os.fspath(checkout / ".git"),
            "GIT_WORK_TREE": os.fspath(source),
        }
    with mock.patch.dict(os.environ, variables):
        # before its suites: what is tried after an error finds half a package
        in_time("be imported", lambda: importlib.import_module(_PACKAGE))
        yield _Programs({})


def _suite(begin: str, name: str, extensions: PluginExtensions) -> Plugin:
    module_name = _OURS.get(name, f"{_PACKAGE}.{name}")
    if name in _NOT_HERE:
        cls = TestClass(_not_here(name, _NOT_HERE[name]))
        return Plugin(begin, _GROUP, module_name, _PACKAGE, classes=(cls,))
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - it may raise what it likes
        detail = traceback.format_exc()
        problem = Problem(f"{module_name} cannot be imported: {error!r}", detail)
        return Plugin(begin, _GROUP, module_name, _PACKAGE, problems=(problem,))
    members: list[Any] = [v for v in vars(module).values() if inspect.isclass(v)]
    classes = [
        cls
        for cls in members
        # ours are for pytest, which takes classes of any kind
        if (has_tests(cls) or name in _OURS) and cls.__module__ == module_name
    ]
    changes: dict[str, Callable[..., Any]] = {
        **dict.fromkeys(_PANICS, pytest.mark.guest_panics),
        _COPIES: _copying_later,
    }
    for test, reason in _TESTS_NOT_HERE.get(name, {}).items():
        changes[test] = unittest.skip(f"{test} cannot run here: {reason}")
    for test, change in changes.items():
        for cls in classes:
            if test in dir(cls):
                setattr(cls, test, change(getattr(cls, test)))
    return Plugin(
        name=begin,
        group=_GROUP,
        target=module_name,
        distribution=_PACKAGE,
        module=module,
        classes=tuple(map(TestClass, classes)),
        extensions=extensions,
    )


def _not_here(name: str, reason: str) -> type[unittest.TestCase]:
    """Return a test in place of a suite's: skipped, with the reason."""

    class NotHere(unittest.TestCase):
        @unittest.skip(f"{name} cannot run here: {reason}")
        def test_suite(self) -> None:
            pass

    return NotHere
