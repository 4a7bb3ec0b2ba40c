"""The machine under a core: the domains that it defines, and their guests.

The core and its tests call from their own thread; what they call runs on the event loop
of the run, in `Machine.run`. A domain that is created paused has no guest yet: only
when it is resumed has the core written into qubesdb who it is, and that is what a guest
is told as it starts. So `Guest.resume` begins the start, and whoever needs the guest
waits for `Guest.agent`, as the daemon of qrexec does.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import functools
import itertools
import logging
import os
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qubes_itests import timeline
from qubes_itests.balloons import LibvirtMemory
from qubes_itests.dom0.calls import answer
from qubes_itests.dom0.mapper import Mapper
from qubes_itests.dom0.network import Network
from qubes_itests.dom0.shared_database import SharedDatabase
from qubes_itests.dom0.stores import QubesDB
from qubes_itests.dom0.xen import Xen
from qubes_itests.dom0.xen_xml import (
    DomainConfig,
    InterfaceConfig,
    read_device,
    with_devices,
)
from qubes_itests.exc import DeadlineError, HarnessError
from qubes_itests.guest.image.private import make_private
from qubes_itests.guest.link.agent import Identity
from qubes_itests.guest.link.block_export import BlockExport, giving_up
from qubes_itests.guest.link.journal import GuestJournal
from qubes_itests.guest.start.boot import boot, time_here
from qubes_itests.guest.start.record import StartRecord
from qubes_itests.hypervisor.contract import DomainSpec
from qubes_itests.hypervisor.exc import HypervisorError, StateError
from qubes_itests.qmemman.sizes import MIB
from qubes_itests.qmemman.state import DOM0
from qubes_storage.uninterrupted import to_its_end

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping
    from pathlib import Path
    from typing import Any, TypeVar

    from qubes_itests.guest.image.template import Template
    from qubes_itests.guest.link.agent import GuestAgent
    from qubes_itests.guest.start.warm import WarmStarts
    from qubes_itests.hypervisor.contract import Domain, Hypervisor
    from qubes_itests.portal import Portal
    from qubes_itests.qmemman.budget import MemoryBudget

    _T = TypeVar("_T")

__all__ = ["Event", "Guest", "Machine", "State"]

log = logging.getLogger("qubes_itests.dom0")

#: Seconds for the start of a guest with hardware virtualisation.
_START: Final = 60.0
#: Seconds for what follows from the end of a guest.
_END: Final = 60.0
_ROOT, _PRIVATE, _VOLATILE = "xvda", "xvdb", "xvdc"
#: Bytes in which ext4 has its superblock.
_HEAD: Final = 4096
#: How the directory of a run begins, and how deep that of its domain is.
_RUN: Final = "core-"
_DEPTH: Final = 2
_SERVICE: Final = "/qubes-service/"


def _dom0(memory: int) -> DomainConfig:
    """Return the domain of dom0.

    :param memory: at most, MiB.
    """
    return DomainConfig(
        name="Domain-0",
        uuid=uuid.UUID(int=0),
        memory=memory,
        max_memory=memory,
        vcpus=1,
        kernel=None,
        disks=(),
        xml="<domain type='xen'><name>Domain-0</name><devices/></domain>",
    )


class State(enum.IntEnum):
    """States of a domain, with the numbers of virDomainState."""

    RUNNING = 1
    PAUSED = 3
    SHUTOFF = 5


class Event(enum.IntEnum):
    """What happens to a domain, with the numbers of virDomainEventType."""

    STARTED = 2
    SUSPENDED = 3
    RESUMED = 4
    STOPPED = 5


class Machine:
    """Domains, and what a core finds around them.

    :param portal: the thread of the run's event loop.
    :param hypervisor: that runs the guests.
    :param directory: of the run, for consoles and logs of all VMs.
    :param templates: by name: their kernels are known by the folder that they are in.
    :param budget: the memory that its domains share.
    :param warm: saved states to start from; None boots.
    """

    def __init__(
        self,
        portal: Portal,
        hypervisor: Hypervisor,
        directory: Path,
        templates: Mapping[str, Template],
        *,
        budget: MemoryBudget,
        warm: WarmStarts | None,
    ) -> None:
        self.portal = portal
        self.hypervisor = hypervisor
        self.directory = directory
        self.templates = templates
        self.warm = warm
        self.memory = LibvirtMemory(
            hypervisor, budget, counts=self._is_balanced, number=_number
        )
        self.xen = Xen(self.memory)
        #: By name of the VM; dom0 has one, too.
        self.databases: dict[str, QubesDB] = {"dom0": QubesDB()}
        self.mapper = Mapper(self.databases["dom0"])
        #: Defined or running.
        self.guests: dict[uuid.UUID, Guest] = {}
        # dom0 has a domain, too, of which a core asks for memory and devices
        config = _dom0(budget.dom0 // MIB)
        dom0 = self.guests[config.uuid] = Guest(self, config)
        dom0.state, dom0.xid = State.RUNNING, 0
        self.xen.introduce(DOM0, budget.dom0, budget.dom0)
        #: Called on the event loop.
        self.listeners: list[Callable[[Guest, Event], None]] = []
        self._xids = itertools.count(1)

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run something here for a caller in another thread, who waits for it."""
        return self.portal.run(coroutine)

    def next_xid(self) -> int:
        """Return the number of a new domain."""
        return next(self._xids)

    def find(self, name: str) -> Guest | None:
        """Return the domain of a name."""
        # at once: another thread may undefine one meanwhile
        guests = tuple(self.guests.values())
        return next((guest for guest in guests if guest.config.name == name), None)

    def journals(self) -> list[GuestJournal]:
        """Return the logs of the guests that run."""
        # at once, as above
        guests = tuple(self.guests.values())
        running = (g for g in guests if g.state is State.RUNNING)
        return [guest.journal for guest in running if guest.journal is not None]

    def tell(self, guest: Guest, event: Event) -> None:
        """Tell all who listen."""
        for listener in tuple(self.listeners):
            listener(guest, event)

    def _is_balanced(self, domain: Domain) -> bool:
        """Tell it from those of others, and from those that are not to be asked.

        What a VM holds that takes no part in balancing is known: qmemman counts what it
        was started with as its own.
        """
        parents = domain.spec.directory.parents
        ours = len(parents) > _DEPTH and parents[_DEPTH] == self.directory
        return ours and domain.spec.balanced

    async def define(self, config: DomainConfig) -> Guest:
        """Define a domain, or define it anew.

        :raise HypervisorError: another one has its name.
        """
        other = self.find(config.name)
        if other is not None and other.config.uuid != config.uuid:
            reason = f"domain {other.config.uuid} has that name"
            raise HypervisorError(config.name, "define", reason)
        guest = self.guests.get(config.uuid)
        if guest is None:
            guest = self.guests[config.uuid] = Guest(self, config)
        guest.config = config
        return guest

    def running(self, backend: str) -> Guest:
        """Return a guest that is to serve another.

        :param backend: its name.
        :raise HypervisorError: there is no such VM.
        :raise StateError: it does not run.
        """
        found = self.find(backend)
        if found is None:
            raise HypervisorError(backend, "have a device of", "there is no such VM")
        if found.state is not State.RUNNING:
            # one that is paused would answer nobody, and the other one wait for it
            reason = f"it is {found.state.name.lower()}"
            raise StateError(backend, "have a device of", reason)
        return found

    async def close(self) -> None:
        """End all guests."""
        for guest in tuple(self.guests.values())[1:]:
            try:
                await guest.destroy()
            except StateError:
                pass  # it does not run
            except HarnessError as error:
                log.warning("%s", str(error))
        self.guests.clear()


@dataclass(frozen=True, slots=True)
class _Attached:
    """A disk, or an interface, of a running domain.

    :param xml: as the core described it.
    :param export: what a disk comes from, if another VM serves it.
    """

    xml: str
    export: BlockExport | None = None


class Guest:
    """A domain that a core has defined, over any number of starts.

    :param config: what its next start takes.
    """

    def __init__(self, machine: Machine, config: DomainConfig) -> None:
        self.config = config
        self.state = State.SHUTOFF
        #: Number of its present run, -1 without one.
        self.xid = -1
        #: Of the images, bytes, as its guest sees them.
        self._sizes: dict[str, int] = {}
        #: What was attached in its present run: disks by their names, interfaces by
        #: their hardware addresses.
        self._attached: dict[str, _Attached] = {}
        self.domain: Domain | None = None
        #: Its database, while its guest runs.
        self.shared: SharedDatabase | None = None
        self.network: Network | None = None
        self._machine = machine
        #: Of its present run; None until its guest answers.
        self.journal: GuestJournal | None = None
        self._life: asyncio.Task[None] | None = None
        self._agent: asyncio.Future[GuestAgent] | None = None
        #: What is undone when it ends, by those who have made it for this run.
        self.undo = contextlib.ExitStack()

    @property
    def name(self) -> str:
        """Its name, which is that of the VM."""
        return self.config.name

    @property
    def is_active(self) -> bool:
        """Whether it runs, or is paused."""
        return self.state is not State.SHUTOFF

    def _require(self, action: str, *states: State) -> None:
        if self.state not in states:
            raise StateError(self.name, action, f"it is {self.state.name.lower()}")

    async def create(self) -> None:
        """Start it, paused.

        :raise StateError: it is active.
        :raise HypervisorError: it has a disk or a device that there cannot be.
        """
        self._require("start", State.SHUTOFF)
        if self.config.unsupported:
            devices = ", ".join(self.config.unsupported)
            raise HypervisorError(self.name, "start", f"no guest here has: {devices}")
        for disk in self.config.disks:
            if not disk.path.exists():
                reason = f"{disk.name}: there is no {disk.path}"
                raise HypervisorError(self.name, "start", reason)
            if disk.name == _PRIVATE and not disk.read_only:
                await asyncio.to_thread(_format_if_blank, disk.path)
            self._sizes[disk.name] = disk.path.stat().st_size
        machine = self._machine
        self.state, self.xid = State.PAUSED, machine.next_xid()
        timeline.note("state", self.name, state="Transient")
        store = machine.xen.store
        store.write(f"/local/domain/{self.xid}/name", self.name)
        store.write(f"/vm/{self.config.uuid}/start_time", f"{time.time():.2f}")
        sizes = self.config.memory * MIB, self.config.max_memory * MIB
        machine.xen.introduce(f"{self.xid}", *sizes)
        machine.tell(self, Event.STARTED)

    async def resume(self) -> None:
        """Let it run: its guest is started, or goes on.

        :raise StateError: it is not paused.
        """
        self._require("resume", State.PAUSED)
        if self._life is None:
            self._agent = asyncio.get_running_loop().create_future()
            self._life = asyncio.ensure_future(self._live(self._agent))
        elif self.domain is not None:
            await self.domain.resume()
            timeline.note("state", self.name, state="Running")
            self._serve_again()
        self.state = State.RUNNING
        self._machine.tell(self, Event.RESUMED)

    async def suspend(self) -> None:
        """Have its CPUs stand still.

        :raise StateError: it does not run.
        :raise HarnessError: its guest did not start.
        """
        self._require("suspend", State.RUNNING)
        await self.agent()
        if self.network is not None:
            # before its guest is: that would answer nobody
            self.network.paused = True
        try:
            if self.domain is not None:
                await self.domain.pause()
        except BaseException:
            self._serve_again()
            raise
        self.state = State.PAUSED
        timeline.note("state", self.name, state="Paused")
        self._machine.tell(self, Event.SUSPENDED)

    def _serve_again(self) -> None:
        if self.network is not None:
            self.network.paused = False
            # clients may have come and gone meanwhile
            self.network.serve_soon()

    async def destroy(self) -> None:
        """End it at once; all that follows is done on return.

        :raise StateError: it is not active.
        :raise DeadlineError: it did not end in time.
        """
        self._require("destroy", State.RUNNING, State.PAUSED)
        if self._life is None:
            self._ended()
            return
        if self.domain is None:
            self._life.cancel()
        else:
            await self.domain.destroy()
        if not (await asyncio.wait([self._life], timeout=_END))[0]:
            raise DeadlineError(f"end of domain {self.name}", _END)

    async def shutdown(self) -> None:
        """Ask its guest to power off, as `xl shutdown` does; returns at once."""
        agent = await self.agent()
        await agent.power_off()

    async def agent(self) -> GuestAgent:
        """Return the connection to its guest, when that has started.

        :raise HarnessError: it runs not, or did not start; says why.
        """
        if self._agent is None:
            raise StateError(self.name, "reach the guest of", "it does not run")
        # shielded: several wait for it, and one of them may be cancelled
        return await asyncio.shield(self._agent)

    def definition(self) -> str:
        """Return its XML, with the devices that were attached."""
        return with_devices(self.config, (x.xml for x in self._attached.values()))

    async def attach_device(self, xml: str) -> None:
        """Plug a disk or an interface in, and wait until the guest has it.

        :raise ValueError: for bad XML.
        :raise StateError: this one, or the VM that serves it, does not run.
        :raise HypervisorError: there is no such device, or no such VM.
        """
        agent = await self.agent()
        if self.domain is not None:
            await self._plug_in(self.domain, agent, xml)

    async def _plug_in(self, domain: Domain, agent: GuestAgent, xml: str) -> None:
        device = read_device(xml)
        if isinstance(device, InterfaceConfig):
            net = self._machine.running(device.backend)
            await net.agent()
            if self.network is None or net.network is None:
                reason = f"it is ending, or VM {net.name} is"
                raise StateError(self.name, "attach an interface to", reason)
            await self.network.attach(device, net.network)
            self._attached[device.mac] = _Attached(xml)
            return
        disk, backend = device
        if disk.name in self._attached:
            reason = f"it has a disk {disk.name} already"
            raise HypervisorError(self.name, "attach a disk to", reason)
        export = None
        if backend:
            served = await self._machine.running(backend).agent()
            path = self._machine.directory / f"{self.xid}-{disk.name}"
            export = BlockExport(served, str(disk.path), path, read_only=disk.read_only)
        else:
            path = self._machine.mapper.find(disk.path)
        try:
            with giving_up(export):
                await domain.attach_disk(dataclasses.replace(disk, path=path))
            try:
                await agent.wait_for_disk(disk.name, "there", timeout=_END)
            except BaseException:
                with giving_up(export):
                    await to_its_end(domain.detach_disk(disk.name))
                raise
        except BaseException:
            if export is not None:
                export.close()
            raise
        self._attached[disk.name] = _Attached(xml, export)

    async def detach_device(self, xml: str) -> None:
        """Pull a disk or an interface out, again after an error, too.

        :raise ValueError: for bad XML.
        :raise HarnessError: it has no such disk, or its guest does not let go.
        """
        device = read_device(xml)
        await self.agent()
        if isinstance(device, InterfaceConfig):
            if self.network is not None:
                await self.network.detach(device.mac)
            self._attached.pop(device.mac, None)
            return
        name = device[0].name
        attached = self._attached.get(name)
        if attached is None and all(disk.name != name for disk in self.config.disks):
            reason = f"it has no disk {name}"
            raise HypervisorError(self.name, "detach a disk from", reason)
        export = None if attached is None else attached.export
        if self.domain is not None:
            with giving_up(export):
                await self.domain.detach_disk(name)
        self._attached.pop(name, None)
        if export is not None:
            export.close()

    async def follow_sizes(self) -> None:
        """Have the guest see images that have grown.

        In dom0 the kernel sees to that, once the core tells it that a file behind a
        loop device has grown.
        """
        agent = await self.agent()
        for disk in self.config.disks:
            size = disk.path.stat().st_size
            if self.domain is not None and size > self._sizes[disk.name]:
                await self.domain.resize_disk(disk.name, size)
                await agent.wait_for_disk(disk.name, str(size), timeout=_END)
                self._sizes[disk.name] = size

    async def _boot(
        self, identity: Identity, record: StartRecord
    ) -> tuple[Domain, GuestAgent]:
        machine = self._machine
        self.domain, agent = await boot(
            machine.hypervisor,
            self._spec(),
            identity,
            timeout=time_here(_START, machine.hypervisor),
            warm=machine.warm,
            on_call=functools.partial(answer, machine),
            log=self._directory / "agent.log",
            on_step=record.part,
        )
        if agent is None:
            raise HypervisorError(self.name, "start", "it has no kernel of ours")
        return self.domain, agent

    async def _live(self, started: asyncio.Future[GuestAgent]) -> None:
        machine = self._machine
        agent = None
        try:
            database = machine.databases.get(self.name)
            if database is None:
                reason = "no qubesdb-daemon was started for it"
                raise HypervisorError(self.name, "start", reason)
            identity = self._identity(database.texts())
            begun, record = time.time(), StartRecord(self.name)
            # ends it, unless it has ended well
            self.undo.callback(record.failed)
            domain, agent = await self._boot(identity, record)
            self.network = Network(self.name, domain, agent, database)
            self.shared = SharedDatabase(
                database, agent, identity.db, follow=self.network.follow
            )
            await self.network.begin()
            for xml in self.config.borrowed:
                await self._plug_in(domain, agent, xml)
            self.journal = GuestJournal(agent, identity.init, begun)
            if timeline.follows_logs():
                self.journal.follow()
            record.succeeded()
            timeline.note("state", self.name, state="Running")
            started.set_result(agent)
            await domain.wait_stopped()
        except (HarnessError, OSError, ValueError) as error:
            log.warning("%s", str(error))
            if not started.done():
                if not isinstance(error, HarnessError):
                    error = HypervisorError(self.name, "start", str(error))
                started.set_exception(error)
        finally:
            await self._take_down(agent)
            if not started.done():
                reason = "it was destroyed before its guest had started"
                started.set_exception(StateError(self.name, "start", reason))
            started.exception()  # nobody may have waited for it
            self._ended()

    async def _take_down(self, agent: GuestAgent | None) -> None:
        network, self.network = self.network, None
        try:
            # from the last to the first, and each whatever becomes of the others: an
            # address that stays taken would keep the VM from its next start
            async with contextlib.AsyncExitStack() as undo:
                if network is not None:
                    undo.push_async_callback(network.end)
                if self.domain is not None:
                    undo.push_async_callback(self.domain.undefine)
                if agent is not None:
                    undo.push_async_callback(agent.close)
        except HarnessError as error:
            # as of a QEMU that waits for its disk, which cannot be killed: the core and
            # who waits for the guest are told of the end all the same
            log.warning("%s", str(error))

    def _ended(self) -> None:
        self.domain, self._life, self._agent = None, None, None
        self.shared, self.journal = None, None
        for device in self._attached.values():
            if device.export is not None:
                device.export.close()
        self._attached.clear()
        self.undo.close()
        self._machine.xen.release(f"{self.xid}")
        database = self._machine.databases.pop(self.name, None)
        if database is not None:
            database.disconnect()
        timeline.note("state", self.name, state="Halted")
        # last: a core looks from its own thread, and finds nothing of one that is off
        self.xid, self.state = -1, State.SHUTOFF
        self._machine.tell(self, Event.STOPPED)

    @property
    def _directory(self) -> Path:
        """Where the logs of its present run are: as those of VMs of our own core."""
        return self._machine.directory / f"{_RUN}{self.xid}" / "vms" / self.name

    def _template(self) -> Template | None:
        kernel = self.config.kernel
        if kernel is None:
            return None
        return self._machine.templates.get(kernel.parent.name)

    def _spec(self) -> DomainSpec:
        machine, config, template = self._machine, self.config, self._template()
        self._directory.mkdir(parents=True)
        return DomainSpec(
            name=config.name,
            uuid=config.uuid,
            directory=self._directory,
            memory=config.memory,
            max_memory=config.max_memory,
            # an emulated guest with two waits for one that does not get to run
            vcpus=1 if machine.hypervisor.slowness > 1 else config.vcpus,
            kernel=template.kernel if template else config.kernel,
            initramfs=template.initramfs if template else None,
            kernel_options=config.kernel_options,
            disks=config.disks,
            balanced=config.max_memory > config.memory,
        )

    def _identity(self, entries: Mapping[str, str]) -> Identity:
        disks = {disk.name: disk for disk in self.config.disks}
        template = self._template()
        root = disks.get(_ROOT)
        return Identity(
            name=self.name,
            root=_ROOT,
            private=_PRIVATE if _PRIVATE in disks else None,
            volatile=_VOLATILE if _VOLATILE in disks else None,
            root_mode="ro" if root is not None and root.read_only else "rw",
            default_user=entries.get("/default-user") or "user",
            db=entries,
            services=tuple(
                path.removeprefix(_SERVICE)
                for path, value in entries.items()
                if path.startswith(_SERVICE) and value == "1"
            ),
            init=template.init if template else "agent",
            machine_id=self.config.uuid.hex,
        )


def _number(domain: Domain) -> str:
    """Return the number of the run that a domain is of; see `Guest._directory`."""
    return domain.spec.directory.parents[_DEPTH - 1].name.removeprefix(_RUN)


def _format_if_blank(path: Path) -> None:
    """Make a filesystem on a disk, as a guest of Qubes OS does with a blank private."""
    with path.open("rb") as file:
        blank = not any(file.read(_HEAD))
        size = file.seek(0, os.SEEK_END)
    if blank and path.is_file():
        make_private(path, size)
