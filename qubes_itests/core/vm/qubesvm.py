"""A VM with a domain of its own: its settings, and what the hypervisor gets of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from qubes_itests.core import config
from qubes_itests.core.exc import (
    QubesNoTemplateError,
    QubesVMError,
    QubesVMInUseError,
    QubesVMNotHaltedError,
)
from qubes_itests.core.properties import Property, to_bool
from qubes_itests.core.storage import Storage, in_pool
from qubes_itests.core.vm.execution import ExecutionMixin
from qubes_itests.core.vm.power import PowerMixin
from qubes_itests.core.vm.wiring import WiringMixin
from qubes_itests.guest.identity import Identity
from qubes_itests.hypervisor.contract import DomainSpec
from qubes_itests.qmemman.client import memory_for_start

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from qubes_itests.core.app import Qubes
    from qubes_itests.core.vm.base import BaseVM
    from qubes_itests.guest.template import Template
    from qubes_storage.volume import Volume

__all__ = ["QubesVM", "domain_property"]

_MOST_MEMORY = 10


def _positive(vm: Any, prop: Any, value: Any) -> int:
    del vm, prop
    number = int(value)
    if number <= 0:
        raise ValueError("it takes a whole number above 0")
    return number


def _max_memory(vm: QubesVM, prop: Any, value: Any) -> int:
    del prop
    number = int(value)
    # memory may have been lowered since
    if number < 0 or (number > _MOST_MEMORY * vm.memory and not vm.app.loading):
        raise ValueError(
            f"it takes MiB from 0 (no balancing) to {_MOST_MEMORY} x memory,"
            f" here {_MOST_MEMORY * vm.memory}"
        )
    return number


def _virt_mode(vm: Any, prop: Any, value: Any) -> str:
    del vm, prop
    mode = str(value).lower()
    if mode not in ("pvh", "hvm"):
        raise ValueError("it takes pvh or hvm")
    return mode


def domain_property(vm: BaseVM, prop: Any, value: Any) -> BaseVM | None:
    """Setter of properties whose value is a VM: takes it, its name, or None."""
    del prop
    if value in (None, ""):
        return None
    found: BaseVM = vm.app.domains[value]
    return found


def _dispvm_template(vm: BaseVM, prop: Any, value: Any) -> BaseVM | None:
    found = domain_property(vm, prop, value)
    if found is not None and not getattr(found, "template_for_dispvms", False):
        raise ValueError(f"{found} has not template_for_dispvms set")
    return found


class QubesVM(PowerMixin, ExecutionMixin, WiringMixin):
    """A VM that can be started.

    :param app: the app that it belongs to.
    :param volume_config: changes to the settings of its volumes, by their names.
    :param properties: first values of its properties.
    """

    memory = Property[int](
        "memory",
        setter=_positive,
        default=config.defaults["memory"],
        doc="Memory at start, MiB.",
    )
    maxmem = Property[int](
        "maxmem",
        setter=_max_memory,
        default=config.defaults["maxmem"],
        doc="The most that balancing may give, MiB; 0 means no balancing.",
    )
    vcpus = Property[int](
        "vcpus", setter=_positive, default=config.defaults["vcpus"], doc="Virtual CPUs."
    )
    virt_mode = Property[str](
        "virt_mode",
        setter=_virt_mode,
        default=lambda vm: getattr(getattr(vm, "template", None), "virt_mode", "pvh"),
        doc="pvh or hvm.",
    )
    kernel = Property[str | None](
        "kernel",
        default=lambda vm: (
            vm.template.kernel
            if getattr(vm, "template", None)
            else vm.app.default_kernel
        ),
        doc="Name of one of the app's kernels.",
    )
    kernelopts = Property[str](
        "kernelopts", type=str, default="", doc="Added to the kernel's command line."
    )
    default_user = Property[str](
        "default_user", type=str, default="user", doc="Who runs commands."
    )
    default_dispvm = Property["BaseVM | None"](
        "default_dispvm",
        setter=_dispvm_template,
        load_stage=4,
        default=lambda vm: vm.app.default_dispvm,
        doc="What its disposable VMs are made from.",
    )
    qrexec_timeout = Property[int](
        "qrexec_timeout",
        setter=_positive,
        default=config.defaults["qrexec_timeout"],
        doc="How long the agent may take to answer after a start, seconds.",
    )
    shutdown_timeout = Property[int](
        "shutdown_timeout",
        setter=_positive,
        default=config.defaults["shutdown_timeout"],
        doc="How long a shutdown may take, seconds.",
    )
    template_for_dispvms = Property[bool](
        "template_for_dispvms",
        type=to_bool,
        default=False,
        doc="May be what disposable VMs are made from.",
    )
    autostart = Property[bool](
        "autostart", type=to_bool, default=False, doc="Start it with the system."
    )
    include_in_backups = Property[bool](
        "include_in_backups", type=to_bool, default=True, doc="Have it in backups."
    )
    debug = Property[bool]("debug", type=to_bool, default=False, doc="Debug mode.")

    #: The volumes of the class, by name; see `Storage.init_volumes`.
    volume_config: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init__(
        self,
        app: Qubes,
        *,
        volume_config: Mapping[str, Mapping[str, Any]] | None = None,
        **properties: Any,
    ) -> None:
        super().__init__(app, **properties)
        self.storage = Storage(self)
        self._volume_changes = dict(volume_config or {})

    def init_storage(self, pool: Any = None) -> None:
        """Bind the volumes, all but snapshots in `pool` if one is named."""
        self.storage.volumes.clear()
        for name, settings in self._volume_settings().items():
            config = {**settings, **self._volume_changes.get(name, {})}
            self.storage.init_volume(name, in_pool(config, pool))

    def _volume_settings(self) -> dict[str, dict[str, Any]]:
        return {name: dict(value) for name, value in self.volume_config.items()}

    @property
    def volumes(self) -> dict[str, Volume]:
        """Its volumes, by name."""
        return self.storage.volumes

    # what the life cycle asks

    def boot_files(self) -> Template:
        """Return kernel and initramfs; QubesVMError when the VM has none."""
        kernel = self.kernel
        if kernel is None:
            raise QubesVMError(
                self,
                f"VM {self} has virt_mode {self.virt_mode!r} and no kernel:"
                f" set its property kernel to one of {', '.join(self.app.kernels)}",
            )
        if kernel not in self.app.kernels:
            raise QubesVMError(
                self,
                f"VM {self} has kernel {kernel!r}, which the app does not have:"
                f" it has {', '.join(self.app.kernels) or 'none'}",
            )
        return self.app.kernels[kernel]

    def domain_spec(self, directory: Path, files: Template) -> DomainSpec:
        """Return what the hypervisor has to know."""
        return DomainSpec(
            name=self.name,
            uuid=self.uuid,
            directory=directory,
            memory=self.memory,
            max_memory=max(self.memory, self.maxmem),
            vcpus=self.vcpus,
            kernel=files.kernel,
            initramfs=files.initramfs,
            kernel_options=f"{files.kernel_options} {self.kernelopts}".strip(),
            disks=tuple(self.storage.disks()),
            balanced=self.maxmem > 0,
        )

    def start_memory(self) -> int:
        """Return what a start asks of qmemman, in bytes."""
        return memory_for_start(
            self.memory,
            vcpus=self.vcpus,
            maxmem=self.maxmem,
            virt_mode=self.virt_mode,
        )

    def identity(self) -> Identity:
        """Return what the guest has to know."""
        names = {n: self.storage.disk_name(n) for n in self.volumes}
        return Identity(
            name=self.name,
            root=names.get("root", ""),
            private=names.get("private"),
            volatile=names.get("volatile"),
            root_mode="rw" if self.volumes["root"].rw else "ro",
            default_user=self.default_user,
            db=self.qubesdb_entries(),
            services=tuple(
                name.removeprefix("service.")
                for name, value in self.features.items()
                if name.startswith("service.") and value
            ),
        )

    def qubesdb_entries(self) -> dict[str, str]:
        """Return what the guest finds in qubesdb when it starts."""
        template = getattr(self, "template", None)
        entries = {
            "/name": self.name,
            "/type": self.klass,
            "/default-user": self.default_user,
            "/qubes-vm-type": self.klass,
            "/qubes-vm-updateable": str(template is None),
            "/qubes-vm-persistence": "full" if template is None else "rw-only",
            "/qubes-debug-mode": str(int(self.debug)),
        }
        if template is not None:
            entries["/qubes-base-template"] = str(template)
        return entries | self.network_entries()

    # on disk

    async def create_on_disk(self, pool: Any = None, pools: Any = None) -> None:
        """Make the VM's volumes.

        :param pool: name of the pool for all of them but snapshots, which are where
            their sources are.
        :param pools: names of pools, by the names of volumes.
        """
        if pools:
            for name, of_volume in pools.items():
                self._volume_changes.setdefault(name, {})
                self._volume_changes[name] = {
                    **self._volume_changes[name],
                    "pool": of_volume,
                }
        if pool is not None or pools:
            self.init_storage(pool)
        await self.storage.create()
        await self.fire_event_async("domain-create-on-disk")

    async def remove_from_disk(self) -> None:
        """Remove the VM's volumes; QubesVMNotHaltedError when it runs."""
        if not self.is_halted():
            raise QubesVMNotHaltedError(self)
        await self.fire_event_async("domain-remove-from-disk")
        await self.storage.remove()

    async def clone_disk_files(self, src: QubesVM, pool: Any = None) -> None:
        """Make the VM's volumes as copies of another VM's, which must be halted.

        :param src: the VM to copy.
        :param pool: name of the pool for all of them but snapshots; by default each is
            in the pool of the one it is a copy of.
        """
        if not src.is_halted():
            raise QubesVMNotHaltedError(src)
        if not self.is_halted():
            raise QubesVMNotHaltedError(self)
        await self.storage.clone(src, pool)
        await self.fire_event_async("domain-clone-files", src=src)

    def check_unused(self) -> None:
        """Raise QubesVMInUseError, naming who, when others use this VM."""
        users = [
            f"{holder} ({name})"
            for holder in (*self.app.domains, self.app)
            for name in holder.property_uses(self)
            if holder is not self
        ]
        if users:
            raise QubesVMInUseError(
                self, f"VM {self} is used by {', '.join(users)}; change these first"
            )


def set_template(vm: QubesVM, prop: Any, value: Any) -> QubesVM:
    """Setter of `template`: a template VM or its name, while `vm` is halted."""
    found = domain_property(vm, prop, value)
    if found is None:
        raise QubesNoTemplateError(f"VM {vm} needs a template")
    if found.klass != "TemplateVM":
        raise ValueError(f"{found} is no TemplateVM")
    if not vm.is_halted():
        raise QubesVMNotHaltedError(vm)
    return found  # type: ignore[return-value]
