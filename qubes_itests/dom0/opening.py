"""dom0, from a testbed and a checkout to the store with its templates."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import importlib
import logging
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar
from unittest import mock

from qubes_itests.dom0 import modules
from qubes_itests.dom0.core_qmemman import CoreQmemman
from qubes_itests.dom0.machine import Machine
from qubes_itests.dom0.place import HOME, VAR_LIB_QUBES, dom0_directories
from qubes_itests.dom0.programs import QREXEC_SOCKETS, Programs
from qubes_itests.exc import DeadlineError, HarnessError
from qubes_itests.guest.image.layer.root_files import services_of
from qubes_itests.host.cache import Cache
from qubes_itests.qmemman.timeline import TIMELINE, Recorder
from qubes_itests.untrusted_text import quoted
from qubes_storage.ficlone import clone_or_copy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

    from qubes_itests.guest.image.template import Template
    from qubes_itests.guest.start.warm import WarmStarts
    from qubes_itests.hypervisor.contract import Hypervisor
    from qubes_itests.portal import Portal
    from qubes_itests.qmemman.budget import MemoryBudget

__all__ = ["in_time", "open_dom0", "start_net_vm"]

T = TypeVar("T")

_STORE: Final = VAR_LIB_QUBES / "qubes.xml"
#: Among the directories of runs, for what is of dom0.
_DOM0: Final = "dom0"
_QMEMMAN: Final = QREXEC_SOCKETS / "qmemman.sock"
_NET_VM: Final = "sys-net"
#: Seconds for what the core is asked to do outside of a test.
_TIMEOUT: Final = 180.0
#: Of one that does not, so many are shown.
_FRAMES: Final = 6


@contextlib.contextmanager
def open_dom0(
    portal: Portal,
    hypervisor: Hypervisor,
    templates: Mapping[str, Template],
    checkout: Path,
    policy: Mapping[str, Path],
    *,
    directory: Path,
    storage: Path,
    warm: WarmStarts | None,
    budget: MemoryBudget,
    balanced: bool,
) -> Iterator[Machine]:
    """Have all that a core needs in this sandbox, with a store that has templates.

    :param templates: by name; the first becomes the default one.
    :param checkout: of core-admin, whose modules can be imported.
    :param policy: more files of policy, as for `dom0_directories`.
    :param directory: an existing one, of the run, with a short path.
    :param storage: an empty one, on a filesystem with reflinks: what is in
        /var/lib/qubes.
    :param budget: the memory that dom0 and VMs share.
    :param balanced: whether VMs take part in balancing if nothing else is set.
    """
    machine = Machine(
        portal, hypervisor, directory, templates, budget=budget, warm=warm
    )
    programs = Programs(machine)
    # with the policy of this boot, which core-qrexec looks for
    (QREXEC_SOCKETS / "policy.d").mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(dom0_directories(storage, checkout, policy))
        stack.callback(machine.mapper.close)
        # the cache stays where it is: by itself it is at home
        places = {"HOME": HOME, "QUBES_ITESTS_CACHE": Cache().root}
        variables = programs.variables() | {n: os.fspath(p) for n, p in places.items()}
        stack.enter_context(mock.patch.dict(os.environ, variables))
        portal.run(programs.__aenter__())
        stack.callback(lambda: portal.run(programs.__aexit__()))
        qmemman = _qmemman(machine)
        portal.run(qmemman.__aenter__())
        stack.callback(lambda: portal.run(qmemman.__aexit__(None, None, None)))
        modules.use(machine)
        stack.callback(modules.use, None)
        stack.callback(lambda: portal.run(machine.close()))
        # they log to a syslog, if nothing else is set
        tests: Any = importlib.import_module("qubes.tests")
        tests.ha_syslog = logging.NullHandler()
        _make_store(templates, balanced=balanced)
        yield machine


@contextlib.asynccontextmanager
async def _qmemman(machine: Machine) -> AsyncIterator[None]:
    """Have the qmemman of the core balance the memory of a machine."""
    place = machine.directory / _DOM0
    place.mkdir()
    recorder = Recorder(place / TIMELINE, asyncio.get_running_loop().time)
    with contextlib.closing(recorder):
        machine.xen.begin()
        daemon = CoreQmemman(machine.xen, place, _QMEMMAN, recorder)
        async with machine.memory, daemon:
            yield


def _make_store(templates: Mapping[str, Template], *, balanced: bool) -> None:
    """Make the core's store, with the default pools and a TemplateVM for each template.

    By the core itself, as its own installation does it.

    :raise HarnessError: it raised something, or did not come to an end.
    """
    core: Any = importlib.import_module("qubes")
    for name, template in templates.items():
        kernel = VAR_LIB_QUBES / "vm-kernels" / name
        kernel.mkdir(parents=True)
        (kernel / "vmlinuz").symlink_to(template.kernel)
        (kernel / "initramfs").symlink_to(template.initramfs)
        # in place of the core's own, which are for Xen
        options = f"{template.kernel_options} " if template.kernel_options else ""
        (kernel / "default-kernelopts-common.txt").write_text(options)
        (kernel / "default-kernelopts-nopci.txt").write_text("")
    for name in ("appvms", "vm-templates", "backup"):
        (VAR_LIB_QUBES / name).mkdir()

    async def fill() -> None:
        first = next(iter(templates))
        app = core.Qubes.create_empty_store(
            os.fspath(_STORE),
            default_kernel=first,
        )
        await app.setup_pools()
        for name, template in templates.items():
            vm = app.add_new_vm("TemplateVM", name=name, label="black", kernel=name)
            await vm.create_on_disk()
            size = template.root_image.stat().st_size
            target = await vm.storage.import_data("root", size)
            await asyncio.to_thread(_copy, template.root_image, Path(target))
            await vm.storage.import_data_end("root", success=True)
            vm.features["qrexec"] = "1"
            vm.features["os"] = "Linux"
            # as if it had told of them by itself after its installation
            for service in await asyncio.to_thread(services_of, template.root_image):
                vm.features[f"supported-rpc.{service}"] = "1"
            if not balanced:
                # as in our own core: a guest that is to be saved would have to give up
                # nine tenths of 4000 MiB first
                vm.maxmem = 0
        app.default_template = first
        net = app.add_new_vm(
            "AppVM", name=_NET_VM, label="red", template=first, provides_network=True
        )
        await net.create_on_disk()
        net.netvm = None
        app.default_netvm = net
        app.save()
        app.close()

    in_time("make its store", lambda: asyncio.run(fill()))


def start_net_vm() -> None:
    """Have a net VM run, as tests with VMs take for granted; it stays. Blocking.

    :raise HarnessError: the core cannot start it.
    """
    running = modules.machine().find(_NET_VM)
    if running is not None and running.is_active:
        return
    core: Any = importlib.import_module("qubes")

    async def start() -> None:
        app = core.Qubes(os.fspath(_STORE))
        try:
            await app.domains[_NET_VM].start(start_guid=False)
        finally:
            app.close()

    in_time(f"start {_NET_VM}", lambda: asyncio.run(start()))


def in_time(what: str, doing: Callable[[], T], timeout: float = _TIMEOUT) -> T:
    """Run code of the core that no deadline of a test is for, in a thread of its own.

    :param what: a phrase that follows "the core cannot".
    :param timeout: seconds.
    :return: what it returns.
    :raise HarnessError: it raised something; with the traceback.
    :raise DeadlineError: it did not come to an end; with where its threads were.
    """
    outcome: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            outcome.set_result(doing())
        except BaseException:  # noqa: BLE001 - it may raise what it likes
            said = quoted(traceback.format_exc())
            reason = f"the core cannot {what}:\n{said}"
            outcome.set_exception(HarnessError(reason))

    known = set(sys._current_frames())  # noqa: SLF001 - there is no other way
    # one that hangs does not keep the process from ending
    threading.Thread(target=run, name="core", daemon=True).start()
    if not concurrent.futures.wait([outcome], timeout).done:
        # its own, and those that it has started
        frames = sys._current_frames().items()  # noqa: SLF001
        stacks = [traceback.format_stack(f) for n, f in frames if n not in known]
        where = "".join(line for stack in stacks for line in stack[-_FRAMES:])
        asked = f"answer of the core, asked to {what},"
        raise DeadlineError(asked, timeout, where)
    return outcome.result()


def _copy(image: Path, root: Path) -> None:
    """Share the data of an image: by its extents a warm start knows them."""
    with image.open("rb") as source, root.open("r+b") as target:
        clone_or_copy(source.fileno(), target.fileno())
