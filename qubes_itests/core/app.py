"""The app: its VMs, pools, kernels and policy."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, overload

from qubes_itests.core import config
from qubes_itests.core.device.block import BlockDeviceExtension
from qubes_itests.core.domains import VMCollection
from qubes_itests.core.events import handler
from qubes_itests.core.exc import (
    QubesException,
    QubesNoTemplateError,
    QubesPoolNotFoundError,
    QubesValueError,
    QubesVMNotStartedError,
)
from qubes_itests.core.ext import Extensions
from qubes_itests.core.host import QubesHost, VMMConnection
from qubes_itests.core.labels import LABELS, Label, find_label
from qubes_itests.core.policy import Policy
from qubes_itests.core.pools import Pools
from qubes_itests.core.properties import Property, PropertyHolder, VMProperty
from qubes_itests.core.store.file import StoreFile
from qubes_itests.core.store.journal import Journal
from qubes_itests.core.store.opening import load_store, open_store
from qubes_itests.core.store.saving import state_of, write_state
from qubes_itests.core.vm.adminvm import AdminVM
from qubes_itests.core.vm.appvm import AppVM
from qubes_itests.core.vm.autostart import start_autostart
from qubes_itests.core.vm.base import BaseVM
from qubes_itests.core.vm.cloning import clone_vm
from qubes_itests.core.vm.dependent import Dependents
from qubes_itests.core.vm.dispvm import DispVM
from qubes_itests.core.vm.features_request import CoreFeatures, request_features
from qubes_itests.core.vm.making import making
from qubes_itests.core.vm.qubesvm import QubesVM
from qubes_itests.core.vm.remotevm import RemoteVM
from qubes_itests.core.vm.rules import Rules
from qubes_itests.core.vm.settings import (
    check_for_dispvms,
    check_provides_network,
    kernel_name,
    positive,
)
from qubes_itests.core.vm.standalonevm import StandaloneVM
from qubes_itests.core.vm.templatevm import TemplateVM

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping

    from qubes_itests.core.qrexec import HostService
    from qubes_itests.core.vm.start_memory import MemorySource
    from qubes_itests.guest.image.template import Template
    from qubes_itests.guest.start.warm import WarmStarts
    from qubes_itests.hypervisor.contract import Hypervisor
    from qubes_storage.pool import Pool

__all__ = ["VM_CLASSES", "Qubes"]

log = logging.getLogger("qubes.app")

_VM = TypeVar("_VM", bound=QubesVM | RemoteVM)

#: The classes of VMs, by name.
VM_CLASSES: Mapping[str, type[QubesVM | RemoteVM]] = {
    "TemplateVM": TemplateVM,
    "AppVM": AppVM,
    "StandaloneVM": StandaloneVM,
    "DispVM": DispVM,
    "RemoteVM": RemoteVM,
}

#: Properties of the app that are a default of VMs, and what these call them.
_DEFAULTS: Mapping[str, str] = {
    "default_audiovm": "audiovm",
    "default_dispvm": "default_dispvm",
    "default_guivm": "guivm",
    "default_kernel": "kernel",
    "default_qrexec_timeout": "qrexec_timeout",
    "default_shutdown_timeout": "shutdown_timeout",
    "management_dispvm": "management_dispvm",
}


def _vm_property(
    name: str,
    doc: str,
    check: Callable[[object, BaseVM], None] | None = None,
    default: str | None = None,
) -> VMProperty[Any]:
    return VMProperty(
        name,
        check=check,
        load_stage=3,
        default=lambda app: default and app.domains[default],
        doc=doc,
    )


def _timeout(name: Literal["qrexec_timeout", "shutdown_timeout"]) -> Property[int]:
    return Property(
        f"default_{name}",
        type=int,
        setter=positive,
        load_stage=3,
        default=config.defaults[name],
        doc=f"The {name} of VMs that set none, seconds.",
    )


def _pool(app: Qubes, _prop: object, value: Pool | str | None) -> Pool | None:
    if value in (None, ""):
        return None
    try:
        return app.get_pool(value)
    except QubesPoolNotFoundError as error:
        # as a refusal, as of any other value that the property does not take
        raise ValueError(str(error)) from None


def _default_pool(kind: str) -> Property[Pool | None]:
    return Property(
        f"default_pool_{kind}",
        allow_none=True,
        setter=_pool,
        load_stage=3,
        default=lambda app: app.default_pool,
        doc=f"The pool of {kind} volumes that name none.",
    )


class Qubes(PropertyHolder):
    """A Qubes system: the VMs, and all that they share.

    :param store: the file that `save` writes and `load` reads; None to keep nothing.
    :param load: whether to load it at once, which blocks; False for a new one.
    :param offline_mode: whether to do without a hypervisor: then no VM can start.
    :param lock: whether to keep other writers out, when it is loaded.
    :param hypervisor: runs the VMs; None for offline mode. The app of a test has that
        of its run.
    :param directory: an existing directory for what the VMs leave: consoles, sockets;
        by default that of the store, or the current one.
    :param kernels: what VMs may boot, by name.
    :param warm_starts: saved states to start from, None to start cold.
    :param properties: of the app.
    :raise StoreError: says what is wrong with the store, and where.
    :raise QubesValueError: without a hypervisor, where there is to be one.
    """

    #: The pools, by name.
    pools: Pools
    #: The labels, by index.
    labels: Mapping[int, Label] = LABELS

    default_template: VMProperty[TemplateVM | None] = VMProperty(
        "default_template",
        klass=TemplateVM,
        load_stage=3,
        default=None,
        doc="The template of AppVMs that name none.",
    )
    default_dispvm: VMProperty[AppVM | None] = _vm_property(
        "default_dispvm",
        "The template for disposable VMs of VMs that set none.",
        check=check_for_dispvms,
    )
    default_netvm: VMProperty[QubesVM | None] = _vm_property(
        "default_netvm",
        "The net VM of VMs that set none.",
        check=check_provides_network,
    )
    default_fw_netvm: VMProperty[QubesVM | None] = _vm_property(
        "default_fw_netvm",
        "The net VM of net VMs that set none.",
        check=check_provides_network,
    )
    default_guivm: VMProperty[BaseVM | None] = _vm_property(
        "default_guivm",
        "The VM that shows the windows of VMs that set none.",
        default="dom0",
    )
    default_audiovm: VMProperty[BaseVM | None] = _vm_property(
        "default_audiovm",
        "The VM that plays the sounds of VMs that set none.",
        default="dom0",
    )
    management_dispvm: VMProperty[AppVM | None] = _vm_property(
        "management_dispvm",
        "The template of disposable VMs that manage others.",
        check=check_for_dispvms,
    )
    clockvm: VMProperty[BaseVM | None] = _vm_property(
        "clockvm", "The VM that has the time; not used here."
    )
    updatevm: VMProperty[BaseVM | None] = _vm_property(
        "updatevm", "The VM that fetches updates for templates; not used here."
    )
    check_updates_vm: Property[bool] = Property(
        "check_updates_vm",
        type=bool,
        load_stage=3,
        default=True,
        doc="Whether VMs look for updates; not used here.",
    )
    default_pool: Property[Pool | None] = Property(
        "default_pool",
        allow_none=True,
        setter=_pool,
        load_stage=3,
        default=lambda app: next(iter(app.pools.values()), None),
        doc="The pool of volumes that name none.",
    )
    default_pool_root: Property[Pool | None] = _default_pool("root")
    default_pool_private: Property[Pool | None] = _default_pool("private")
    default_pool_volatile: Property[Pool | None] = _default_pool("volatile")
    default_pool_kernel: Property[Pool | None] = _default_pool("kernel")
    default_kernel: Property[str | None] = Property(
        "default_kernel",
        allow_none=True,
        setter=kernel_name,
        load_stage=3,
        default=lambda app: next(iter(app.kernels), None),
        doc="Name of the kernel of VMs that set none.",
    )
    default_qrexec_timeout: Property[int] = _timeout("qrexec_timeout")
    default_shutdown_timeout: Property[int] = _timeout("shutdown_timeout")

    def __init__(
        self,
        store: str | os.PathLike[str] | None = None,
        load: bool = True,
        offline_mode: bool | None = None,
        lock: bool = False,
        *,
        hypervisor: Hypervisor | None = None,
        directory: Path | None = None,
        kernels: Mapping[str, Template] | None = None,
        warm_starts: WarmStarts | None = None,
        **properties: Any,
    ) -> None:
        super().__init__()
        #: For extensions, which log what concerns no VM by it.
        self.log = log
        self.store = None if store is None else StoreFile(store)
        #: What is being done to VMs, noted beside the store; None without one.
        self.journal = None if self.store is None else Journal(self.store.path)
        #: While true, what properties refer to may not be there yet.
        self.loading = True
        self.vmm = VMMConnection(hypervisor, offline_mode=offline_mode)
        if directory is None:
            directory = Path.cwd() if self.store is None else self.store.path.parent
        self.directory = directory
        self.kernels = dict(kernels or {})
        self.warm_starts = warm_starts
        #: The machine that the VMs are on.
        self.host = QubesHost()
        #: Asked for memory by each start; None where memory is not balanced.
        self.qmemman: MemorySource | None = None
        self.pools = Pools(self)
        self.policy = Policy(directory=directory / "policy.d")
        #: Services of dom0 that VMs may call, by name.
        self.host_services: dict[str, HostService] = {
            "qubes.FeaturesRequest": request_features
        }
        #: Errors in the background, which no caller got; empty if all is well.
        self.problems: list[str] = []
        #: What answers to the events of the app and its VMs, and to those of no other.
        self.extensions = Extensions(
            Qubes, BaseVM, (BlockDeviceExtension, CoreFeatures, Dependents, Rules)
        )
        self.share_handlers(self.extensions.handlers)
        self.domains = VMCollection(self)
        self.domains.add(AdminVM(self))
        for name, value in properties.items():
            self.property_get_def(name)
            setattr(self, name, value)
        self.loading = False
        if load and self.store is not None:
            self.load(lock=lock)
        self.events_enabled = True

    @property
    def app(self) -> Self:  # type: ignore[override]
        """The app itself: what has properties says whose it is."""
        return self

    def __str__(self) -> str:
        return "the app"

    @classmethod
    async def open(
        cls, store: str | os.PathLike[str], *, lock: bool = False, **options: Any
    ) -> Self:
        """Return an app with the state that another one has saved, its pools set up.

        :param store: the file.
        :param lock: whether to keep other writers out until `close`.
        :param options: the other parameters of the class.
        :raise StoreError: says what is wrong with the file, and where.
        """
        app = cls(store, load=False, **options)
        await open_store(app, lock=lock)
        return app

    @classmethod
    def create_empty_store(
        cls, store: str | os.PathLike[str], *args: Any, **options: Any
    ) -> Self:
        """Return a new app, with dom0 alone, that is saved.

        :param store: the file, which is not there yet.
        :param options: the other parameters of the class.
        :raise QubesException: when it is.
        """
        app = cls(store, False, *args, **options)
        if Path(store).exists():
            raise QubesException(f"there is a {store} already")
        app.save(lock=bool(options.get("lock")))
        return app

    def load(self, lock: bool = False) -> None:
        """Give a new app the state of its store; this blocks.

        Pools are set up neither here nor when it is made; `open` does that too.

        :param lock: whether to keep other writers out until `close`.
        :raise StoreError: says what is wrong with the file, and where; the app is of no
            use then.
        """
        load_store(self, lock=lock)

    @property
    def hypervisor(self) -> Hypervisor:
        """What runs the VMs; QubesException in offline mode."""
        return self.vmm.hypervisor

    @handler("property-pre-set:default_netvm")
    def on_default_netvm_pre_set(
        self, _event: str, newvalue: QubesVM | None, **_kwargs: Any
    ) -> None:
        """Refuse one that does not run, if VMs that run would have it."""
        for vm in self._by_default_netvm():
            vm.require_running(newvalue)

    @handler("property-set:default_netvm", "property-reset:default_netvm")
    def on_default_netvm_set(
        self, _event: str, oldvalue: BaseVM | None = None, **_kwargs: Any
    ) -> None:
        """Tell the VMs whose net VM this changes."""
        for vm in self._by_default_netvm():
            vm.fire_event("property-reset:netvm", name="netvm", oldvalue=oldvalue)

    @handler(
        *(f"property-set:{name}" for name in _DEFAULTS),
        *(f"property-reset:{name}" for name in _DEFAULTS),
    )
    def on_default_set(self, _event: str, name: str, **_kwargs: Any) -> None:
        """Tell the VMs whose property this changes; they tell those based on them."""
        of_vms = _DEFAULTS[name]
        for vm in self.domains.startable():
            based = of_vms != name and vm.template_or_none is not None
            if not based and vm.property_is_default(of_vms):
                vm.fire_event(f"property-reset:{of_vms}", name=of_vms)

    def _by_default_netvm(self) -> list[QubesVM]:
        return [
            vm
            for vm in self.domains.startable()
            if not vm.provides_network and vm.property_is_default("netvm")
        ]

    get_label = staticmethod(find_label)

    @overload
    @staticmethod
    def get_vm_class(name: type[_VM]) -> type[_VM]: ...
    @overload
    @staticmethod
    def get_vm_class(name: str) -> type[Any]: ...
    @staticmethod
    def get_vm_class(name: str | type[_VM]) -> type[Any]:
        """Return the VM class of that name; QubesValueError if there is none."""
        if isinstance(name, type):
            return name
        if name not in VM_CLASSES:
            raise QubesValueError(
                f"there is no VM class {name!r}: there are {', '.join(VM_CLASSES)}"
            )
        return VM_CLASSES[name]

    @overload
    def add_new_vm(
        self, cls: type[_VM], qid: int | None = None, **properties: Any
    ) -> _VM: ...
    @overload
    def add_new_vm(
        self, cls: str, qid: int | None = None, **properties: Any
    ) -> Any: ...
    def add_new_vm(
        self, cls: str | type[_VM], qid: int | None = None, **properties: Any
    ) -> _VM:
        """Make a VM and add it; nothing is made on disk, as `create_vm` does.

        :param cls: the class, or its name.
        :param qid: its number; by default the lowest that is free.
        :param properties: `name`, `label`, `template` … and any other property.
            Without a `template` an AppVM has the `default_template`, a DispVM the
            `default_dispvm`.
        :return: the VM.
        :raise QubesValueError: for an invalid name.
        :raise QubesVMAlreadyExistsError: for one that is taken.
        :raise QubesNoTemplateError: without a template, where one is needed.
        """
        vm_class = self.get_vm_class(cls)
        if issubclass(vm_class, AppVM):
            properties.setdefault("template", self.default_template)
        elif issubclass(vm_class, DispVM):
            if properties.get("template") is None:
                properties["template"] = self.dispvm_template()
        elif properties.get("template", "") is None:
            del properties["template"]
        qid = self.domains.get_new_unused_qid() if qid is None else qid
        vm = vm_class(self, qid=qid, **properties)
        # before its volumes take the place of those of the VM that is there
        self.domains.check_free(vm)
        try:
            if isinstance(vm, QubesVM):
                vm.storage.is_made = False
                vm.init_storage()
            return self.domains.add(vm)
        except BaseException:
            if isinstance(vm, QubesVM):
                vm.storage.unbind()
            raise

    @overload
    async def create_vm(self, cls: type[_VM], **options: Any) -> _VM: ...
    @overload
    async def create_vm(self, cls: str, **options: Any) -> Any: ...
    async def create_vm(
        self,
        cls: str | type[_VM],
        *,
        pool: str | None = None,
        pools: Mapping[str, str] | None = None,
        adopt: bool = False,
        tags: Iterable[str] = (),
        **properties: Any,
    ) -> _VM:
        """Make a VM with its volumes, and save the app: all of that, or nothing.

        :param cls: the class, or its name.
        :param pool: as for `create_on_disk` of the VM, as are `pools` and `adopt`.
        :param tags: of the VM.
        :param properties: as for `add_new_vm`.
        :return: the VM.
        :raise QubesValueError: for an invalid name.
        :raise QubesVMAlreadyExistsError: for one that is taken.
        :raise VolumeExistsError: when one of its volumes is there already.
        """
        vm: _VM = self.add_new_vm(cls, **properties)
        async with making(vm):
            vm.tags.update(tags)
            await vm.create_on_disk(pool=pool, pools=pools, adopt=adopt)
        return vm

    def dispvm_template(self, caller: BaseVM | None = None) -> AppVM:
        """Return what a DispVM is made from that is asked for without a template.

        :param caller: the VM that asks; its `default_dispvm` counts, if it has one.
        :raise QubesNoTemplateError: when that is None.
        """
        # found among the VMs first: what stands for one counts as it
        vm = None if caller is None else self.domains[caller]
        holder = vm if isinstance(vm, QubesVM) else self
        found = holder.default_dispvm
        if found is None:
            raise QubesNoTemplateError(
                caller,
                "a DispVM was asked for without a template, and default_dispvm of"
                f" {holder} is None: set that, or name a template",
            )
        return found

    async def clone_vm(self, source: QubesVM, name: str, **options: Any) -> QubesVM:
        """Make a copy of a halted VM; see `qubes_itests.core.vm.cloning.clone_vm`."""
        return await clone_vm(self, source, name, **options)

    def get_pool(self, pool: Pool | str) -> Pool:
        """Return a storage pool by itself or its name; see `Pools.find`."""
        return self.pools.find(pool)

    async def add_pool(
        self, name: Pool | str | None = None, *, driver: str = "", **options: Any
    ) -> Pool:
        """Set up a storage pool, add it under its name, and return it; see `Pools`."""
        return await self.pools.add(name, driver=driver, **options)

    async def remove_pool(self, name: str) -> None:
        """Forget a storage pool; what is in it stays; see `Pools.remove`."""
        await self.pools.remove(name)

    async def find_orphans(self, pool: Pool) -> list[str]:
        """Return the ids of the volumes in a pool that no VM has; see `Pools`."""
        return await self.pools.find_orphans(pool)

    async def remove_orphan(self, pool: Pool, vid: str) -> None:
        """Remove a volume that no VM has, with its revisions; see `Pools`."""
        await self.pools.remove_orphan(pool, vid)

    async def start_autostart(self) -> dict[str, Exception]:
        """Start the VMs that start with the system; return why some did not."""
        return await start_autostart(self)

    def save(self, lock: bool = True) -> None:
        """Write the state to the store, all of it or nothing, and fire ``app-saved``.

        Without a store the event is fired all the same.

        :param lock: whether to keep other writers out from now on, until `close`.
        :raise StoreError: when another writer has changed the store, or keeps it.
        """
        if (write := self._prepare_save(lock=lock)) is not None:
            write()
        self.fire_event("app-saved")

    async def save_async(self, *, lock: bool = True) -> None:
        """Save, without keeping the event loop waiting for the disk; see `save`."""
        if (write := self._prepare_save(lock=lock)) is not None:
            await asyncio.to_thread(write)
        self.fire_event("app-saved")

    def _prepare_save(self, *, lock: bool) -> Callable[[], None] | None:
        """Return what writes the state of now, in any thread; None without a store."""
        if self.store is None or self.journal is None:
            return None
        store, journal = self.store, self.journal
        # State, version and notes are of one moment: what is settled while a thread
        # writes is not in this state, and its note has to stay until the next.
        state, version, settled = (
            state_of(self),
            store.next_version(),
            journal.settled(),
        )

        def write() -> None:
            write_state(store, state, version, lock=lock)
            journal.drop(settled)

        return write

    async def kill_all(self) -> None:
        """Kill the VMs that run and wait until the ends of their runs are dealt with.

        All at once, as when a machine is switched off.  One that cannot be killed is
        noted in `problems`; the others are killed still.
        """
        await asyncio.gather(*map(self._kill, self.domains.startable()))

    async def _kill(self, vm: QubesVM) -> None:
        try:
            if vm.is_starting() or not vm.is_halted():
                await vm.kill()
        except QubesVMNotStartedError:
            pass  # it ended by itself
        except Exception as error:  # noqa: BLE001 - others have to be killed, too
            log.error("VM %s could not be killed: %s", vm.name, str(error))  # noqa: TRY400
            self.problems.append(f"VM {vm} could not be killed: {error}")
        # Its storage is stopped after its domain has ended, and the pool may be removed
        # as soon as this returns. What that fails with is among the problems already.
        with contextlib.suppress(Exception):
            await vm.wait_ended(vm.shutdown_timeout)

    def close(self) -> None:
        """Have extensions forget the app, whose VMs do not run any more.

        The store and the pools are left to other writers.
        """
        try:
            self.fire_event("qubes-close")
        except Exception as error:  # noqa: BLE001 - an extension's; the caller is told
            self.problems.append(f"an extension did not let the app go: {error!r}")
        self.extensions.close()
        # The pools before the store: who gets the store claims its pools next.
        for pool in self.pools.values():
            pool.unclaim()
        if self.store is not None:
            self.store.release()
