"""Domains of libvirt's QEMU driver: one QEMU process each, while they run."""

# ruff: noqa: D102 - the contract documents its methods
from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import libvirt

from qubes_itests.exc import DeadlineError
from qubes_itests.hypervisor.adoption import AdoptedDomain, exchange_disks
from qubes_itests.hypervisor.console import Console
from qubes_itests.hypervisor.contract import DomainState, LifecycleEvent
from qubes_itests.hypervisor.devices import LiveDevices, plugged_in
from qubes_itests.hypervisor.domain import LibvirtDomain
from qubes_itests.hypervisor.domain_xml import (
    Machine,
    channel_path,
    console_pipe,
    disk_xml,
    domain_xml,
    interface_xml,
)
from qubes_itests.hypervisor.exc import (
    HypervisorError,
    SavedStateError,
    StateError,
)
from qubes_itests.hypervisor.monitor import Monitor
from qubes_itests.hypervisor.qemu_process import (
    have_killed_first,
    kill_qemu,
    memory_of,
)
from qubes_itests.hypervisor.saved_state import (
    SavedState,
    make_memory_file,
    memory_file,
    save_state,
)
from qubes_storage.uninterrupted import to_its_end

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from qubes_itests.hypervisor.connection import Connection
    from qubes_itests.hypervisor.contract import (
        Disk,
        Domain,
        DomainSpec,
        Interface,
    )

__all__ = ["QemuDomain"]

_RETRY = 0.01
#: What libvirt has QEMU call the socket of a domain's only port.
_CHANNEL = "charchannel0"
#: Seconds in which a clone must let itself be adopted; a few hundredths if it can.
_ANSWER = 5.0
#: Seconds within which libvirt forgets a domain that has ended; a few milliseconds.
_FORGETTING = 10.0
#: What it says until then. The error has no number of its own.
_BEING_REMOVED = "is already being removed"
#: Bytes; the largest unit in which file systems write past the page cache.
_WHOLE_BLOCK = 4096
#: Bytes; that in which a kernel image counts its set-up code.
_SETUP_UNIT = 512


class QemuDomain(LibvirtDomain):
    """One QEMU process, while it runs.

    :param machine: what it has in common with its hypervisor's other domains.
    :param root: libvirt's directory.
    """

    def __init__(
        self,
        connection: Connection,
        spec: DomainSpec,
        publish: Callable[[LibvirtDomain, LifecycleEvent], None],
        forget: Callable[[Domain], None],
        *,
        machine: Machine,
        root: Path,
    ) -> None:
        super().__init__(connection, spec, publish, forget)
        self._machine = machine
        self._root = root
        #: What its memory is in if it will be saved.
        self._memory_file: Path | None = None
        #: Of the channel that was opened last, and of one that ends with the agent.
        self._channel: asyncio.Transport | None = None
        self._ending_channel: asyncio.Transport | None = None
        self._asking: asyncio.Task[None] | None = None
        self.console = Console(spec.name, console_pipe(spec), self.console_log())

    def console_log(self) -> Path:
        return self.spec.directory / "console.log"

    def _describe(self) -> str:
        return domain_xml(self.spec, self._machine)

    async def _create(
        self,
        saved_state: Path | None,
        saved_disks: tuple[str, ...],
        to_save: Path | None,
    ) -> None:
        await asyncio.to_thread(self.console.open)
        if saved_state is not None:
            disks = tuple(disk for disk in self.spec.disks if disk.name in saved_disks)
            spec = replace(self.spec, disks=disks, interfaces=())
            await self._load(saved_state, spec, frozen=False)
            return
        if to_save is not None and self._machine.memory_library is not None:
            # To its end: the thread cannot be stopped, and who has made it removes it.
            await to_its_end(self._make_memory(memory_file(to_save)))
        xml = await asyncio.to_thread(
            self._definition, self.spec, memory=self._memory_file
        )
        await self._create_native(xml, 0)

    async def _make_memory(self, file: Path) -> None:
        try:
            await asyncio.to_thread(make_memory_file, file, self.spec.max_memory << 20)
        except OSError as error:
            raise HypervisorError(self.spec.name, "start", str(error)) from error
        self._memory_file = file

    async def _load(self, saved_state: Path, spec: DomainSpec, *, frozen: bool) -> None:
        with SavedState(self.spec.name, saved_state) as state:
            if frozen and state.memory is not None:
                reason = "a frozen domain has all of its memory with it"
                raise SavedStateError(self.spec.name, "thaw", reason)

            def describe() -> str:
                kernel = spec.kernel
                if kernel is not None:
                    kernel = setup_part(kernel, self._root)
                return self._definition(
                    replace(spec, kernel=kernel), "defer", memory=state.memory
                )

            xml = await asyncio.to_thread(describe)
            try:
                await self._create_native(xml, libvirt.VIR_DOMAIN_START_PAUSED)
            except HypervisorError as error:
                # QEMU may not take the memory; a cold start does without. Whatever else
                # is wrong would be with that as well, and is no fault of the state.
                if "backing store" not in error.reason:
                    raise
                raise SavedStateError(self.spec.name, "start", error.reason) from error
            await state.load(self._connection, self._native, run=not frozen)

    def _definition(
        self,
        spec: DomainSpec,
        incoming: str | None = None,
        *,
        memory: Path | None = None,
    ) -> str:
        direct = frozenset(d.name for d in spec.disks if _opens_direct(d.path))
        return domain_xml(
            spec,
            self._machine,
            direct_disks=direct,
            incoming=incoming,
            memory_file=memory,
        )

    @property
    def _pid_file(self) -> Path:
        return self._root / "run" / "qemu" / f"{self.libvirt_name}.pid"

    def memory_held(self) -> int:
        return memory_of(self._pid_file)

    async def _create_native(self, xml: str, flags: int) -> None:
        def start() -> object:
            native: object = self._connection.native.createXML(xml, flags)
            have_killed_first(self._pid_file)
            return native

        async def create() -> None:
            name = self.spec.name
            loop = asyncio.get_running_loop()
            deadline = loop.time() + _FORGETTING
            while True:
                try:
                    self._native = await self._connection.call_to_end(
                        name, "start", start
                    )
                except HypervisorError as error:
                    # libvirt tells of the end of a domain before it has forgotten it,
                    # and tells nobody when it has: it can only be asked again.
                    if _BEING_REMOVED not in error.reason or loop.time() > deadline:
                        raise
                else:
                    return
                await asyncio.sleep(_RETRY)

        # The thread cannot be stopped: wait, for what it makes must be undone.
        await to_its_end(create())

    async def _cleanup(self) -> None:
        # the console first: its log is whole only when QEMU's end of the pipe is read
        await asyncio.to_thread(self.console.close)
        await asyncio.to_thread(channel_path(self.spec).unlink, missing_ok=True)
        if self._memory_file is not None:
            await asyncio.to_thread(self._memory_file.unlink, missing_ok=True)
            self._memory_file = None

    async def _pull_plug(self) -> None:
        await asyncio.to_thread(kill_qemu, self._pid_file, self.libvirt_name)

    def _showed_panic(self) -> bool:
        return self.console.panicked

    def distrust_console(self) -> None:
        self.console.trusted = False

    async def save(self, path: Path) -> None:
        # nothing may start or destroy the domain while QEMU writes; and it is stopped
        # in any case, for after a migration its CPUs must not run on
        async with self._changing:
            native = self._running("save")
            if self._memory_file not in (None, memory_file(path)):
                where = f"it was started to be saved beside {self._memory_file}"
                raise HypervisorError(self.spec.name, "save", where)
            try:
                await save_state(
                    self._connection, self.spec.name, native, path, self._memory_file
                )
                self._memory_file = None  # it is the state's
            finally:
                await self._stop()

    async def freeze(self, path: Path) -> DomainSpec:
        native = self._running("freeze")
        if (state := await self.state()) is not DomainState.PAUSED:
            raise StateError(self.spec.name, "freeze", f"it is {state.value}")
        xml = await self._call("freeze", native.XMLDesc)
        try:
            disks, interfaces = plugged_in(xml)
        except ValueError as error:
            raise HypervisorError(self.spec.name, "freeze", str(error)) from error
        await save_state(self._connection, self.spec.name, native, path)
        return replace(self.spec, disks=disks, interfaces=interfaces)

    async def thaw(self, path: Path) -> None:
        async def create() -> None:
            await asyncio.to_thread(self.console.open)
            await self._load(path, self.spec, frozen=True)

        await self._begin(create, loading=True)
        self._announce_paused()

    async def adopt(self, clone: Domain) -> None:
        assert isinstance(clone, QemuDomain)  # noqa: S101 - a back end has its own alone
        own = self.console

        async def take() -> None:
            native = await clone.hand_over(self)
            # Its end, which may come at any moment, has us forget it.
            adopted = self._native = AdoptedDomain(native, clone.spec, self.spec)
            self.console = clone.console
            await asyncio.to_thread(self._take_files, clone.spec)
            disks = {
                disk.name: (disk, await asyncio.to_thread(_opens_direct, disk.path))
                for disk in self.spec.disks
            }
            monitor = Monitor(self._connection, self.spec.name, adopted)
            try:
                async with asyncio.timeout(_ANSWER):
                    await exchange_disks(monitor, clone.spec.disks, disks)
                    await self._call("start", adopted.resume)
            except TimeoutError:
                raise HypervisorError(
                    self.spec.name, "start", f"no answer within {_ANSWER:g} s"
                ) from None

        try:
            # To its end: of what is half one's and half another's nobody is left.
            await self._begin(lambda: to_its_end(take()), loading=True)
        except BaseException as error:
            # The clone's has been closed, and is where the clone was, or half here.
            self.console = own
            if isinstance(error, OSError):
                raise HypervisorError(self.spec.name, "start", str(error)) from error
            raise
        self._announced = LifecycleEvent.STARTED
        self._publish(self, LifecycleEvent.STARTED)

    def _take_files(self, clone: DomainSpec) -> None:
        """Move a clone's console and channel to where they are looked for. Blocking."""
        self.console.move(self.spec.name, console_pipe(self.spec), self.console_log())
        channel_path(clone).rename(channel_path(self.spec))

    async def open_channel(
        self, protocol: Callable[[], asyncio.BaseProtocol], *, timeout: float = 10.0
    ) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
        path = str(channel_path(self.spec))
        deadline = asyncio.get_running_loop().time() + timeout
        while True:
            # each time, or a domain that has stopped would be waited for to the end
            self._running("open the channel of")
            try:
                loop = asyncio.get_running_loop()
                opened = await loop.create_unix_connection(protocol, path)
            except OSError as error:
                if loop.time() > deadline:
                    raise DeadlineError(
                        f"channel of domain {self.spec.name!r}", timeout, str(error)
                    ) from error
            else:
                self._channel = opened[0]
                return opened
            await asyncio.sleep(_RETRY)

    def end_channel_with_agent(self) -> None:
        self._ending_channel = self._channel

    def handle_closed_port(self) -> None:
        """Take note that the guest has closed its side; call it on the event loop."""
        if self._ending_channel is not None:
            self._asking = asyncio.ensure_future(self._end_channel())

    async def _end_channel(self) -> None:
        channel, action = self._ending_channel, "look at the channel of"
        try:
            native = self._running(action)
            monitor = Monitor(self._connection, self.spec.name, native)
            devices = await monitor.execute(action, "query-chardev")
        except HypervisorError:
            return  # it has ended, and so has the channel
        # What libvirt tells may be late, by more than a start takes: by now the next
        # agent has opened it.
        is_open = any(d["label"] == _CHANNEL and d["frontend-open"] for d in devices)
        if channel is not None and not is_open:
            # what is on its way is read still
            with contextlib.suppress(OSError):
                channel.get_extra_info("socket").shutdown(socket.SHUT_RD)

    def _devices(self, action: str) -> LiveDevices:
        native = self._running(action)
        return LiveDevices(self._connection, self.spec.name, native)

    async def attach_disk(self, disk: Disk) -> None:
        direct = await asyncio.to_thread(_opens_direct, disk.path)
        xml = disk_xml(disk, direct=direct)
        await self._devices("attach a disk to").attach("disk", disk.name, xml)

    async def detach_disk(self, name: str) -> None:
        await self._devices("detach a disk from").detach("disk", name)

    async def resize_disk(self, name: str, size: int) -> None:
        await self._devices("resize a disk of").resize(name, size)

    async def attach_interface(self, interface: Interface) -> None:
        devices = self._devices("attach an interface to")
        await devices.attach("interface", interface.mac, interface_xml(interface))

    async def detach_interface(self, mac: str) -> None:
        await self._devices("detach an interface from").detach("interface", mac)


def setup_part(kernel: Path, directory: Path) -> Path:
    """Return a kernel image cut down to what QEMU itself looks at. Blocking.

    A guest that loads a state does not boot; and QEMU keeps a copy of the image in its
    memory, which is more than an idle guest has of its own.

    :param directory: where the image is made, once.
    """
    with kernel.open("rb") as file:
        head = file.read(_SETUP_UNIT * 2)
        if head[0x202:0x206] != b"HdrS":  # no bzImage
            return kernel
        status = os.fstat(file.fileno())
        cut = directory / f"setup-{status.st_ino}-{status.st_mtime_ns}"
        if not cut.exists():
            # the first byte of the kernel proper is what QEMU insists on
            size = (1 + (head[0x1F1] or 4)) * _SETUP_UNIT + 1
            temporary = cut.with_suffix(f".{threading.get_ident()}")
            temporary.write_bytes(head + file.read(size - len(head)))
            temporary.replace(cut)
    return cut


def _opens_direct(path: Path) -> bool:
    """Tell whether a file can be opened past the page cache.

    tmpfs refuses, and what is behind a socket has no file.  QEMU refuses a file whose
    last block is not whole, for it would have to write more than there is: a size in
    GB, as client tools give it, is such a size.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        return error.errno not in (errno.EINVAL, errno.ENXIO)
    try:
        return os.lseek(file, 0, os.SEEK_END) % _WHOLE_BLOCK == 0
    finally:
        os.close(file)
