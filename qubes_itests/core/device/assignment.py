"""Assignments: devices that a VM has, or is to have."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

from qubes_itests.core.device.port import ANY, Port, VirtualDevice, pack, unpack
from qubes_itests.core.exc import ProtocolError, QubesException
from qubes_itests.core.store.document import check_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qubes_itests.core.device.info import DeviceInfo
    from qubes_itests.core.vm.base import BaseVM

__all__ = ["AssignmentMode", "DeviceAssignment"]


class AssignmentMode(enum.Enum):
    """What happens to an assigned device when its frontend VM starts."""

    MANUAL = "manual"
    ASK = "ask-to-attach"
    AUTO = "auto-attach"
    REQUIRED = "required"


class DeviceAssignment:
    """A device for a frontend VM: one that is attached, or is to be.

    :param device: the device, or a pattern for several.
    :param frontend_domain: the VM that has it, or is to have it.
    :param options: how it is attached; strings by names, which its class knows.
    :param mode: what happens at the frontend's start; a mode or its value.
    """

    def __init__(
        self,
        device: VirtualDevice,
        frontend_domain: BaseVM | None = None,
        options: Mapping[str, Any] | None = None,
        mode: str | AssignmentMode = AssignmentMode.MANUAL,
    ) -> None:
        self.virtual_device = VirtualDevice(device.port, device.device_id)
        self.frontend_domain = frontend_domain
        self.options = {
            check_text(name): check_text(str(value))
            for name, value in (options or {}).items()
        }
        self.mode = AssignmentMode(mode)

    @classmethod
    def new(
        cls,
        backend_domain: BaseVM | None,
        port_id: str,
        devclass: str,
        device_id: str | None = None,
        **options: Any,
    ) -> DeviceAssignment:
        """Return an assignment of what is, or will be, at a port.

        :param options: the other parameters of the class.
        """
        port = Port(backend_domain, port_id, devclass)
        return cls(VirtualDevice(port, device_id), **options)

    def clone(self, **changes: Any) -> DeviceAssignment:
        """Return a copy, with some of the parameters changed."""
        parameters = {
            "device": self.virtual_device,
            "frontend_domain": self.frontend_domain,
            "options": self.options,
            "mode": self.mode,
        }
        return DeviceAssignment(**(parameters | changes))

    @property
    def port(self) -> Port:
        """Where the device is."""
        return self.virtual_device.port

    @property
    def device_id(self) -> str:
        """What the device says of itself, ``*`` for any."""
        return self.virtual_device.device_id

    @property
    def backend_domain(self) -> BaseVM | None:
        """The VM that exposes the device, None for any."""
        return self.virtual_device.backend_domain

    @property
    def backend_name(self) -> str:
        """Name of the VM that exposes the device, ``*`` for any."""
        return self.virtual_device.backend_name

    @property
    def port_id(self) -> str:
        """Name of the port, ``*`` for any."""
        return self.virtual_device.port_id

    @property
    def devclass(self) -> str:
        """Class of the device."""
        return self.virtual_device.devclass

    @property
    def devices(self) -> list[DeviceInfo]:
        """The devices that it is about; one at a named port may be unknown."""
        if self.backend_domain is None:
            return []
        exposed = self.backend_domain.devices[self.devclass]
        if self.port_id != ANY:
            return [exposed[self.port_id]]
        return [dev for dev in exposed if self.matches(dev)]

    @property
    def device(self) -> DeviceInfo:
        """The one device that it is about; ProtocolError when that is none, or more."""
        devices = self.devices
        if len(devices) != 1:
            some = "several devices are" if devices else "no device is"
            raise ProtocolError(f"{some} {self.devclass} device {self}")
        return devices[0]

    @property
    def attached(self) -> bool:
        """Whether the frontend has the device now."""
        return self.frontend_domain is not None and any(
            device.attachment == self.frontend_domain for device in self.devices
        )

    @property
    def required(self) -> bool:
        """Whether the frontend cannot start without it."""
        return self.mode is AssignmentMode.REQUIRED

    @property
    def attach_automatically(self) -> bool:
        """Whether it is more than a record of what was attached by hand."""
        return self.mode is not AssignmentMode.MANUAL

    def matches(self, device: VirtualDevice) -> bool:
        """Tell whether a device is one of those that it is about."""
        return (
            self.devclass == device.devclass
            and self.backend_domain in (None, device.backend_domain)
            and self.port_id in (ANY, device.port_id)
            and self.device_id in (ANY, device.device_id)
        )

    def __eq__(self, other: object) -> bool:
        if isinstance(other, (VirtualDevice, DeviceAssignment)):
            return (self.port, self.device_id) == (other.port, other.device_id)
        return NotImplemented

    def __hash__(self) -> int:
        return hash(self.virtual_device)

    def __lt__(self, other: DeviceAssignment) -> bool:
        return self.virtual_device < other.virtual_device

    def __str__(self) -> str:
        return str(self.virtual_device)

    def __repr__(self) -> str:
        return repr(self.virtual_device)

    @property
    def repr_for_qarg(self) -> str:
        """As it is written in arguments of the Admin API."""
        return self.virtual_device.repr_for_qarg

    def serialize(self) -> bytes:
        """Return it as it is sent over the Admin API."""
        frontend = None if self.frontend_domain is None else self.frontend_domain.name
        properties: dict[str, str | None] = {
            **self.virtual_device.basic_properties,
            "mode": self.mode.value,
            "frontend_domain": frontend,
        }
        return pack(properties, self.options)

    @classmethod
    def deserialize(
        cls, serialization: bytes, expected_device: VirtualDevice
    ) -> DeviceAssignment:
        """Read what `serialize` wrote.

        :param expected_device: the device that it has to be about.
        :raise ProtocolError: for invalid data, or data about another device.
        """
        properties, options = unpack(serialization)
        try:
            device = expected_device.accept(properties)
            mode = AssignmentMode(properties.pop("mode", "manual"))
            frontend = None
            if (name := properties.pop("frontend_domain", None)) is not None:
                frontend = expected_device.port.backend.app.domains[name]
        except (QubesException, ValueError) as error:
            raise ProtocolError(str(error)) from error
        if properties:
            raise ProtocolError(f"an assignment has no {', '.join(sorted(properties))}")
        return cls(device, frontend, options, mode)
