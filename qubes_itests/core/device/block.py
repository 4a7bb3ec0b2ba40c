"""Block devices of dom0 and of VMs, which other VMs have as disks.

Those of dom0 are in `qubes_itests.core.device.host_block`.  VMs expose what their
guests tell of; the guest serves it, and the host passes the bytes on.

Options of an attachment: ``frontend-dev``, what the guest calls the disk, by default
the first that is free from ``xvdi`` on; ``read-only``, ``yes`` or ``no``; ``devtype``,
``disk`` or ``cdrom``.
"""

from __future__ import annotations

import asyncio
import logging
import re
import string
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from qubes_itests.core.device.assignment import AssignmentMode, DeviceAssignment
from qubes_itests.core.device.block_device import (
    BLOCK_DEVICES,
    BlockDevice,
    offered,
)
from qubes_itests.core.device.host_block import HostBlockDevice, exposed
from qubes_itests.core.device.info import DeviceInfo, UnknownDevice
from qubes_itests.core.device.port import Port, VirtualDevice
from qubes_itests.core.exc import (
    DeviceAlreadyAttached,
    DeviceNotAssigned,
    QubesException,
    QubesValueError,
    QubesVMError,
    QubesVMNotRunningError,
    UnrecognizedDevice,
)
from qubes_itests.core.ext import Extension, handler
from qubes_itests.core.properties import to_bool
from qubes_itests.core.vm.adminvm import AdminVM
from qubes_itests.core.vm.qubesvm import QubesVM
from qubes_itests.exc import HarnessError
from qubes_itests.guest.link.block_export import BlockExport, giving_up
from qubes_itests.hypervisor.contract import Disk, Domain
from qubes_storage.uninterrupted import to_its_end

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from qubes_itests.core.vm.base import BaseVM

__all__ = ["BlockDeviceExtension"]

log = logging.getLogger("qubes.devices")

#: Seconds that a guest has to notice that a disk has come or gone.
_NOTICE: Final = 60.0
_FRONTEND: Final = re.compile(r"xvd[a-z]")
_LETTERS: Final = string.ascii_lowercase
#: Names of disks without `frontend-dev`: as in Qubes OS, xvdi and on come first.
_FRONTENDS: Final = [f"xvd{letter}" for letter in _LETTERS[8:] + _LETTERS[4:8]]


class BlockDeviceExtension(Extension):
    """Lists the block devices of dom0 and of VMs; attaches and detaches them."""

    def __init__(self) -> None:
        super().__init__()
        #: Those of guests that other VMs have, by those VMs and by ports.
        self._exports: dict[tuple[BaseVM, Port], BlockExport] = {}
        #: What guests have told of so far, by names.
        self._told: WeakKeyDictionary[BaseVM, frozenset[str]] = WeakKeyDictionary()
        #: Those of whose devices others are being told.
        self._followed: set[BaseVM] = set()
        #: The loop holds tasks weakly.
        self._telling: set[asyncio.Task[None]] = set()

    @handler("device-list:block")
    def on_list(self, vm: BaseVM, _event: str) -> Iterator[DeviceInfo]:
        """Yield the devices that the VM exposes."""
        yield from exposed(vm.app) if isinstance(vm, AdminVM) else offered(vm)

    @handler("device-get:block")
    def on_get(self, vm: BaseVM, _event: str, *, port_id: str) -> Iterator[DeviceInfo]:
        """Yield the device of that name, if the VM exposes it."""
        if isinstance(vm, AdminVM):
            yield from exposed(vm.app, port_id)
        else:
            yield from offered(vm, port_id)

    @handler("domain-init", "domain-load")
    def on_init(self, vm: BaseVM, _event: str) -> None:
        """Have `on_guest_change` called."""
        vm.watch_qdb_path(BLOCK_DEVICES)

    @handler(f"domain-qdb-change:{BLOCK_DEVICES}")
    def on_guest_change(self, vm: BaseVM, _event: str, **_kwargs: Any) -> None:
        """Tell of devices that have come and gone, and take these from who has them."""
        if vm not in self._followed:
            task = asyncio.ensure_future(self._follow(vm))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    async def _follow(self, vm: BaseVM) -> None:
        """Tell of changes one after the other, until there is none.

        A device that goes while it is being attached could not be detached.
        """
        if vm in self._followed:
            return
        self._followed.add(vm)
        try:
            while True:
                now = frozenset(device.port_id for device in offered(vm))
                before = self._told.get(vm, frozenset())
                if now == before:
                    return
                self._told[vm] = now
                await vm.fire_event_async("device-list-change:block")
                for name in (*sorted(before - now), *sorted(now - before)):
                    try:
                        await self._tell(Port(vm, name, "block"), gone=name in before)
                    except (HarnessError, QubesException) as error:
                        log.warning("%s", str(error))
        finally:
            self._followed.discard(vm)

    async def _tell(self, port: Port, *, gone: bool) -> None:
        vm = port.backend
        if not gone:
            for device in offered(vm, port.port_id):
                await vm.fire_event_async("device-added:block", device=device)
            return
        await vm.fire_event_async("device-removed:block", port=port)
        for other in vm.app.domains.startable():
            if port in other.devices["block"].attached:
                await self._take_away(other, port)

    async def _take_away(self, vm: QubesVM, port: Port) -> None:
        """Detach a device that is there no more, whatever requires it."""
        await self.on_pre_detach(vm, "device-pre-detach:block", port=port)
        await vm.fire_event_async("device-detach:block", port=port)

    @handler("device-list-attached:block")
    def on_list_attached(
        self, vm: BaseVM, _event: str
    ) -> Iterator[tuple[DeviceInfo, Mapping[str, str]]]:
        """Yield the devices that the VM has, with their options."""
        for port, options in list(vm.devices["block"].attached.items()):
            device = VirtualDevice(port)
            yield port.backend.devices["block"][device.port_id], dict(options)

    @handler("device-pre-attach:block")
    async def on_pre_attach(
        self, vm: QubesVM, _event: str, *, device: DeviceInfo, options: dict[str, str]
    ) -> None:
        """Plug the disk in; `options` are completed."""
        if not isinstance(device, BlockDevice):
            raise UnrecognizedDevice(f"{device} is no block device")
        if not isinstance(vm, QubesVM) or vm.domain is None:
            raise QubesVMError(vm, f"VM {vm} has no domain to attach a device to")
        if device.attachment is not None:  # since another handler waited
            raise DeviceAlreadyAttached(
                f"block device {device.port} is attached to {device.attachment} already"
            )
        options |= _completed(vm, device, options)
        attached = vm.devices["block"].attached
        # Before the guest is waited for, so that no other attachment takes the device
        # or its name meanwhile.
        attached[device.port] = options
        name, read_only = options["frontend-dev"], options["read-only"] == "yes"
        try:
            export = None
            if isinstance(device, HostBlockDevice):
                path = device.path
            else:
                export = _export(vm, device, name, read_only=read_only)
                self._exports[vm, device.port] = export
                path = export.path
            disk = Disk(name, path, read_only=read_only)
            await _plug_in(vm, vm.domain, disk, device.port, export)
        except BaseException:
            self._forget(vm, device.port)
            raise

    def _forget(self, vm: BaseVM, port: Port) -> None:
        vm.devices["block"].attached.pop(port, None)
        if export := self._exports.pop((vm, port), None):
            export.close()

    @handler("device-pre-detach:block")
    async def on_pre_detach(self, vm: QubesVM, _event: str, *, port: Port) -> None:
        """Pull the disk out."""
        options = vm.devices["block"].attached.get(port)
        domain = vm.domain if isinstance(vm, QubesVM) else None
        if options is None or domain is None:
            raise DeviceNotAssigned(f"block device {port} is not attached to VM {vm}")

        async def pull_out() -> None:
            name = options["frontend-dev"]
            with giving_up(self._exports.get((vm, port))):
                await domain.detach_disk(name)
            self._forget(vm, port)
            try:
                await _seen(vm, name, "gone")
            except HarnessError as error:
                # The host has taken the disk away: a guest that does not say so must
                # not keep the device from other VMs.
                log.warning("VM %s keeps a disk in mind: %s", vm.name, str(error))

        try:
            await to_its_end(pull_out())
        except (HarnessError, QubesException) as error:
            raise QubesVMError(
                vm, f"device {port} cannot be detached from VM {vm}: {error}"
            ) from error

    @handler("domain-pre-start")
    def on_pre_start(self, vm: QubesVM, _event: str, **_kwargs: Any) -> None:
        """Refuse to start a VM without what it requires."""
        for assignment in vm.devices["block"].get_assigned_devices(required_only=True):
            _require(vm, assignment)

    @handler("domain-spawn")
    async def on_spawn(self, vm: QubesVM, _event: str, **_kwargs: Any) -> None:
        """Attach what is assigned, the most specific assignments first."""
        assigned = vm.devices["block"].get_assigned_devices()
        for assignment in sorted(assigned, reverse=True):
            await _attach_assigned(vm, assignment)

    @handler("device-added:block")
    async def on_added(
        self, backend: BaseVM, _event: str, *, device: BlockDevice
    ) -> None:
        """Give a new device to the first running VM that waits for it."""
        for vm in backend.app.domains.startable():
            for assignment in vm.devices["block"].get_assigned_devices():
                if vm.is_running() and assignment.matches(device):
                    await _attach_assigned(vm, assignment)

    @handler("domain-shutdown", "domain-start-failed")
    async def on_end(self, vm: QubesVM, _event: str, **_kwargs: Any) -> None:
        """Forget the attachments of the run that has ended, and what it has exposed."""
        for port in list(vm.devices["block"].attached):
            self._forget(vm, port)
            await vm.fire_event_async("device-detach:block", port=port)
        await self._follow(vm)


def _export(
    vm: QubesVM, device: BlockDevice, name: str, *, read_only: bool
) -> BlockExport:
    """Have the guest serve its device for another one.

    :param vm: that is to have it.
    :param name: of the disk there.
    :raise QubesVMNotRunningError: it does not run, or not now.
    :raise QubesValueError: it is that VM itself.
    """
    backend = device.port.backend
    if backend is vm:
        # QEMU has its guest stand still until somebody answers
        raise QubesValueError(f"VM {vm} cannot have its own device {device.port}")
    if not isinstance(backend, QubesVM) or not backend.is_running():
        raise QubesVMNotRunningError(backend)
    if backend.is_paused():
        # it would answer nobody, and the other one wait for it
        reason = f"VM {backend} is paused, and cannot serve {device.port}"
        raise QubesVMNotRunningError(backend, reason)
    # short: paths of sockets are limited in length
    path = vm.app.directory / f"block-{vm.xid}-{name}"
    agent = backend.running_agent()
    return BlockExport(agent, f"/dev/{device.port_id}", path, read_only=read_only)


async def _plug_in(
    vm: QubesVM, domain: Domain, disk: Disk, port: Port, export: BlockExport | None
) -> None:
    try:
        with giving_up(export):
            # Cancelled in between, QEMU would have the disk, which nobody would know.
            await to_its_end(
                domain.attach_disk(disk),
                undo=lambda _plugged: domain.detach_disk(disk.name),
            )
        try:
            await _seen(vm, disk.name, "there")
        except BaseException:
            with giving_up(export):
                await to_its_end(domain.detach_disk(disk.name))
            raise
    except (HarnessError, QubesException) as error:
        raise QubesVMError(
            vm, f"block device {port} cannot be attached to VM {vm}: {error}"
        ) from error


async def _seen(vm: QubesVM, name: str, state: str) -> None:
    """Wait until the guest has noticed: before, a write to the name makes a plain file.

    One that is paused notices when it runs again.
    """
    if vm.agent is not None and not vm.is_paused():
        await vm.agent.wait_for_disk(name, state, timeout=_NOTICE)


def _completed(
    vm: QubesVM, device: BlockDevice, options: Mapping[str, str]
) -> dict[str, str]:
    """Return all options of an attachment; QubesValueError for an invalid one."""
    if unknown := options.keys() - {"frontend-dev", "read-only", "devtype"}:
        names = ", ".join(sorted(unknown))
        raise QubesValueError(f"block devices have no option {names}")
    kind = options.get("devtype", "disk")
    if kind not in {"cdrom", "disk"}:
        raise QubesValueError(f"option devtype takes cdrom or disk, not {kind!r}")
    # as with Xen, a guest of ours has a CD-ROM as one more disk, which is read only
    must = device.read_only or kind == "cdrom"
    read_only = to_bool(options.get("read-only", "yes" if must else "no"))
    if must and not read_only:
        what = "a CD-ROM" if kind == "cdrom" else f"block device {device.port}"
        raise QubesValueError(f"{what} can be read only")
    return {
        "frontend-dev": _frontend(vm, options.get("frontend-dev")),
        "read-only": "yes" if read_only else "no",
    }


def _frontend(vm: QubesVM, wanted: str | None) -> str:
    """Return what the guest is to call the disk."""
    used = {vm.storage.disk_name(name) for name in vm.volumes}
    used |= {o["frontend-dev"] for o in vm.devices["block"].attached.values()}
    if wanted is None:
        free = [name for name in _FRONTENDS if name not in used]
        if not free:
            raise QubesVMError(vm, f"VM {vm} has as many disks as there are names")
        return free[0]
    if not _FRONTEND.fullmatch(wanted):
        raise QubesValueError(
            f"frontend-dev cannot be {wanted!r}: it takes xvda to xvdz"
        )
    if wanted in used:
        raise QubesValueError(f"VM {vm} has a disk {wanted} already")
    return wanted


def _require(vm: QubesVM, assignment: DeviceAssignment) -> list[DeviceInfo]:
    """Return the devices of a required assignment, all of them there and free."""
    devices = assignment.devices
    if not devices or any(isinstance(d, UnknownDevice) for d in devices):
        raise UnrecognizedDevice(
            f"VM {vm} requires {assignment.devclass} device {assignment}, which is not"
            " there"
        )
    for device in devices:
        if device.attachment not in (None, vm):
            raise DeviceAlreadyAttached(
                f"VM {vm} requires {assignment.devclass} device {device.port}, which is"
                f" attached to {device.attachment}"
            )
    return devices


async def _attach_assigned(vm: QubesVM, assignment: DeviceAssignment) -> None:
    """Attach what an assignment is about; only what is required has to be possible."""
    if assignment.mode is AssignmentMode.ASK:
        log.info("device %s waits to be attached to VM %s by hand", assignment, vm.name)
        return
    required = assignment.required
    for device in _require(vm, assignment) if required else assignment.devices:
        if isinstance(device, UnknownDevice) or device.attachment is not None:
            continue
        try:
            await vm.devices["block"].attach(assignment.clone(device=device))
        except QubesException as error:
            if required:
                raise
            log.warning("VM %s goes without a device: %s", vm.name, str(error))
