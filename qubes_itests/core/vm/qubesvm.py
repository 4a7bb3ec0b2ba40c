"""A VM with a domain: its settings and names, and what it is composed of."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Any, ClassVar, Self

from qubes_itests.core import config
from qubes_itests.core.events import handler
from qubes_itests.core.exc import (
    QubesVMError,
    QubesVMNotFoundError,
    QubesVMNotHaltedError,
    QubesVMNotStartedError,
)
from qubes_itests.core.network import addresses
from qubes_itests.core.network.wiring import Wiring
from qubes_itests.core.properties import Property, VMProperty, stateless_property
from qubes_itests.core.storage import Storage, in_pool
from qubes_itests.core.vm import bootmode, settings
from qubes_itests.core.vm.base import BaseVM
from qubes_itests.core.vm.boot_data import qubesdb_entries
from qubes_itests.core.vm.commands import PIPES, Commands, communicate
from qubes_itests.core.vm.database import QubesDB
from qubes_itests.core.vm.life import Life, PowerState
from qubes_storage.uninterrupted import to_its_end

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from qubes_itests.core.app import Qubes
    from qubes_itests.core.vm.appvm import AppVM
    from qubes_itests.guest.link.agent import GuestAgent
    from qubes_itests.guest.link.process import GuestProcess
    from qubes_itests.hypervisor.contract import Domain
    from qubes_storage.pool import Pool
    from qubes_storage.volume import Volume

__all__ = ["QubesVM"]


class QubesVM(BaseVM):
    """A VM that can be started.

    What it does is done by its `life`, `net`, `commands` and `storage`.

    :param app: the app that it belongs to.
    :param volume_config: changes to the settings of its volumes, by their names.
    :param properties: first values of its properties.
    """

    #: The volumes of the class, by name; see `Storage.init_volume`.
    volume_config: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    memory = Property[int](
        "memory",
        type=int,
        setter=settings.memory,
        of_template=True,
        default=lambda _vm: config.defaults["memory"],
        doc="Memory at start, MiB; at least a tenth of maxmem.",
    )
    maxmem = Property[int](
        "maxmem",
        type=int,
        setter=settings.max_memory,
        order=1,
        default=settings.default_max_memory,
        doc="The most that balancing may give, MiB, at most 10 x memory; 0: it is not"
        " balanced.",
    )
    vcpus = Property[int](
        "vcpus",
        type=int,
        setter=settings.positive,
        of_template=True,
        default=lambda _vm: config.defaults["vcpus"],
        doc="Virtual CPUs. Where they are emulated, a guest has one unless this is set,"
        " in its template or in the VM.",
    )
    virt_mode = Property[str](
        "virt_mode",
        setter=settings.virt_mode,
        default=settings.default_virt_mode,
        doc="pvh or hvm; by default hvm when PCI devices are assigned, which pvh cannot"
        " have, else the template's, else pvh.",
    )
    kernel = Property[str | None](
        "kernel",
        allow_none=True,
        setter=settings.kernel_name,
        of_template=True,
        default=lambda vm: vm.app.default_kernel,
        doc="Name of one of the app's kernels; None to boot from the image, which pvh"
        " cannot.",
    )
    kernelopts = Property[str](
        "kernelopts",
        type=str,
        setter=settings.kernel_options,
        default=settings.default_kernel_options,
        doc="Added to the kernel's command line.",
    )
    default_user = Property[str](
        "default_user",
        setter=settings.user,
        of_template=True,
        default="user",
        doc="Who runs commands.",
    )
    default_dispvm: VMProperty[AppVM | None] = VMProperty(
        "default_dispvm",
        check=settings.check_for_dispvms,
        default=lambda vm: vm.app.default_dispvm,
        doc="What its disposable VMs are made from.",
    )
    qrexec_timeout = Property[int](
        "qrexec_timeout",
        type=int,
        setter=settings.positive,
        of_template=True,
        default=lambda vm: vm.app.default_qrexec_timeout,
        doc="How long the guest may take to answer: after a start, and when it is to"
        " enlarge a filesystem; seconds.",
    )
    shutdown_timeout = Property[int](
        "shutdown_timeout",
        type=int,
        setter=settings.positive,
        of_template=True,
        default=lambda vm: vm.app.default_shutdown_timeout,
        doc="How long a shutdown may take, seconds.",
    )
    autostart = Property[bool](
        "autostart", type=bool, default=False, doc="Start it with the system."
    )
    include_in_backups = Property[bool](
        "include_in_backups", type=bool, default=True, doc="Have it in backups."
    )
    installed_by_rpm = Property[bool](
        "installed_by_rpm",
        type=bool,
        default=False,
        clone=False,
        doc="Whether a package of dom0 brought it, as templates mostly come.",
    )
    backup_timestamp = Property[int | None](
        "backup_timestamp",
        type=int,
        setter=settings.timestamp,
        default=None,
        clone=False,
        doc="When it was last backed up, whole seconds since the epoch; None: never.",
    )
    guivm: VMProperty[BaseVM | None] = VMProperty(
        "guivm",
        default=lambda vm: vm.app.default_guivm,
        doc="Who shows its windows; there are none here.",
    )
    audiovm: VMProperty[BaseVM | None] = VMProperty(
        "audiovm",
        default=lambda vm: vm.app.default_audiovm,
        doc="Who plays its sounds; there are none here.",
    )
    management_dispvm: VMProperty[AppVM | None] = VMProperty(
        "management_dispvm",
        check=settings.check_for_dispvms,
        of_template=True,
        default=lambda vm: vm.app.management_dispvm,
        doc="What disposable VMs that manage it are made from.",
    )
    keyboard_layout = Property[str](
        "keyboard_layout",
        setter=settings.keyboard_layout,
        default=lambda vm: "us++" if vm.guivm is None else vm.guivm.keyboard_layout,
        doc="LAYOUT+VARIANT+OPTIONS of its keyboard.",
    )
    debug = Property[bool]("debug", type=bool, default=False, doc="Debug mode.")

    bootmode = Property[str](
        "bootmode",
        type=str,
        load_stage=4,
        default=bootmode.default_mode,
        doc="Name of its boot mode; one that there is not stands for the default one.",
    )
    mac = Property[str](
        "mac",
        setter=addresses.check_mac,
        default=addresses.default_mac,
        clone=False,
        doc="Hardware address of the interface to its net VM.",
    )
    provides_network = Property[bool](
        "provides_network", type=bool, default=False, doc="May be others' netvm."
    )
    netvm: VMProperty[QubesVM | None] = VMProperty(
        "netvm",
        check=settings.check_netvm,
        default=settings.default_netvm,
        doc="The VM that connects this one to the network; None for no network at all.",
    )
    ip = Property[IPv4Address | None](
        "ip",
        type=IPv4Address,
        default=lambda vm: addresses.ipv4_of(vm) if vm.is_networked() else None,
        clone=False,
        doc="Its IPv4 address.",
    )
    ip6 = Property[IPv6Address | None](
        "ip6",
        type=IPv6Address,
        default=addresses.default_ip6,
        clone=False,
        doc="Its IPv6 address, where the feature ipv6 is set; nothing speaks it yet.",
    )
    visible_ip = stateless_property(addresses.visible_ip)
    visible_gateway = stateless_property(addresses.visible_gateway)
    visible_netmask = stateless_property(addresses.visible_netmask)
    visible_ip6 = stateless_property(addresses.visible_ip6)
    visible_gateway6 = stateless_property(addresses.visible_gateway6)
    gateway = stateless_property(addresses.gateway)
    gateway6 = stateless_property(addresses.gateway6)
    netmask = stateless_property(addresses.netmask)
    dns = stateless_property(addresses.dns)

    def __init__(
        self,
        app: Qubes,
        *,
        volume_config: Mapping[str, Mapping[str, Any]] | None = None,
        **properties: Any,
    ) -> None:
        # there first, for handlers of properties ask whether it runs
        self.life = Life(self)
        self.net = Wiring(self)
        self.commands = Commands(self)
        super().__init__(app, **properties)
        self.storage = Storage(self)
        self._volume_changes = dict(volume_config or {})

    # its life

    @stateless_property(type=int)
    def xid(self) -> int:
        """Return the number of its domain, new in each run; -1 when it is halted."""
        return self.life.xid if self.is_running() else -1

    @stateless_property(type=int)
    def start_time(self) -> int | None:
        """When it was last started, whole seconds since the epoch; None: never."""
        began = self.life.started_at
        return None if began is None else int(began)

    @property
    def domain(self) -> Domain | None:
        """The domain of the present or the last run."""
        return self.life.domain

    @property
    def agent(self) -> GuestAgent | None:
        """The agent of the present run; None for a guest without one."""
        return self.life.agent

    @property
    def _domain_stopped_lock(self) -> asyncio.Lock:
        # what suites of the core wait for by this name
        return self.life.stopped_lock

    @property
    def libvirt_domain(self) -> object | None:
        """The object of libvirt for its domain; None while libvirt knows of none."""
        return None if self.domain is None else self.domain.native

    @property
    def directory(self) -> Path:
        """Where this VM's console log, sockets and agent log are."""
        return self.app.directory / "vms" / self.name

    def get_power_state(self) -> str:
        """Return the state as `qvm-ls` shows it, one of `PowerState`."""
        return self.life.state.value

    def is_running(self) -> bool:
        """Tell whether there is a domain: starting, running, paused or halting."""
        return self.life.state is not PowerState.HALTED

    def is_qrexec_running(self) -> bool:
        """Tell whether its agent answers: commands and services can be called."""
        return self.life.agent is not None

    def is_paused(self) -> bool:
        """Tell whether its virtual CPUs stand still."""
        return self.life.is_paused

    def is_starting(self) -> bool:
        """Tell whether a start is under way, other than the one that asks."""
        return self.life.is_starting

    def running_domain(self) -> Domain:
        """Return the domain; QubesVMNotRunningError when it is not started."""
        return self.life.running_domain()

    def running_agent(self) -> GuestAgent:
        """Return the agent; see `Life.running_agent`."""
        return self.life.running_agent()

    async def start(
        self,
        start_guid: bool = True,
        notify_function: object = None,
        mem_required: int | None = None,
    ) -> Self:
        """Start the VM, and return it; see `Life.start`.

        :param start_guid: passed on in the events; there is no GUI here.
        :param notify_function: accepted for callers of Qubes OS, and not called.
        :param mem_required: bytes to ask of qmemman, if it runs; by default what
            `memory` and the hypervisor's overhead come to.
        """
        del notify_function
        await self.life.start(start_guid=start_guid, memory=mem_required)
        return self

    async def shutdown(
        self,
        force: bool = False,
        wait: bool = False,
        timeout: float | None = None,
    ) -> Self:
        """Ask the guest to power off; see `Life.shutdown`.

        :param timeout: seconds to wait; by default the VM's `shutdown_timeout`.
        """
        limit = float(timeout or self.shutdown_timeout)
        await self.life.shutdown(force=force, wait=wait, timeout=limit)
        return self

    async def restart(
        self,
        force: bool = False,
        timeout: float | None = None,
    ) -> Self:
        """Shut the VM down, wait for that, and start it again; as `shutdown`."""
        await self.shutdown(force=force, wait=True, timeout=timeout)
        return await self.start()

    async def kill(self) -> None:
        """Stop the VM at once; see `Life.kill`."""
        await self.life.kill(float(self.shutdown_timeout))

    async def wait_ended(self, timeout: float) -> None:
        """Wait until the end of the present run is dealt with; see `Life`."""
        await self.life.wait_ended(timeout)

    async def pause(self) -> None:
        """Stop its virtual CPUs; QubesVMNotStartedError when it is halted."""
        await self.life.pause()

    async def unpause(self) -> None:
        """Let its virtual CPUs run; see `Life.unpause`."""
        await self.life.unpause()

    async def suspend(self) -> None:
        """Let the guest get ready for a long pause, and pause it; see `Life`."""
        await self.life.suspend()

    async def resume(self) -> None:
        """Wake it up from `suspend`; see `Life.resume`."""
        await self.life.resume()

    async def start_failed(self) -> None:
        """Act on a start that failed, after all of it is undone; for subclasses."""

    # commands and services; see `Commands`

    async def run(
        self, command: str, user: str | None = None, **options: Any
    ) -> GuestProcess:
        """Start a command in the guest's shell; see `Commands.run`."""
        return await self.commands.run(command, user, **options)

    async def run_service(
        self,
        service: str,
        source: BaseVM | str | None = None,
        user: str | None = None,
        *,
        filter_esc: bool = False,
        **options: Any,
    ) -> GuestProcess:
        """Start a qrexec service in the guest; see `Commands.run_service`.

        :param filter_esc: accepted for callers of Qubes OS.
        """
        del filter_esc
        return await self.commands.run_service(service, source, user, **options)

    async def run_for_stdio(
        self,
        command: str,
        *,
        input: bytes | None = None,
        **options: Any,
    ) -> tuple[bytes, bytes]:
        """Run a command to its end and return its output and its error output.

        :param input: what it reads.
        :raise subprocess.CalledProcessError: when it ends with another status than 0.
        """
        process = await self.run(command, **(PIPES | options))
        return await communicate(process, command, input)

    # its network; see `Wiring`

    @property
    def is_net_vm(self) -> bool:
        """Whether it may be others' netvm."""
        return self.provides_network

    def is_networked(self) -> bool:
        """Tell whether it can have an address: it has a net VM, or is one."""
        return self.provides_network or self.netvm is not None

    @property
    def connected_vms(self) -> list[QubesVM]:
        """The VMs that have this one as net VM, whether they run or not."""
        return [
            vm
            for vm in self.app.domains
            if isinstance(vm, QubesVM) and vm.netvm is self
        ]

    async def attach_network(self) -> None:
        """Attach it to its net VM, which is started; see `Wiring.attach`."""
        await self.net.attach()

    async def detach_network(self) -> None:
        """Detach it from its net VM; see `Wiring.detach`."""
        await self.net.detach()

    async def network_settled(self) -> None:
        """Wait until a change of `netvm` is carried out; see `Wiring.settled`."""
        await self.net.settled()

    def require_running(self, netvm: QubesVM | None) -> None:
        """Raise QubesVMNotStartedError if it runs, and this net VM for it does not."""
        if netvm is not None and not self.is_halted() and not netvm.is_running():
            raise QubesVMNotStartedError(
                netvm,
                f"VM {self} runs, and cannot be attached to VM {netvm}, which does not:"
                " start that first",
            )

    @handler("domain-pre-start")
    def on_pre_start_net(
        self,
        _event: str,
        start_guid: bool = True,
        **_kwargs: Any,
    ) -> None:
        """Have the net VM start beside it, as that takes as long."""
        self.net.start_netvm(start_guid=start_guid)

    @handler("domain-spawn")
    async def on_spawn_net(self, _event: str, **_kwargs: Any) -> None:
        """Plug it in."""
        await self.net.begin()

    @handler("domain-start")
    async def on_start_net(self, _event: str, **_kwargs: Any) -> None:
        """Attach the clients that run already."""
        await self.net.attach_clients()

    @handler("domain-unpaused")
    async def on_unpaused_net(self, _event: str, **_kwargs: Any) -> None:
        """Catch up with what happened meanwhile."""
        await self.net.catch_up()

    @handler("domain-stopped", "domain-start-failed")
    async def on_stopped_net(self, _event: str, **_kwargs: Any) -> None:
        """Take away what the run had on the host."""
        await self.net.end()

    @handler("property-set:netvm", "property-reset:netvm")
    def on_netvm_set(self, _event: str, **_kwargs: Any) -> None:
        """Have the interface follow, if the VM runs."""
        self.net.follow()

    # what a start asks

    def check_startable(self) -> None:
        """Raise when it must not be started."""
        if self not in self.app.domains:
            raise QubesVMNotFoundError(self.name)
        if self.app.vmm.offline_mode:
            raise QubesVMError(self, f"VM {self} cannot start: its app is offline")
        self.check_whole()
        if reason := self.features.get("prohibit-start"):
            raise QubesVMError(
                self,
                f"VM {self} must not be started: {reason} (feature 'prohibit-start')",
            )

    def note_problem(self, error: Exception) -> None:
        """Remember what went wrong where nobody was there to be told."""
        self.log.error("VM %s: %s", self.name, str(error))
        self.app.problems.append(f"VM {self}: {error}")

    @property
    def default_dispvm_or_none(self) -> AppVM | None:
        """Its `default_dispvm`."""
        return self.default_dispvm

    @property
    def offered_bootmode(self) -> str | None:
        """Name of the boot mode that it has for VMs which start from it, if any."""
        return None

    @property
    def derived_vms(self) -> Sequence[QubesVM]:
        """The VMs that are made from this one.

        Only one that may be a template looks through the VMs of the app: what each VM
        asks at each change of a property would take minutes among 10,000.
        """
        return ()

    @property
    def disposable_number(self) -> int | None:
        """The number by which a disposable VM has its address; None of others."""
        return None

    def is_set_here_or_in_template(self, name: str) -> bool:
        """Tell whether a property is set in the VM, or in one that it is made from."""
        if not self.property_is_default(name):
            return True
        template = self.template_or_none
        return template is not None and template.is_set_here_or_in_template(name)

    @stateless_property(type=bool)
    def updateable(self) -> bool:
        """Whether what is installed in it stays: it has its own root."""
        return self.template_or_none is None

    @property
    def persistence(self) -> str:
        """What it keeps, as its guest is told: ``full``, ``rw-only`` or ``none``."""
        return "full" if self.updateable else "rw-only"

    @property
    def bootmode_kernelopts(self) -> str:
        """What its boot mode adds to the kernel's command line."""
        return bootmode.kernel_options(self)

    def get_default_user(self) -> str:
        """Return who runs commands: as its boot mode says, else its `default_user`."""
        return bootmode.user(self)

    @property
    def untrusted_qdb(self) -> QubesDB | None:
        """The guest's database as it is now, None while it does not run."""
        if not self.is_running():
            return None
        return QubesDB(qubesdb_entries(self) | self.life.device_entries)

    # on disk

    def init_storage(self, pool: Pool | str | None = None) -> None:
        """Bind the volumes, all but snapshots in `pool` if one is named."""
        self.storage.unbind()
        for name, value in self.volume_settings().items():
            config = {**value, **self._volume_changes.get(name, {})}
            self.storage.init_volume(name, in_pool(config, pool))

    def rebase_storage(self) -> None:
        """Bind the snapshots anew, after a change of the template."""
        for name, value in self.volume_settings().items():
            if value.get("snap_on_start"):
                self.storage.init_volume(name, value)

    def volume_settings(self) -> dict[str, dict[str, Any]]:
        """Return the settings of its volumes, by their names."""
        return {name: dict(value) for name, value in self.volume_config.items()}

    @property
    def volumes(self) -> dict[str, Volume]:
        """Its volumes, by name, in the order in which things are done to them."""
        return self.storage.volumes

    @volumes.setter
    def volumes(self, volumes: dict[str, Volume]) -> None:
        self.storage.volumes = volumes

    def check_unused(self) -> None:
        """Raise QubesVMInUseError when others use it, or a volume gets new content."""
        super().check_unused()
        self.storage.check_unchanging()

    async def create_on_disk(
        self,
        pool: Pool | str | None = None,
        pools: Mapping[str, Pool | str] | None = None,
        *,
        images: Mapping[str, Path] | None = None,
        adopt: bool = False,
    ) -> None:
        """Make the VM's volumes.

        :param pool: name of the pool for all of them but snapshots, which are where
            their sources are.
        :param pools: names of pools, by the names of volumes.
        :param images: raw images that volumes begin with, by the volumes' names.
        :param adopt: whether to take over volumes that no VM has, instead of refusing
            to make those.
        :raise VolumeExistsError: when there is such a volume already.
        """
        for name, its_pool in (pools or {}).items():
            before = self._volume_changes.get(name, {})
            self._volume_changes[name] = {**before, "pool": its_pool}
        if pool is not None or pools:
            self.init_storage(pool)
        with self.being("made"):
            await self.storage.create(images, adopt=adopt)
            await self._announce_volumes("domain-create-on-disk")
        self._settle()

    async def _announce_volumes(self, event: str, **kwargs: Any) -> None:
        """Fire an event; if a handler fails, remove the volumes that were made."""
        try:
            await self.fire_event_async(event, **kwargs)
        except BaseException:
            await to_its_end(self.storage.undo())
            raise

    def _settle(self) -> None:
        # who makes or removes the whole VM has more to do
        if self.app.journal is not None and not self.under_way:
            self.app.journal.settle(self.uuid)

    async def remove_from_disk(self) -> None:
        """Remove the VM's volumes; QubesVMNotHaltedError when it runs."""
        if not self.is_halted():
            raise QubesVMNotHaltedError(self)
        await self.fire_event_async("domain-remove-from-disk")
        await self.storage.remove()
        self._settle()

    async def clone_disk_files(
        self, src: QubesVM, pool: Pool | str | None = None
    ) -> None:
        """Make the VM's volumes as copies of another VM's, which must be halted.

        :param src: the VM to copy.
        :param pool: name of the pool for all of them but snapshots; by default each is
            in the pool of the one it is a copy of.
        """
        if not src.is_halted():
            raise QubesVMNotHaltedError(src)
        if not self.is_halted():
            raise QubesVMNotHaltedError(self)
        with self.being("made"):
            await self.storage.clone(src, pool)
            await self._announce_volumes("domain-clone-files", src=src)
        self._settle()
