"""What is known of a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from qubes_itests.core import device_serialization
from qubes_itests.core.device_interface import DeviceInterface
from qubes_itests.core.device_protocol import ANY, Port, VirtualDevice
from qubes_itests.core.exc import ProtocolError, QubesException

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["DeviceInfo", "UnknownDevice"]

_UNKNOWN: Final = "unknown"
_DESCRIPTIONS: Final = ("vendor", "product", "manufacturer", "name", "serial")
_INTERFACE_LENGTH: Final = 7


class DeviceInfo(VirtualDevice):
    """A device, and what is known of it.

    :param port: where it is.
    :param vendor: as a database of vendors has it.
    :param product: as a database of products has it.
    :param manufacturer: as it says itself.
    :param name: as it says itself.
    :param serial: as it says itself.
    :param interfaces: what it is.
    :param parent: the port of the device that it is a part of.
    :param attachment: the VM that has it now.
    :param device_id: what it says of itself.
    :param data: what devices of its class have besides.
    """

    def __init__(
        self,
        port: Port,
        *,
        vendor: str | None = None,
        product: str | None = None,
        manufacturer: str | None = None,
        name: str | None = None,
        serial: str | None = None,
        interfaces: Iterable[DeviceInterface] = (),
        parent: Port | None = None,
        attachment: Any = None,
        device_id: str | None = None,
        **data: str,
    ) -> None:
        super().__init__(port, device_id or "0000:0000::?******")
        self.vendor = vendor or _UNKNOWN
        self.product = product or _UNKNOWN
        self.manufacturer = manufacturer or _UNKNOWN
        self.name = name or _UNKNOWN
        self.serial = serial or _UNKNOWN
        self.interfaces = list(interfaces) or [DeviceInterface.unknown()]
        self.parent_device = parent
        self._attachment = attachment
        self.data = data

    @property
    def attachment(self) -> Any:
        """The VM that has it now, None for none."""
        return self._attachment

    @property
    def subdevices(self) -> list[DeviceInfo]:
        """The devices that are parts of this one, of the same class."""
        exposed = self.backend_domain.devices[self.devclass]
        return [dev for dev in exposed if dev.parent_device == self.port]

    @property
    def description(self) -> str:
        """A short text for users: what kind, whose, which."""
        known = [getattr(self, field) for field in ("product", "name", "serial")]
        which = next((text for text in known if text != _UNKNOWN), None)
        whose = next(
            (t for t in (self.vendor, self.manufacturer) if t != _UNKNOWN),
            "unknown vendor",
        )
        category = self.interfaces[0].category.name
        kind = str(self.interfaces[0]) if category == "Other" else category
        return f"{kind}: {whose} {which or f'unknown {self.devclass} device'}"

    def serialize(self) -> bytes:
        """Return it as it is sent over the Admin API."""
        properties: dict[str, str | None] = dict(self.basic_properties)
        described = {field: getattr(self, field) for field in _DESCRIPTIONS}
        properties |= {k: v for k, v in described.items() if v != _UNKNOWN}
        if self.attachment is not None:
            properties["attachment"] = self.attachment.name
        properties["interfaces"] = "".join(map(repr, self.interfaces))
        if self.parent_device is not None:
            properties["parent_port_id"] = self.parent_device.port_id
            properties["parent_devclass"] = self.parent_device.devclass
        return device_serialization.pack(properties, self.data)

    @classmethod
    def deserialize(
        cls, serialization: bytes, expected_device: VirtualDevice
    ) -> DeviceInfo:
        """Read what `serialize` wrote.

        :param expected_device: the device that it has to be about.
        :raise ProtocolError: for what cannot be, or is about another device.
        """
        properties, data = device_serialization.unpack(serialization)
        try:
            device = expected_device.accept(properties)
            options = _read(device, properties)
        except ProtocolError:
            raise
        except (QubesException, ValueError, AttributeError) as error:
            raise ProtocolError(str(error)) from error
        if properties:
            raise ProtocolError(f"a device has no {', '.join(sorted(properties))}")
        info = DeviceInfo(device.port, device_id=device.device_id, **options)
        info.data = data
        return info


def _read(device: VirtualDevice, properties: dict[str, str]) -> dict[str, Any]:
    """Take the parameters of a DeviceInfo out of what was received."""
    options: dict[str, Any] = {
        field: properties.pop(field) for field in _DESCRIPTIONS if field in properties
    }
    if "attachment" in properties:
        domains = device.backend_domain.app.domains
        options["attachment"] = domains[properties.pop("attachment")]
    encoded = properties.pop("interfaces", "")
    options["interfaces"] = [
        DeviceInterface(encoded[start : start + _INTERFACE_LENGTH])
        for start in range(0, len(encoded), _INTERFACE_LENGTH)
    ]
    if "parent_port_id" in properties:
        options["parent"] = Port(
            device.backend_domain,
            properties.pop("parent_port_id"),
            properties.pop("parent_devclass", None),
        )
    return options


class UnknownDevice(DeviceInfo):
    """A device that is not there, or of which nothing can be known now."""

    @classmethod
    def from_device(cls, device: VirtualDevice) -> UnknownDevice:
        """Return the unknown device of a port."""
        known = None if device.device_id == ANY else device.device_id
        return cls(device.port, device_id=known)
