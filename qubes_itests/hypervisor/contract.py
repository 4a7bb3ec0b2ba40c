"""Contract of a hypervisor, in no hypervisor's own words.

A back end subclasses :class:`Hypervisor` and :class:`Domain`.  The names are those
that Xen and libvirt share: a *domain* is one virtual machine, its *memory target* is
what its balloon driver aims at.  Everything that may block is a coroutine; a back end
moves blocking calls to threads.  All sizes are bytes unless a name says MiB.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from qubes_itests.hypervisor.exc import HypervisorError

if TYPE_CHECKING:
    import asyncio
    from pathlib import Path
    from uuid import UUID

__all__ = [
    "Disk",
    "Domain",
    "DomainSpec",
    "DomainState",
    "Hypervisor",
    "Interface",
    "LifecycleEvent",
    "LifecycleHandler",
    "MemoryStatistics",
]


class DomainState(enum.Enum):
    """The state of a domain; the values are what `qvm-ls` shows."""

    HALTED = "Halted"
    RUNNING = "Running"
    PAUSED = "Paused"
    SUSPENDED = "Suspended"
    DYING = "Dying"
    CRASHED = "Crashed"


class LifecycleEvent(enum.Enum):
    """What happened to a domain.  A crash may be told as a pause first."""

    STARTED = "started"
    PAUSED = "paused"
    RESUMED = "resumed"
    STOPPED = "stopped"
    CRASHED = "crashed"


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk of a domain.

    :param name: what the guest calls it under /dev: ``xvda`` to ``xvdz``.
    :param path: a raw image file or a block device of the host; or a Unix socket on
        which somebody serves one to one client, by NBD.
    :param read_only: whether the guest may write.
    """

    name: str
    path: Path
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface of a domain, plugged into a bridge or a tap of the host.

    :param mac: address in lower case with colons; unique within the domain.
    :param bridge: name of the bridge.
    :param tap: name of a tap device that is there and set up already; instead of a
        bridge.
    :param place: of those in the machine where interfaces go, the one that this has;
        None for any that is free.
    """

    mac: str
    bridge: str = ""
    tap: str = ""
    place: int | None = None


@dataclass(frozen=True, slots=True)
class DomainSpec:
    """All that a back end must know to define a domain.

    :param name: unique within the hypervisor.
    :param uuid: unique too.
    :param directory: an existing directory for this domain's console log and sockets.
    :param memory: memory at start, MiB.
    :param max_memory: what the balloon may grow to, MiB; at least ``memory``.
    :param vcpus: number of virtual CPUs.
    :param kernel: kernel image (bzImage or ELF) on the host; None to have the machine's
        firmware boot from the first disk.
    :param initramfs: initramfs image on the host; None if there is no kernel.
    :param kernel_options: appended to the back end's own kernel command line.
    :param balanced: whether its memory may be changed while it runs.
    :param spare: whether nobody needs it: it is undefined as soon as one that is
        defined lacks its memory.
    """

    name: str
    uuid: UUID
    directory: Path
    memory: int
    max_memory: int
    kernel: Path | None
    initramfs: Path | None
    vcpus: int = 1
    kernel_options: str = ""
    disks: tuple[Disk, ...] = ()
    interfaces: tuple[Interface, ...] = ()
    balanced: bool = True
    spare: bool = False


@dataclass(frozen=True, slots=True)
class MemoryStatistics:
    """A guest's memory as last reported; None for what it did not report.

    :param actual: what the domain holds now, bytes.
    :param total: what its kernel manages, bytes.
    :param unused: free and used for nothing, bytes.
    :param available: what could be taken without swapping, bytes.
    :param cached: page cache, bytes.
    :param swapped_in: pages brought in from swap since boot, bytes.
    :param swapped_out: pages written out to swap since boot, bytes.
    :param updated: when the guest reported, in seconds since the epoch.
    """

    actual: int
    total: int | None = None
    unused: int | None = None
    available: int | None = None
    cached: int | None = None
    swapped_in: int | None = None
    swapped_out: int | None = None
    updated: int | None = None


class Domain(abc.ABC):
    """One defined domain.  Handles stay valid over any number of starts."""

    spec: DomainSpec
    #: Whether its last run ended because the guest's kernel panicked.
    panicked: bool = False

    @property
    def native(self) -> object | None:
        """The back end's own object for its present run, for tests that go round ours.

        None while it does not run, or where there is none.
        """
        return None

    @abc.abstractmethod
    async def state(self) -> DomainState:
        """Return the present state; HALTED also when it is not defined any more."""

    @abc.abstractmethod
    async def start(
        self,
        *,
        saved_state: Path | None = None,
        saved_disks: tuple[str, ...] = (),
        to_save: Path | None = None,
    ) -> None:
        """Boot the domain, or resume it from a state that `save` wrote.

        A domain resumed from a saved state has no interfaces yet, and no disks but
        those, whatever its spec lists: attach the others afterwards.

        :param saved_state: what `save` wrote.
        :param saved_disks: names of the disks that the state has. Each must hold what
            it held then, to the byte, for the guest has parts of it in its memory.
        :param to_save: the path that `save` will be given: clones of that state share
            its memory then, where the back end has a way.
        :raise StateError: when it runs already.
        :raise SavedStateError: when the state does not load; the domain is halted
            then, and a start without it may follow.
        :raise HypervisorError: for what else went wrong.
        """

    async def adopt(self, clone: Domain) -> None:
        """Begin a run as what another domain, which is paused, runs as already.

        The disks of the clone become those of this one; what else it lists is to be
        attached. The clone is undefined from then on, also when this raises, unless it
        was not there to be had.

        :param clone: of the same `state_key`, for the disks that it has; none of those
            may be read-only.
        :raise StateError: when this one runs already, or the clone is not paused.
        :raise HypervisorError: for what else went wrong, and this one is halted then;
            or the back end cannot: not all can.
        """
        raise HypervisorError(self.spec.name, "start", f"{clone.spec.name} stays one")

    async def press_power_button(self) -> None:
        """Ask a guest without an agent to power off, by ACPI; it may ignore that.

        :raise HypervisorError: when the back end cannot; not all can.
        """
        raise HypervisorError(
            self.spec.name, "press the power button of", "the back end cannot"
        )

    @abc.abstractmethod
    async def destroy(self) -> None:
        """Stop it at once, as pulling the plug does; no error when it is halted."""

    @abc.abstractmethod
    async def undefine(self) -> None:
        """Destroy and forget it; no error when that was done before."""

    @abc.abstractmethod
    async def pause(self) -> None:
        """Stop its virtual CPUs; no error when they are stopped."""

    @abc.abstractmethod
    async def resume(self) -> None:
        """Let its virtual CPUs run; no error when they do."""

    @abc.abstractmethod
    async def save(self, path: Path) -> None:
        """Write its state to a file for `start`, and halt it.

        The file is complete when this returns, and absent when it raises.  It loads
        into other domains (other name, UUID, directory) of the same `state_key`. There
        may be files beside it whose names begin with its own, of one that was started
        `to_save`.
        """

    async def freeze(self, path: Path) -> DomainSpec:
        """Write all of a paused domain but its disks to a file for `thaw`.

        That is its memory, whatever it lies in, and its devices.  The domain stays
        paused, and can go on.  The file is complete when this returns, and absent when
        it raises.

        :return: what a domain that is thawed from it has to be: the spec, with the
            disks and the interfaces that it has now.
        :raise StateError: when it is not paused.
        :raise HypervisorError: for what else went wrong, as a full disk; or the back
            end cannot: not all can.
        """
        del path
        raise HypervisorError(self.spec.name, "freeze", "the back end cannot")

    async def thaw(self, path: Path) -> None:
        """Bring a halted domain to where another one was frozen; it is paused then.

        Its spec is what `freeze` returned.  Name, UUID and directory may be others, and
        so may the images of the disks, with the same contents, and the taps.

        :raise StateError: when it runs already.
        :raise SavedStateError: when the file does not load; it is halted then.
        :raise HypervisorError: for what else went wrong; or the back end cannot.
        """
        del path
        raise HypervisorError(self.spec.name, "thaw", "the back end cannot")

    @abc.abstractmethod
    async def wait_stopped(self, timeout: float | None = None) -> DomainState:
        """Wait until it is HALTED or CRASHED, and return which.

        :param timeout: seconds.
        :raise DeadlineError: when it still runs then.
        """

    @abc.abstractmethod
    async def open_channel(
        self, protocol: Callable[[], asyncio.BaseProtocol], *, timeout: float = 10.0
    ) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
        """Connect to the byte stream that the guest's agent reads and writes.

        One connection at a time.

        :param timeout: seconds for the host's side to come up; the guest's side may
            come later, what is written until then waits.
        """

    def end_channel_with_agent(self) -> None:  # noqa: B027 - not all back ends see it
        """Have the channel that is open end as soon as the guest closes its side.

        Until this is called it goes on: agents of a guest take over from each other.
        """

    @abc.abstractmethod
    def console_log(self) -> Path:
        """Return the file that collects what the guest prints on its console."""

    def distrust_console(self) -> None:  # noqa: B027 - not all back ends look at it
        """Take what is printed in this run from now on for no evidence of a panic.

        Until then only its kernel and stage one have printed anything.
        """

    @abc.abstractmethod
    def definition(self) -> str:
        """Return the back end's description of the domain (XML, say), for people."""

    @abc.abstractmethod
    async def attach_disk(self, disk: Disk) -> None:
        """Plug a disk into the running domain.

        :raise HypervisorError: when a disk of that name is attached.
        """

    @abc.abstractmethod
    async def detach_disk(self, name: str) -> None:
        """Pull a disk out of the running domain; nothing happens if there is none.

        So it can be repeated after an error: a guest may let go of it later.

        :raise HarnessError: when the guest keeps it.
        """

    @abc.abstractmethod
    async def resize_disk(self, name: str, size: int) -> None:
        """Tell the guest that a disk now has `size` bytes; the image has them already.

        :raise HypervisorError: when there is no disk of that name.
        """

    @abc.abstractmethod
    async def attach_interface(self, interface: Interface) -> None:
        """Plug a network interface into the running domain.

        :raise HypervisorError: when one of that address is attached.
        """

    @abc.abstractmethod
    async def detach_interface(self, mac: str) -> None:
        """Pull a network interface out of the running domain; as `detach_disk`."""

    @abc.abstractmethod
    async def set_memory_target(self, target: int) -> None:
        """Ask the balloon driver to bring the domain to `target` bytes."""

    async def cpu_time(self) -> float:
        """Return how long its virtual CPUs have run since it started, in seconds.

        0 where the back end cannot tell.
        """
        return 0.0

    @abc.abstractmethod
    async def memory_statistics(self) -> MemoryStatistics:
        """Return what the domain holds and what its guest last reported."""


LifecycleHandler = Callable[[Domain, LifecycleEvent], None]


class Hypervisor(abc.ABC):
    """A connection to one hypervisor; an async context manager that closes it."""

    #: Short name of the back end, as on the command line.
    name: str
    #: Whether its domains can be plugged into bridges of this host.
    networked: bool = True
    #: Whether its domains take memory of this machine.
    takes_memory: bool = True
    #: MiB that its domains may have at their starts, all together; None for as long as
    #: this machine has room. `define` refuses what would be more.
    memory_limit: int | None = None
    #: How many times longer a guest may take than one with hardware virtualisation.
    slowness: float = 1.0

    @property
    def native(self) -> object | None:
        """The back end's own object for the connection; None where there is none."""
        return None

    @abc.abstractmethod
    async def close(self) -> None:
        """Destroy every domain that was defined here, and disconnect."""

    @abc.abstractmethod
    async def define(self, spec: DomainSpec) -> Domain:
        """Make a domain known; it is halted.

        :raise HypervisorError: for a duplicate name or UUID, or a bad spec.
        """

    @abc.abstractmethod
    def domains(self, *, spare: bool = False) -> tuple[Domain, ...]:
        """Return the domains that are defined, in order of definition.

        :param spare: those that nobody needs, in place of the others.
        """

    @abc.abstractmethod
    def subscribe(self, handler: LifecycleHandler) -> Callable[[], None]:
        """Have `handler` called on the event loop for every life-cycle event.

        :return: a function that ends the subscription.
        """

    async def machine(self) -> dict[str, str]:
        """Return what must be the same where a frozen domain is thawed, in words.

        Such are the hypervisor's version, the machine type and the CPU.  Empty where
        the back end freezes nothing.
        """
        return {}

    @abc.abstractmethod
    async def state_key(
        self, spec: DomainSpec, *, saved_disks: tuple[str, ...] = ()
    ) -> str | None:
        """Return what a saved state of `spec` depends on, as a short hex digest.

        Kernel and initramfs contents, memory, CPUs, machine and the hypervisor's
        version enter it; names, directories and what disks hold do not.  None where
        the back end cannot start from saved states.

        :param saved_disks: names of the disks that the state has.
        """

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()
