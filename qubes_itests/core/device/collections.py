"""The devices of a VM: those that it exposes, has, and is to have.

What a device is, and how one gets to a VM, is known by the extension of its class.  It
answers to events of the VM:

- ``device-list:CLASS``: return the devices (`DeviceInfo`) that the VM exposes;
- ``device-get:CLASS`` (`port_id`): return the one at that port, if any;
- ``device-list-attached:CLASS``: return the devices that the VM has, each with the
  options of its attachment;
- ``device-pre-attach:CLASS`` (`device`, `options`) and ``device-pre-detach:CLASS``
  (`port`): attach, detach, or veto;
- ``device-pre-assign:CLASS`` (`device`, `options`): veto.

``device-attach``, ``device-detach`` (`port`), ``device-assign``, ``device-unassign``
and ``device-assignment-changed`` (`device`) follow; ``device-added`` (`device`) and
``device-removed`` (`port`) are fired on the VM that exposes a device.  Those that list
are plain functions, the others may be asynchronous.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qubes_itests.core.device.assignment import AssignmentMode, DeviceAssignment
from qubes_itests.core.device.info import DeviceInfo, UnknownDevice
from qubes_itests.core.device.port import Port, VirtualDevice, check_devclass
from qubes_itests.core.exc import (
    DeviceAlreadyAssigned,
    DeviceAlreadyAttached,
    DeviceNotAssigned,
    ProtocolError,
    QubesValueError,
    QubesVMNotHaltedError,
    QubesVMNotRunningError,
    UnrecognizedDevice,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qubes_itests.core.vm.base import BaseVM

__all__ = ["DEVICE_CLASSES", "DeviceCollection", "DeviceManager"]

#: The classes of devices that there are; others may be added by extensions.
DEVICE_CLASSES: Final = ["block", "pci"]


def _accept(_backend: object) -> None:
    """Accept the devices of any VM."""


class DeviceCollection:
    """The devices of one class of one VM; iterating gives those that it exposes.

    :param vm: the VM.
    :param devclass: the class.
    :param check_backend: raises for a VM whose devices cannot be assigned now.
    """

    def __init__(
        self,
        vm: BaseVM,
        devclass: str,
        check_backend: Callable[[BaseVM], None] = _accept,
    ) -> None:
        self._vm = vm
        self._check_backend = check_backend
        self.devclass = devclass
        #: Under the name that it has in Qubes OS, where tests look at it.
        self._set: dict[VirtualDevice, DeviceAssignment] = {}
        #: What the extension of the class has attached in this run, with options.
        self.attached: dict[Port, dict[str, str]] = {}

    def _check_class(self, assignment: DeviceAssignment) -> None:
        if assignment.devclass != self.devclass:
            raise ProtocolError(
                f"{assignment} is a {assignment.devclass} device,"
                f" not a {self.devclass} device"
            )

    async def attach(self, assignment: DeviceAssignment) -> None:
        """Give the running VM a device now, until it shuts down.

        :param assignment: the device, and the options of its class.
        :raise QubesVMNotRunningError: when the VM is halted.
        :raise UnrecognizedDevice: when the device is not there.
        :raise DeviceAlreadyAttached: when a VM has it.
        """
        self._check_class(assignment)
        if self._vm.is_halted():
            raise QubesVMNotRunningError(
                self._vm,
                f"VM {self._vm} is not running: start it first, or assign the device",
            )
        device = assignment.device
        if isinstance(device, UnknownDevice) or not assignment.matches(device):
            exposed = device.port.backend.devices[self.devclass]
            raise UnrecognizedDevice(
                f"there is no {self.devclass} device {assignment}:"
                f" {device.backend_name} exposes"
                f" {', '.join(d.port_id for d in exposed) or 'none'}"
            )
        having = device.attachment
        # The device need not know who has it: some extensions keep that with the VM.
        if any(
            device.port == attached.port for attached in self.get_attached_devices()
        ):
            having = self._vm
        if having is not None:
            raise DeviceAlreadyAttached(
                f"{self.devclass} device {device.port} is attached to {having} already"
            )
        options = dict(assignment.options)
        await self._vm.fire_event_async(
            f"device-pre-attach:{self.devclass}",
            pre_event=True,
            device=device,
            options=options,
        )
        await self._vm.fire_event_async(
            f"device-attach:{self.devclass}", device=device, options=options
        )

    async def detach(self, port: Port | VirtualDevice | DeviceAssignment) -> None:
        """Take a device from the VM.

        :param port: where it is.
        :raise DeviceNotAssigned: when the VM does not have it.
        :raise QubesVMNotHaltedError: when it is required while the VM runs.
        """
        where = port if isinstance(port, Port) else port.port
        attached = next(
            (a for a in self.get_attached_devices() if a.port == where), None
        )
        if attached is None:
            raise DeviceNotAssigned(
                f"{self.devclass} device {where} is not attached to VM {self._vm}"
            )
        for assignment in self.get_assigned_devices(required_only=True):
            if assignment.matches(attached.virtual_device):
                raise QubesVMNotHaltedError(
                    self._vm,
                    f"{self.devclass} device {where} is required by VM {self._vm},"
                    " which runs: shut it down, or unassign the device first",
                )
        await self._vm.fire_event_async(
            f"device-pre-detach:{self.devclass}", pre_event=True, port=where
        )
        await self._vm.fire_event_async(f"device-detach:{self.devclass}", port=where)

    async def assign(self, assignment: DeviceAssignment) -> None:
        """Have the VM get a device at each of its starts; nothing is attached now.

        :param assignment: the device, the options of its class, and a mode other than
            manual.
        :raise DeviceAlreadyAssigned: when that was done before.
        """
        self._check_class(assignment)
        if not assignment.attach_automatically:
            raise QubesValueError(
                f"device {assignment} cannot be assigned with mode 'manual':"
                " it takes ask-to-attach, auto-attach or required"
            )
        self._check_not_assigned(assignment)
        device, options = assignment.virtual_device, dict(assignment.options)
        await self._vm.fire_event_async(
            f"device-pre-assign:{self.devclass}",
            pre_event=True,
            device=device,
            options=options,
        )
        # Again: while a handler waited, another call may have assigned the device.
        self._check_not_assigned(assignment)
        if (backend := assignment.backend_domain) is not None:
            self._check_backend(backend)
        self._remember(assignment)
        await self._vm.fire_event_async(
            f"device-assign:{self.devclass}", device=device, options=options
        )

    def _check_not_assigned(self, assignment: DeviceAssignment) -> None:
        if assignment.virtual_device in self._set:
            raise DeviceAlreadyAssigned(
                f"{self.devclass} device {assignment} is assigned to VM {self._vm}"
                " already"
            )

    def _remember(self, assignment: DeviceAssignment) -> None:
        copy = assignment.clone(frontend_domain=self._vm)
        self._set[copy.virtual_device] = copy

    def load_assignment(self, assignment: DeviceAssignment) -> None:
        """Take an assignment from the store: no check, no event."""
        self._remember(assignment)

    def _find(self, device: VirtualDevice | DeviceAssignment) -> DeviceAssignment:
        known = VirtualDevice(device.port, device.device_id)
        if known not in self._set:
            raise DeviceNotAssigned(
                f"{self.devclass} device {device} is not assigned to VM {self._vm}"
            )
        return self._set[known]

    async def update_assignment(
        self, device: VirtualDevice, mode: str | AssignmentMode
    ) -> None:
        """Change the mode of an assignment; its options stay.

        :raise DeviceNotAssigned: when there is none of that device.
        """
        mode = AssignmentMode(mode)
        if mode is AssignmentMode.MANUAL:
            raise QubesValueError("the mode of an assignment cannot become 'manual'")
        assignment = self._find(device)
        if assignment.mode is mode:
            return
        await self._vm.fire_event_async(
            f"device-pre-assign:{self.devclass}",
            pre_event=True,
            device=assignment.virtual_device,
            options=dict(assignment.options),
        )
        # Looked up again: a handler may have waited, and it may be unassigned by now.
        self._remember(self._find(device).clone(mode=mode))
        await self._vm.fire_event_async(
            f"device-assignment-changed:{self.devclass}",
            device=assignment.virtual_device,
        )

    async def unassign(self, assignment: DeviceAssignment | VirtualDevice) -> None:
        """Undo `assign`; what is attached stays so until the VM shuts down.

        :raise DeviceNotAssigned: when there is no such assignment.
        """
        device = self._find(assignment).virtual_device
        del self._set[device]
        await self._vm.fire_event_async(
            f"device-unassign:{self.devclass}", device=device
        )

    def get_dedicated_devices(self) -> Iterator[DeviceAssignment]:
        """Yield what the VM has and what it is to have; the same may come twice."""
        yield from self.get_attached_devices()
        yield from self.get_assigned_devices()

    def get_attached_devices(self) -> Iterator[DeviceAssignment]:
        """Yield what the VM has now, with the options that it was attached with."""
        attached = self._vm.fire_event(f"device-list-attached:{self.devclass}")
        for device, options in attached:
            assigned = [a for a in self.get_assigned_devices() if a.matches(device)]
            mode = max(assigned).mode if assigned else AssignmentMode.MANUAL
            yield DeviceAssignment(device, self._vm, options, mode)

    def get_assigned_devices(
        self, *, required_only: bool = False
    ) -> Iterator[DeviceAssignment]:
        """Yield what the VM is to have when it runs.

        :param required_only: only that which it cannot start without.
        """
        for assignment in list(self._set.values()):
            if assignment.required or not required_only:
                yield assignment

    def get_exposed_devices(self) -> Iterator[DeviceInfo]:
        """Yield the devices that the VM exposes to others."""
        yield from self._vm.fire_event(f"device-list:{self.devclass}")

    __iter__ = get_exposed_devices

    def __getitem__(self, port_id: str) -> DeviceInfo:
        """Return the device that the VM exposes at a port; an unknown one if none."""
        found = self._vm.fire_event(f"device-get:{self.devclass}", port_id=port_id)
        if found:
            device: DeviceInfo = found[0]
            return device
        return UnknownDevice(Port(self._vm, port_id, self.devclass))


class DeviceManager(dict[str, DeviceCollection]):  # its name in Qubes OS
    """The devices of a VM, by class.

    :param vm: the VM.
    :param check_backend: as for `DeviceCollection`.
    """

    def __init__(
        self, vm: BaseVM, check_backend: Callable[[BaseVM], None] = _accept
    ) -> None:
        super().__init__()
        self._vm = vm
        self._check_backend = check_backend

    def __missing__(self, devclass: str) -> DeviceCollection:
        check_devclass(devclass)
        self[devclass] = DeviceCollection(self._vm, devclass, self._check_backend)
        return self[devclass]
