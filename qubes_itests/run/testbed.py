"""The testbed, which all tests of a run share, and the apps on it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import shutil
import tempfile
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from qubes_itests.admin.server import AdminServer
from qubes_itests.admin.vm_calls import offer_to_vms
from qubes_itests.balancing.app_memory import AppMemory, counts, machine
from qubes_itests.balloons import LibvirtMemory
from qubes_itests.core.app import Qubes
from qubes_itests.core.policy.files import fill
from qubes_itests.core.store.journal import recover
from qubes_itests.core.store.opening import open_copy
from qubes_itests.core.vm.templatevm import TemplateVM
from qubes_itests.core.volume_content import copy_image
from qubes_itests.exc import HarnessError
from qubes_itests.guest.start.ahead import ClonesAhead
from qubes_itests.guest.start.warm import WarmStarts
from qubes_itests.host.contents import data_digest
from qubes_itests.host.kernel import find_kernel
from qubes_itests.hypervisor.contract import LifecycleEvent
from qubes_itests.program import typed
from qubes_itests.run.client_tools import write_tools
from qubes_itests.run.hooks import offer, offers
from qubes_storage.image_pool import ImagePool
from qubes_storage.reflink import ReflinkPool

if TYPE_CHECKING:
    from collections.abc import (
        Callable,
        Coroutine,
        Iterable,
        Iterator,
        Mapping,
        Sequence,
    )

    import pluggy

    from qubes_itests.core.policy.files import PolicyFile
    from qubes_itests.dom0.machine import Machine
    from qubes_itests.guest.image.template import Template
    from qubes_itests.guest.link.journal import GuestJournal
    from qubes_itests.host.cache import Cache
    from qubes_itests.hypervisor.contract import Domain, Hypervisor
    from qubes_itests.portal import Portal
    from qubes_itests.qmemman.budget import MemoryBudget
    from qubes_itests.run.settings import Settings

__all__ = ["Testbed", "current", "open_testbed"]

log = logging.getLogger("qubes_itests.run.testbed")

T = TypeVar("T")

#: Where Qubes OS has the Admin API; /run is the sandbox's own.
ADMIN_SOCKET: Final = Path("/run/qubesd.sock")
#: As Qubes OS calls it where its own filesystem has reflinks.
POOL_NAME: Final = "varlibqubes"
#: Bytes of the filesystem with the VMs' disks; its image is sparse.
_POOL_SIZE: Final = 64 << 30
_ENDS: Final = (LifecycleEvent.STOPPED, LifecycleEvent.CRASHED)


_current: list[Testbed] = []


def current() -> Testbed:
    """Return the testbed of this run; HarnessError outside of a run."""
    if not _current:
        raise HarnessError(
            f"no testbed: run this test with `{typed()}`, or with"
            " `pytest -p qubes_itests` and the fixture `testbed`"
        )
    return _current[-1]


@dataclass(frozen=True, slots=True)
class Parts:
    """What a testbed is put together from.

    :param run_directory: an existing directory that goes with the run.
    :param pool_directory: a directory on a filesystem with reflinks.
    :param cache: what lasts between runs.
    :param open_hypervisor: connects to the hypervisor; awaited on the loop.
    :param templates: functions that build the templates, by name.
    :param warm: start VMs from saved states where the hypervisor can.
    :param clones_ahead: how many guests may be ready for the next starts.
    :param memory: the machine that the VMs of each app share; None for no limit.
    :param host_memory: MiB of the real one that all VMs may take; None for as many as
        it has room for.
    :param start_timeout: seconds that the start of a VM may take; None for what the
        back end and the load of this machine make reasonable.
    :param run_templates: names of those that tests run on; by default the first.
    :param policy: files of qrexec policy that each app begins with, beside the default.
    """

    run_directory: Path
    pool_directory: Path
    cache: Cache
    open_hypervisor: Callable[[], Coroutine[Any, Any, Hypervisor]]
    templates: Mapping[str, Callable[[], Template]]
    warm: bool = True
    clones_ahead: int = 0
    memory: MemoryBudget | None = None
    host_memory: int | None = None
    start_timeout: int | None = None
    run_templates: tuple[str, ...] = ()
    policy: tuple[PolicyFile, ...] = ()


@dataclass(frozen=True, slots=True)
class Panic:
    """The end of a VM whose kernel panicked.

    :param vm: its name.
    :param console: the log of what it has printed.
    """

    vm: str
    console: Path


class Testbed:
    """One hypervisor, one reflinking filesystem, the templates: for any number of apps.

    A context manager; leaving it ends all VMs.

    :param portal: the event loop's thread.
    :param parts: what it is put together from.
    """

    __test__ = False  # pytest: not a class of tests

    def __init__(self, portal: Portal, parts: Parts) -> None:
        self.portal = portal
        self.parts = parts
        self._numbers = itertools.count(1)
        self._templates: dict[str, Template] = {}
        self._apps: list[Qubes] = []
        #: Who serves the Admin API of an app.
        self._servers: dict[Qubes, AdminServer] = {}
        #: What undoes the balancing of an app's memory.
        self._balancing: dict[Qubes, AsyncExitStack] = {}
        self._exit = ExitStack()
        self.hypervisor: Hypervisor
        #: VMs whose kernels have panicked, in order.
        self.panics: list[Panic] = []
        #: What a core under test works on; None for our own core.
        self.machine: Machine | None = None
        self.warm_starts: WarmStarts | None = None

    @property
    def template_names(self) -> tuple[str, ...]:
        """Names of the templates that VMs may have."""
        return tuple(self.parts.templates)

    @property
    def run_templates(self) -> tuple[str, ...]:
        """Names of the templates that tests run on, the default one first."""
        return self.parts.run_templates or self.template_names[:1]

    @property
    def apps(self) -> tuple[Qubes, ...]:
        """The apps that are open, in the order in which they were made."""
        return tuple(self._apps)

    def __enter__(self) -> Self:
        # What a step has made goes when a later one fails.
        with self._exit:
            self.hypervisor = self.portal.run(self.parts.open_hypervisor())
            self.hypervisor.memory_limit = self.parts.host_memory
            # Callbacks are called in reverse: the connection is closed last, as the
            # events of the VMs' ends come over it.
            self._exit.callback(lambda: self.portal.run(self.hypervisor.close()))
            self._exit.callback(self.hypervisor.subscribe(self._note_panic))
            if self.parts.warm:
                ahead = self._start_ahead() if self.parts.clones_ahead else None
                self.warm_starts = WarmStarts(self.parts.cache, self.hypervisor, ahead)
            _current.append(self)
            self._exit.callback(_current.remove, self)
            self._exit = self._exit.pop_all()
        return self

    def _start_ahead(self) -> ClonesAhead:
        """Begin to keep clones ready for starts, until the testbed is left."""
        sockets = self.parts.run_directory / "ahead"
        disks = self.parts.pool_directory / "ahead"
        # A server that was killed, or has ended, has left some next to its VMs.
        shutil.rmtree(disks, ignore_errors=True)
        for place in (sockets, disks):
            place.mkdir()
        most = self.parts.clones_ahead
        ahead = ClonesAhead(self.hypervisor, most, sockets, disks)
        loop = self.portal.loop
        task = self.portal.call(lambda: loop.in_background(ahead.run()))

        async def end() -> None:
            task.cancel()
            await asyncio.wait([task])

        self._exit.callback(lambda: self.portal.run(end()))
        return ahead

    def __exit__(self, *_exc: object) -> None:
        with self._exit:
            for app in list(self._apps):
                self.portal.run(self.close_app(app))

    def _note_panic(self, domain: Domain, event: LifecycleEvent) -> None:
        name = domain.spec.name
        is_vm = any(name in app.domains for app in self._apps)
        is_vm |= self.machine is not None and self.machine.find(name) is not None
        # One that is killed at that very moment is stopped, and panicked all the same.
        if event in _ENDS and domain.panicked and is_vm:
            self.panics.append(Panic(name, domain.console_log()))

    def journals(self) -> list[GuestJournal]:
        """Return the logs of all guests that run and are not paused."""
        vms = [vm for app in self._apps for vm in app.domains.startable()]
        running = (vm for vm in vms if vm.is_running() and not vm.is_paused())
        found = [vm.life.journal for vm in running if vm.life.journal is not None]
        return found if self.machine is None else [*found, *self.machine.journals()]

    def template(self, name: str) -> Template:
        """Return a template, built on first use; blocking.

        :raise HarnessError: when there is none of that name, or it does not build.
        """
        if name not in self._templates:
            if name not in self.parts.templates:
                raise HarnessError(
                    f"there is no template {name!r}: there are"
                    f" {', '.join(self.parts.templates)}"
                )
            template = self.parts.templates[name]()
            # On the pools' filesystem apps can reflink it: the cache may be on another.
            image = self.parts.pool_directory / "images" / f"{template.name}.img"
            image.parent.mkdir(exist_ok=True)
            image.touch()
            copy_image(template.root_image, image)
            if self.warm_starts is not None:
                self.warm_starts.add_root(image, data_digest(template.root_image))
            self._templates[name] = dataclasses.replace(template, root_image=image)
        return self._templates[name]

    async def make_app(self, *templates: str) -> Qubes:
        """Make an app with TemplateVMs of these names.

        Its pool is empty but for the templates, whose root volumes are reflinks of the
        images, so that what a test does to a template stays with that test.

        :param templates: names; the first becomes `default_template`.
        """
        number = next(self._numbers)
        app = Qubes(**await self._shared(number, templates))
        # At once: whatever fails below, the app is closed with the testbed.
        self._apps.append(app)
        offer_to_vms(app)
        await self._fill(app, self.parts.pool_directory / str(number))
        await self._set_limits(app)
        return app

    async def open_app(self, store: Path, *templates: str) -> Qubes:
        """Return the app of a store; a new store begins as that of `make_app` does.

        What it has on disk stays there when it is closed.

        :param store: the file.
        :param templates: as for `make_app`; an app that is loaded has its own.
        :raise StoreError: when the store cannot be loaded, or another writer has it.
        """
        shared = await self._shared(next(self._numbers), templates)
        if await asyncio.to_thread(store.exists):
            app = await Qubes.open(store, lock=True, **shared)
            self._apps.append(app)
        else:
            app = Qubes(store, load=False, **shared)
            self._apps.append(app)
            await self._fill(app, self.parts.pool_directory / POOL_NAME)
            await app.save_async()
        await self._set_limits(app)
        return app

    async def copy_app(
        self,
        document: bytes,
        source: Path,
        kernels: Mapping[str, Template],
        policy: Iterable[str],
    ) -> Qubes:
        """Return an app as another one was, whose volumes have no images yet.

        dom0 offers nothing to its VMs, whoever they are from.

        :param document: its state, as in a store.
        :param source: where that is from, for errors.
        :param kernels: what its VMs boot.
        :param policy: all its rules.
        :raise StoreError: when the state cannot be loaded.
        :raise PolicyError: for a rule that is none.
        """
        number = str(next(self._numbers))
        directory = self.parts.run_directory / "apps" / number
        directory.mkdir(parents=True)
        app = Qubes(
            hypervisor=self.hypervisor,
            directory=directory,
            kernels=kernels,
            warm_starts=self.warm_starts,
        )
        self._apps.append(app)
        app.host_services.clear()
        for rule in policy:
            app.policy.add_rule(rule, first=False)
        pools = self.parts.pool_directory / number
        await open_copy(app, document, source, pools)
        if self.parts.start_timeout is not None:
            app.default_qrexec_timeout = self.parts.start_timeout
        return app

    async def _shared(self, number: int, templates: Sequence[str]) -> dict[str, Any]:
        """Return what an app shares with others, and its directory."""
        directory = self.parts.run_directory / "apps" / str(number)
        directory.mkdir(parents=True)
        await asyncio.to_thread(fill, directory, self.parts.policy)
        return {
            "hypervisor": self.hypervisor,
            "directory": directory,
            "kernels": {
                name: await asyncio.to_thread(self.template, name) for name in templates
            },
            "warm_starts": self.warm_starts,
        }

    async def _fill(self, app: Qubes, pool: Path) -> None:
        await app.add_pool(ReflinkPool(name=POOL_NAME, dir_path=pool))
        # An earlier process may have been ended while it added a template: its volumes
        # are undone now, before they are in the way of new ones.
        await recover(app)
        for name, template in app.kernels.items():
            await self._add_template(app, name, template)

    async def _set_limits(self, app: Qubes) -> None:
        if self.parts.start_timeout is not None:
            app.default_qrexec_timeout = self.parts.start_timeout
        if self.parts.memory is not None:
            await self.balance_memory(app, self.parts.memory)

    async def _add_template(self, app: Qubes, name: str, template: Template) -> None:
        size = template.root_image.stat().st_size
        vm = app.add_new_vm(
            TemplateVM,
            name=name,
            label="black",
            kernel=name,
            volume_config={"root": {"size": size}},
        )
        if template.init != "agent":
            vm.features["init"] = template.init
        # The volumes of a store that was lost may still be there.
        images = {"root": template.root_image}
        await vm.create_on_disk(images=images, adopt=app.store is not None)
        if app.default_template is None:
            app.default_template = vm

    async def serve(self, app: Qubes) -> None:
        """Serve the Admin API of an app where Qubes OS does, until it is closed.

        If the client of Qubes OS is installed, its tools are in the PATH from then on.

        :raise HarnessError: when that of another app is.
        """
        server = AdminServer(app, ADMIN_SOCKET)
        self._servers[app] = await server.__aenter__()
        tools = self.parts.run_directory / "tools"
        if not tools.exists():
            tools.mkdir()
            if await asyncio.to_thread(write_tools, tools, ADMIN_SOCKET):
                path = os.environ.get("PATH", os.defpath)
                os.environ["PATH"] = f"{tools}{os.pathsep}{path}"
                self._exit.callback(os.environ.__setitem__, "PATH", path)

    async def balance_memory(
        self, app: Qubes, budget: MemoryBudget
    ) -> AppMemory[LibvirtMemory]:
        """Have qmemman balance the memory of an app's VMs until the app is closed.

        What has balanced it so far ends.

        :param budget: the machine that they share, with its dom0.
        :raise HarnessError: when dom0 does not fit.
        """
        await self._end_balancing(app)
        async with AsyncExitStack() as stack:
            machine = await stack.enter_async_context(
                LibvirtMemory(self.hypervisor, budget, counts=counts(app))
            )
            balanced = await stack.enter_async_context(AppMemory(app, machine))
            app.host.budget = budget.total
            stack.callback(setattr, app.host, "budget", None)
            self._balancing[app] = stack.pop_all()
        return balanced

    async def _end_balancing(self, app: Qubes) -> None:
        if app in self._balancing:
            await self._balancing.pop(app).aclose()

    async def close_app(self, app: Qubes) -> list[str]:
        """End an app: kill its VMs, drop its pool unless it has a store.

        :return: what went wrong, one sentence each; empty if all is well.
        """
        # First, so that no client starts a VM that is killed below.
        if app in self._servers:
            await self._servers.pop(app).__aexit__()
        if app.store is None:
            _forget_removed_pools(app)
        await app.kill_all()
        app.close()
        # After the VMs: the end of each gives its memory back to the balancing.
        await self._end_balancing(app)
        # `_note_panic` tells by this list whose VM has panicked, until no VM runs.
        self._apps.remove(app)
        if app.store is None:
            # no VM's volumes are in the way of another's: what is shared has a lock
            await asyncio.gather(*(vm.storage.undo() for vm in app.domains.startable()))
        for pool in app.pools.values():
            await pool.destroy()
        left = [d.spec.name for d in self.hypervisor.domains()]
        app.problems += [
            f"domain {name} is left" for name in left if name in app.domains
        ]
        return app.problems


def _forget_removed_pools(app: Qubes) -> None:
    """Forget volumes in pools whose directory a test has removed: they are gone, too.

    Suites of Qubes OS do that by a clean-up, which comes before the end of the VMs.
    """
    for pool in app.pools.values():
        if isinstance(pool, ImagePool) and not pool.dir_path.is_dir():
            for vm in app.domains.startable():
                vm.storage.forget(pool)


@contextlib.contextmanager
def open_testbed(
    portal: Portal,
    cache: Cache,
    directory: Path,
    settings: Settings,
    plugins: pluggy.PluginManager,
    *,
    pool: Path | None = None,
    policy: tuple[PolicyFile, ...] = (),
) -> Iterator[Testbed]:
    """Make the pool's filesystem, connect to the hypervisor, open the testbed.

    :param directory: of the run; it has a short path.
    :param pool: a directory on a filesystem with reflinks; None to make one.
    :param policy: files of qrexec policy that apps begin with, beside the default.
    :raise EnvironmentNotReadyError: when the machine lacks something.
    """
    kernel = find_kernel(cache)
    templates = {
        name: functools.partial(build, cache, kernel)
        for name, build in offers(plugins, "templates").items()
    }
    connect = offer(plugins, "hypervisors", settings.hypervisor)
    # A new name: tests write beside it, under any names, and an earlier opening that
    # failed may have left files.
    directory = Path(tempfile.mkdtemp(dir=directory, prefix=""))
    own, vms = directory / "hv", directory / "vm"
    for place in (own, vms):
        place.mkdir()
    with _pool(plugins, settings, directory, pool) as mounted:
        parts = Parts(
            run_directory=vms,
            pool_directory=mounted,
            cache=cache,
            open_hypervisor=functools.partial(connect, own, cache, kernel),
            templates=templates,
            warm=settings.warm,
            clones_ahead=settings.clones_ahead,
            memory=machine(size) if (size := settings.memory_budget) else None,
            host_memory=settings.host_memory or None,
            start_timeout=settings.start_timeout or None,
            run_templates=settings.templates,
            policy=policy,
        )
        with Testbed(portal, parts) as testbed:
            yield testbed


def _pool(
    plugins: pluggy.PluginManager,
    settings: Settings,
    directory: Path,
    given: Path | None,
) -> contextlib.AbstractContextManager[Path]:
    if given is not None:
        return contextlib.nullcontext(given)
    make = offer(plugins, "filesystems", settings.filesystem)
    place = directory / "pool"
    place.mkdir()
    made: contextlib.AbstractContextManager[Path] = make(place, _POOL_SIZE)
    return made
