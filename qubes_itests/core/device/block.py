"""Block devices: dom0 exposes images, running VMs have them as disks.

Options of an attachment: ``frontend-dev``, what the guest calls the disk, by default
the first that is free from ``xvdi`` on; ``read-only``, ``yes`` or ``no``; ``devtype``,
``disk`` or ``cdrom``.
"""

from __future__ import annotations

import logging
import re
import string
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.core.device.assignment import AssignmentMode, DeviceAssignment
from qubes_itests.core.device.block_images import BlockDevice, exposed
from qubes_itests.core.device.info import UnknownDevice
from qubes_itests.core.exc import (
    DeviceAlreadyAttached,
    DeviceNotAssigned,
    QubesException,
    QubesValueError,
    QubesVMError,
    UnrecognizedDevice,
)
from qubes_itests.core.ext import Extension, handler
from qubes_itests.core.properties import to_bool
from qubes_itests.exc import HarnessError
from qubes_itests.hypervisor.contract import Disk
from qubes_storage.uninterrupted import to_its_end

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from qubes_itests.core.device.info import DeviceInfo
    from qubes_itests.core.device.port import Port

__all__ = ["BlockDeviceExtension"]

log = logging.getLogger("qubes.devices")

#: Seconds that a guest has to notice that a disk has come or gone.
_NOTICE: Final = 60.0
_FRONTEND: Final = re.compile(r"xvd[a-z]")
_LETTERS: Final = string.ascii_lowercase
#: What a disk is called that nobody names: as in Qubes OS, xvdi and on come first.
_FRONTENDS: Final = [f"xvd{letter}" for letter in _LETTERS[8:] + _LETTERS[4:8]]


class BlockDeviceExtension(Extension):
    """Lists the block devices of dom0; attaches and detaches them."""

    @handler("device-list:block")
    def on_list(self, vm: Any, _event: str) -> Iterator[DeviceInfo]:
        """Yield the devices that dom0 exposes; other VMs expose none."""
        if vm.klass == "AdminVM":
            yield from exposed(vm.app)

    @handler("device-get:block")
    def on_get(self, vm: Any, _event: str, *, port_id: str) -> Iterator[DeviceInfo]:
        """Yield the device of that name, if dom0 exposes it."""
        if vm.klass == "AdminVM":
            yield from exposed(vm.app, port_id)

    @handler("device-list-attached:block")
    def on_list_attached(
        self, vm: Any, _event: str
    ) -> Iterator[tuple[DeviceInfo, Mapping[str, str]]]:
        """Yield the devices that the VM has, with their options."""
        for port, options in list(vm.devices["block"].attached.items()):
            yield port.backend_domain.devices["block"][port.port_id], dict(options)

    @handler("device-pre-attach:block")
    async def on_pre_attach(
        self, vm: Any, _event: str, *, device: DeviceInfo, options: dict[str, str]
    ) -> None:
        """Plug the disk in; `options` are completed."""
        if not isinstance(device, BlockDevice):
            raise UnrecognizedDevice(f"{device} is no block device")
        if getattr(vm, "domain", None) is None:
            raise QubesVMError(vm, f"VM {vm} has no domain to attach a device to")
        if device.attachment is not None:  # since another handler waited
            raise DeviceAlreadyAttached(
                f"block device {device.port} is attached to {device.attachment} already"
            )
        options |= _completed(vm, device, options)
        attached = vm.devices["block"].attached
        # at once, so that neither device nor name is given away meanwhile
        attached[device.port] = options
        read_only = options["read-only"] == "yes"
        disk = Disk(options["frontend-dev"], device.path, read_only=read_only)
        try:
            await _plug_in(vm, disk)
        except BaseException:
            attached.pop(device.port, None)
            raise

    @handler("device-pre-detach:block")
    async def on_pre_detach(self, vm: Any, _event: str, *, port: Port) -> None:
        """Pull the disk out."""
        options = vm.devices["block"].attached.get(port)
        if options is None:
            raise DeviceNotAssigned(f"block device {port} is not attached to VM {vm}")

        async def pull_out() -> None:
            name = options["frontend-dev"]
            await vm.domain.detach_disk(name)
            vm.devices["block"].attached.pop(port, None)
            try:
                await _seen(vm, name, "gone")
            except HarnessError as error:
                # to the host it is, whatever the guest says
                log.warning("VM %s keeps a disk in mind: %s", vm.name, str(error))

        try:
            await to_its_end(pull_out())
        except (HarnessError, QubesException) as error:
            raise QubesVMError(
                vm, f"device {port} cannot be detached from VM {vm}: {error}"
            ) from error

    @handler("domain-pre-start")
    def on_pre_start(self, vm: Any, _event: str, **_kwargs: Any) -> None:
        """Refuse to start a VM without what it requires."""
        for assignment in vm.devices["block"].get_assigned_devices(required_only=True):
            _require(vm, assignment)

    @handler("domain-spawn")
    async def on_spawn(self, vm: Any, _event: str, **_kwargs: Any) -> None:
        """Attach what is assigned, the most specific assignments first."""
        assigned = vm.devices["block"].get_assigned_devices()
        for assignment in sorted(assigned, reverse=True):
            await _attach_assigned(vm, assignment)

    @handler("device-added:block")
    async def on_added(self, backend: Any, _event: str, *, device: BlockDevice) -> None:
        """Give a new device to the first running VM that waits for it."""
        for vm in backend.app.domains:
            for assignment in vm.devices["block"].get_assigned_devices():
                if vm.is_running() and assignment.matches(device):
                    await _attach_assigned(vm, assignment)

    @handler("domain-shutdown", "domain-start-failed")
    async def on_end(self, vm: Any, _event: str, **_kwargs: Any) -> None:
        """Forget the attachments of the run that has ended."""
        attached = vm.devices["block"].attached
        for port in list(attached):
            del attached[port]
            await vm.fire_event_async("device-detach:block", port=port)


async def _plug_in(vm: Any, disk: Disk) -> None:
    try:
        await to_its_end(
            vm.domain.attach_disk(disk),
            undo=lambda _plugged: vm.domain.detach_disk(disk.name),
        )
        try:
            await _seen(vm, disk.name, "there")
        except BaseException:
            await to_its_end(vm.domain.detach_disk(disk.name))
            raise
    except (HarnessError, QubesException) as error:
        raise QubesVMError(
            vm, f"{disk.path.name} cannot be attached to VM {vm}: {error}"
        ) from error


async def _seen(vm: Any, name: str, state: str) -> None:
    """Wait until the guest has noticed: who uses it at once would make a plain file.

    One that is paused notices when it runs again.
    """
    if vm.agent is not None and not vm.is_paused():
        await vm.agent.wait_for_disk(name, state, timeout=_NOTICE)


def _completed(
    vm: Any, device: BlockDevice, options: Mapping[str, str]
) -> dict[str, str]:
    """Return all options of an attachment; QubesValueError for one that cannot be."""
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


def _frontend(vm: Any, wanted: str | None) -> str:
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


def _require(vm: Any, assignment: DeviceAssignment) -> list[DeviceInfo]:
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


async def _attach_assigned(vm: Any, assignment: DeviceAssignment) -> None:
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
