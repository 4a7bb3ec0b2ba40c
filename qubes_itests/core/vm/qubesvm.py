"""A VM with a domain of its own: its settings, and what the hypervisor gets of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

from qubes_itests.core.exc import (
    QubesVMError,
    QubesVMNotFoundError,
    QubesVMNotHaltedError,
)
from qubes_itests.core.network.wiring import WiringMixin
from qubes_itests.core.properties import stateless_property
from qubes_itests.core.storage import Storage, in_pool
from qubes_itests.core.vm.bootmode import BootModeMixin
from qubes_itests.core.vm.database import QubesDB
from qubes_itests.core.vm.execution import ExecutionMixin
from qubes_itests.core.vm.life import Life, PowerState
from qubes_itests.core.vm.settings import SettingsMixin
from qubes_itests.core.vm.start_memory import memory_for_start
from qubes_itests.guest.link.agent import Identity
from qubes_itests.hypervisor.contract import DomainSpec
from qubes_storage.uninterrupted import to_its_end

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping
    from pathlib import Path

    from qubes_itests.core.app import Qubes
    from qubes_itests.guest.image.template import Template
    from qubes_itests.guest.link.agent import GuestAgent
    from qubes_itests.hypervisor.contract import Domain
    from qubes_storage.volume import Volume

__all__ = ["QubesVM"]

_PROHIBIT: Final = "prohibit-start"


class QubesVM(ExecutionMixin, WiringMixin, BootModeMixin, SettingsMixin):
    """A VM that can be started.

    :param app: the app that it belongs to.
    :param volume_config: changes to the settings of its volumes, by their names.
    :param properties: first values of its properties.
    """

    #: The volumes of the class, by name; see `Storage.init_volume`.
    volume_config: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init__(
        self,
        app: Qubes,
        *,
        volume_config: Mapping[str, Mapping[str, Any]] | None = None,
        **properties: Any,
    ) -> None:
        #: Its runs. There first, for handlers of properties ask whether it runs.
        self.life = Life(self)
        super().__init__(app, **properties)
        self.storage = Storage(self)
        self._volume_changes = dict(volume_config or {})

    def init_storage(self, pool: Any = None) -> None:
        """Bind the volumes, all but snapshots in `pool` if one is named."""
        self.storage.unbind()
        for name, settings in self.volume_settings().items():
            config = {**settings, **self._volume_changes.get(name, {})}
            self.storage.init_volume(name, in_pool(config, pool))

    def rebase_storage(self) -> None:
        """Bind the snapshots anew, after a change of the template."""
        for name, settings in self.volume_settings().items():
            if settings.get("snap_on_start"):
                self.storage.init_volume(name, settings)

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

    # its life; see `Life`

    @stateless_property
    def xid(self) -> int:
        """Return the number of its domain, new in each run; -1 when it is halted."""
        return self.life.xid if self.is_running() else -1

    @stateless_property
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
        """Return the state as `qvm-ls` shows it.

        ``Halted``, ``Transient`` (starting), ``Running``, ``Paused``, ``Suspended`` or
        ``Halting``.
        """
        return self.life.state.value

    def is_running(self) -> bool:
        """Tell whether there is a domain: starting, running, paused or halting."""
        return self.life.state is not PowerState.HALTED

    def is_halted(self) -> bool:
        """Tell whether there is none."""
        return self.life.state is PowerState.HALTED

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
        """Return the agent.

        :raise QubesVMNotRunningError: when the VM is not started.
        :raise QubesVMError: when it has none, for it booted from its own disk.
        """
        return self.life.running_agent()

    async def start(
        self,
        start_guid: bool = True,  # noqa: FBT001, FBT002 - as in Qubes OS
        notify_function: object = None,
        mem_required: int | None = None,
    ) -> Self:
        """Start the VM; any number of calls at once are one start.

        :param start_guid: passed on in the events; there is no GUI here.
        :param notify_function: accepted for callers of Qubes OS, and not called.
        :param mem_required: bytes to ask of qmemman, if it runs; by default what
            `memory` and the hypervisor's overhead come to.
        :return: the VM.
        :raise QubesVMStartError: names the step that failed; all is undone.
        :raise QubesVMError: when it may not be started; what handlers of
            `domain-pre-start` raise.
        """
        del notify_function
        await self.life.start(start_guid=start_guid, memory=mem_required)
        return self

    async def shutdown(
        self,
        force: bool = False,  # noqa: FBT001, FBT002 - as in Qubes OS
        wait: bool = False,  # noqa: FBT001, FBT002
        timeout: float | None = None,
    ) -> Self:
        """Ask the guest to power off; without an agent by the machine's power button.

        :param force: do it even if running VMs have it as their net VM, or if it is
            paused, as it is unpaused for this; handlers of `domain-pre-shutdown` are
            told, and need not object then.
        :param wait: return when all of the run has ended.
        :param timeout: seconds to wait; by default the VM's `shutdown_timeout`.
        :raise QubesVMNotStartedError: when it is halted.
        :raise QubesVMInUseError: when running VMs need it, and `force` is not set.
        :raise QubesVMNotRunningError: when it is paused, and `force` is not set.
        :raise QubesVMShutdownTimeoutError: when it runs still; it goes on running.
        """
        limit = float(timeout or self.shutdown_timeout)
        await self.life.shutdown(force=force, wait=wait, timeout=limit)
        return self

    async def restart(
        self,
        force: bool = False,  # noqa: FBT001, FBT002 - as for `shutdown`
        timeout: float | None = None,
    ) -> Self:
        """Shut the VM down, wait for that, and start it again.

        :param force: as for `shutdown`.
        :param timeout: likewise.
        """
        await self.shutdown(force=force, wait=True, timeout=timeout)
        return await self.start()

    async def kill(self) -> None:
        """Stop the VM at once, as pulling the plug does; a start under way fails.

        :raise QubesVMNotStartedError: when it is halted.
        """
        await self.life.kill(float(self.shutdown_timeout))

    async def wait_ended(self, timeout: float) -> None:
        """Wait until the end of the present run is dealt with; at once if halted.

        :param timeout: seconds; then TimeoutError.
        """
        await self.life.wait_ended(timeout)

    async def pause(self) -> None:
        """Stop its virtual CPUs; QubesVMNotStartedError when it is halted."""
        await self.life.pause()

    async def unpause(self) -> None:
        """Let its virtual CPUs run, and set its clock, which stood still as well.

        :raise QubesVMNotPausedError: when they run, or it is halted.
        """
        await self.life.unpause()

    async def suspend(self) -> None:
        """Let the guest get ready for a long pause, and pause it.

        :raise QubesVMNotStartedError: when it is halted.
        """
        await self.life.suspend()

    async def resume(self) -> None:
        """Wake it up from `suspend`; a VM that is only paused is unpaused.

        :raise QubesVMNotPausedError: when it is neither suspended nor paused.
        """
        await self.life.resume()

    # what its life asks

    def check_startable(self) -> None:
        """Raise when it must not be started."""
        if self not in self.app.domains:
            raise QubesVMNotFoundError(self.name)
        if self.app.vmm.offline_mode:
            raise QubesVMError(self, f"VM {self} cannot start: its app is offline")
        self.check_whole()
        if reason := self.features.get(_PROHIBIT):
            raise QubesVMError(
                self,
                f"VM {self} must not be started: {reason} (feature {_PROHIBIT!r})",
            )

    async def start_failed(self) -> None:
        """Act on a start that failed, after all of it is undone; for subclasses."""

    def note_problem(self, error: Exception) -> None:
        """Remember what went wrong where nobody was there to be told."""
        self.log.error("VM %s: %s", self.name, str(error))
        self.app.problems.append(f"VM {self}: {error}")

    def is_set_here_or_in_template(self, name: str) -> bool:
        """Tell whether a property is set in the VM, or in one that it is made from."""
        vm: QubesVM | None = self
        while vm is not None:
            if not vm.property_is_default(name):
                return True
            vm = getattr(vm, "template", None)
        return False

    def boot_files(self) -> Template | None:
        """Return kernel and initramfs; None for an HVM that boots from its disk.

        :raise QubesVMError: when it has no kernel and cannot do without.
        """
        kernel = self.kernel
        if kernel is None and self.virt_mode == "hvm":
            return None
        if kernel is None:
            raise QubesVMError(
                self,
                f"VM {self} has virt_mode {self.virt_mode!r} and no kernel:"
                f" set its property kernel to one of {', '.join(self.app.kernels)}, or"
                " virt_mode to hvm, which boots from the disk",
            )
        if kernel not in self.app.kernels:
            raise QubesVMError(
                self,
                f"VM {self} has kernel {kernel!r}, which the app does not have:"
                f" it has {', '.join(self.app.kernels) or 'none'}",
            )
        return self.app.kernels[kernel]

    def domain_spec(self, directory: Path, files: Template | None) -> DomainSpec:
        """Return what the hypervisor has to know."""
        mode = self.bootmode_kernelopts
        options = f"{files.kernel_options} {self.kernelopts} {mode}" if files else ""
        return DomainSpec(
            name=self.name,
            uuid=self.uuid,
            directory=directory,
            memory=self.memory,
            max_memory=max(self.memory, self.maxmem),
            vcpus=self._domain_vcpus(),
            kernel=None if files is None else files.kernel,
            initramfs=None if files is None else files.initramfs,
            kernel_options=options.strip(),
            disks=tuple(self.storage.disks()),
            # what its guest is, and whether that has a balloon, nobody knows
            balanced=self.maxmem > 0 and files is not None,
        )

    def _domain_vcpus(self) -> int:
        """Return how many CPUs its domain has; as Qubes OS would, where that is safe.

        A guest with two emulated CPUs waits for one that does not get to run: on a busy
        machine one in thirty came to a stand while it started.  Who sets the property
        means it.
        """
        emulated = self.app.hypervisor.slowness > 1
        chosen = self.is_set_here_or_in_template("vcpus")
        return 1 if emulated and not chosen else self.vcpus

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
            default_user=self.get_default_user(),
            db=self.qubesdb_entries(),
            services=tuple(
                name.removeprefix("service.")
                for name, value in self.features.items()
                if name.startswith("service.") and value
            ),
            init=self.features.check_with_template("init", "agent"),
        )

    def qubesdb_entries(self) -> dict[str, str]:
        """Return what the guest finds in qubesdb when it starts."""
        template = getattr(self, "template", None)
        entries = {
            "/name": self.name,
            "/type": self.klass,
            "/default-user": self.get_default_user(),
            "/qubes-vm-type": self.klass,
            "/qubes-vm-updateable": str(template is None),
            "/qubes-vm-persistence": "full" if template is None else "rw-only",
            "/qubes-debug-mode": str(int(self.debug)),
        }
        if template is not None:
            entries["/qubes-base-template"] = str(template)
        return entries | self.network_entries()

    @property
    def untrusted_qdb(self) -> QubesDB | None:
        """The guest's database as it is now, None while it does not run."""
        return QubesDB(self.qubesdb_entries()) if self.is_running() else None

    # on disk

    def check_unused(self) -> None:
        """Raise QubesVMInUseError when others use it, or a volume gets new content."""
        super().check_unused()
        self.storage.check_unchanging()

    async def create_on_disk(
        self,
        pool: Any = None,
        pools: Any = None,
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
        if pools:
            for name, of_volume in pools.items():
                self._volume_changes.setdefault(name, {})
                self._volume_changes[name] = {
                    **self._volume_changes[name],
                    "pool": of_volume,
                }
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
        with self.being("made"):
            await self.storage.clone(src, pool)
            await self._announce_volumes("domain-clone-files", src=src)
        self._settle()
