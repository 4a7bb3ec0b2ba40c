"""Devices: their descriptions, interfaces and categories."""

from __future__ import annotations

import enum
import logging
import re
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.core.device.port import ANY, Port, VirtualDevice, pack, unpack
from qubes_itests.core.exc import ProtocolError, QubesException, QubesValueError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qubes_itests.core.vm.base import BaseVM

__all__ = ["DeviceCategory", "DeviceInfo", "DeviceInterface", "UnknownDevice"]

log = logging.getLogger("qubes.devices")

_CLASSES: Final = {"p": "pci", "u": "usb", "b": "block", "m": "mic"}
#: Of class, subclass and protocol together.
_DIGITS: Final = 6
_NUMBERS: Final = re.compile(r"[0-9A-Fa-f*]{6}")
#: As lenient as Qubes OS: what else a device says matches no category.
_ENCODING: Final = re.compile(r"[ -&(-\[\]-~]{7}")

_UNKNOWN: Final = "unknown"
_DESCRIPTIONS: Final = ("vendor", "product", "manufacturer", "name", "serial")
#: The device_id of a device that says nothing of itself.
_NO_DEVICE: Final = "0000:0000::?******"


class DeviceCategory(enum.Enum):
    """Kinds of devices that matter to users, as patterns of interfaces."""

    Other = ("*******",)
    Network = ("u02****", "p0703**", "p02****", "ue0****")
    Keyboard = ("u03**01", "p0900**")
    Mouse = ("u03**02", "p0902**")
    Input = ("u03****", "p09****")
    Printer = ("u07****",)
    Camera = ("p0903**", "u06****", "u0e****")
    Microphone = ("m******",)
    Audio = ("p0403**", "p0401**", "p0408**", "u01****", "m******")
    Multimedia = ("u10****", "p03****", "p04****")
    USB_Storage = ("u08****",)
    Block_Storage = ("b******",)
    Storage = ("b******", "u08****", "p01****")
    Bluetooth = ("ue00101", "p0d11**")
    Smart_Card_Readers = ("u0b****",)
    Display = ("p0300**", "p0380**")
    Memory = ("p05****",)
    PCI_Bridge = ("p06****",)
    Docking_Station = ("p0a****",)
    Processor = ("p0b****", "p40****")
    PCI_Serial_Bus = ("p0c****",)
    PCI_USB = ("p0c03**",)

    @classmethod
    def from_str(cls, interface_encoding: str) -> DeviceCategory:
        """Return the category with the most specific pattern that matches."""
        best, category = 0, cls.Other
        for candidate in cls:
            for pattern in candidate.value:
                score = _score(pattern, interface_encoding)
                if score > best:
                    best, category = score, candidate
        return category


def _score(pattern: str, encoding: str) -> int:
    """Return how many characters are the same; 0 when one contradicts the pattern."""
    score = 0
    for expected, found in zip(pattern, encoding, strict=True):
        if expected == found:
            score += 1
        elif expected != "*":
            return 0
    return score


class DeviceInterface:
    """One interface of a device: letter of its class, then class, subclass, protocol.

    What is missing at the end is filled up with ``*``.

    :param interface_encoding: seven characters, as ``u030102`` or ``b******``; without
        the letter if `devclass` is given, or if the class is not known.
    :param devclass: class of the device.
    :raise QubesValueError: when it is no such encoding.
    """

    def __init__(self, interface_encoding: str, devclass: str | None = None) -> None:
        padded = interface_encoding.ljust(_DIGITS, "*")
        if devclass is not None:
            if not _NUMBERS.fullmatch(padded):
                raise QubesValueError(
                    f"{interface_encoding!r} is no interface of a {devclass} device:"
                    f" it takes {_DIGITS} hexadecimal digits"
                )
            padded = devclass[:1].lower() + padded
        elif len(padded) == _DIGITS:
            padded = f"?{padded}"
        if not _ENCODING.fullmatch(padded):
            raise QubesValueError(f"{interface_encoding!r} is no interface of a device")
        self._encoding = padded
        self._devclass = devclass or _CLASSES.get(padded[0])

    @classmethod
    def unknown(cls) -> DeviceInterface:
        """Return the interface of a device of which nothing is known."""
        return cls("?******")

    @classmethod
    def from_str_bulk(cls, interfaces: str | None) -> list[DeviceInterface]:
        """Return the interfaces of encodings without anything between them.

        :raise QubesValueError: when one of them is no encoding.
        """
        encoded, each = interfaces or "", _DIGITS + 1
        if len(encoded) % each:
            raise QubesValueError(
                f"{interfaces!r} is no list of interfaces: each has {each} characters"
            )
        return [cls(encoded[n : n + each]) for n in range(0, len(encoded), each)]

    @property
    def devclass(self) -> str | None:
        """Class of the device, None if unknown."""
        return self._devclass

    @property
    def category(self) -> DeviceCategory:
        """What users know it as."""
        return DeviceCategory.from_str(self._encoding)

    def matches(self, other: DeviceInterface) -> bool:
        """Tell whether another one is within this pattern."""
        pairs = zip(self._encoding, other._encoding, strict=True)
        return all(pattern in ("*", found) for pattern, found in pairs)

    def __repr__(self) -> str:
        return self._encoding

    def __hash__(self) -> int:
        return hash(self._encoding)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, DeviceInterface):
            return self._encoding == other._encoding
        return NotImplemented

    def __str__(self) -> str:
        names = {"block": "Block Device", "mic": "Microphone"}
        return names.get(self.devclass or "", self._encoding)


class DeviceInfo(VirtualDevice):
    """A device, and what is known of it.

    Subclasses override properties by what they find out when they are asked.

    :param port: where it is.
    :param vendor: as a database of vendors has it.
    :param product: as a database of products has it.
    :param manufacturer: as it says itself.
    :param name: as it says itself.
    :param serial: as it says itself.
    :param interfaces: what it is.
    :param parent: the device that it is a part of, or its port.
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
        interfaces: Iterable[DeviceInterface] | None = None,
        parent: Port | VirtualDevice | None = None,
        attachment: BaseVM | None = None,
        device_id: str | None = None,
        **data: str,
    ) -> None:
        super().__init__(port, device_id)
        # With these names subclasses fill in what they find out later.
        self._vendor = vendor
        self._product = product
        self._manufacturer = manufacturer
        self._name = name
        self._serial = serial
        self._interfaces: list[DeviceInterface] | None = list(interfaces or ()) or None
        self._parent = parent
        self._attachment = attachment
        self.data = data

    @property
    def device_id(self) -> str:
        """What the device says of itself."""
        return self._device_id or _NO_DEVICE

    @property
    def vendor(self) -> str:
        """As a database of vendors has it, ``unknown`` if it has not."""
        return self._vendor or _UNKNOWN

    @property
    def product(self) -> str:
        """As a database of products has it, ``unknown`` if it has not."""
        return self._product or _UNKNOWN

    @property
    def manufacturer(self) -> str:
        """As the device says itself, ``unknown`` if it does not."""
        return self._manufacturer or _UNKNOWN

    @property
    def name(self) -> str:
        """As the device says itself, ``unknown`` if it does not."""
        return self._name or _UNKNOWN

    @property
    def serial(self) -> str:
        """As the device says itself, ``unknown`` if it does not."""
        return self._serial or _UNKNOWN

    @property
    def interfaces(self) -> list[DeviceInterface]:
        """What it is: one interface at least."""
        return self._interfaces or [DeviceInterface.unknown()]

    @property
    def parent_device(self) -> Port | VirtualDevice | None:
        """What it is a part of, None for nothing."""
        return self._parent

    @property
    def attachment(self) -> BaseVM | None:
        """The VM that has it now, None for none."""
        return self._attachment

    @property
    def subdevices(self) -> list[DeviceInfo]:
        """The devices that are parts of this one, of the same class."""
        exposed = self.port.backend.devices[self.devclass]
        return [
            dev
            for dev in exposed
            if dev.parent_device is not None
            and (dev.parent_device.devclass, dev.parent_device.port_id)
            == (self.devclass, self.port_id)
        ]

    @property
    def description(self) -> str:
        """A short text for users: what kind, whose, which."""
        known = [getattr(self, field) for field in ("product", "name", "serial")]
        which = next((text for text in known if text != _UNKNOWN), None)
        whose = next(
            (t for t in (self.vendor, self.manufacturer) if t != _UNKNOWN),
            "unknown vendor",
        )
        kind = next(
            (i.category.name for i in self.interfaces if i.category.name != "Other"),
            str(self.interfaces[0]),
        )
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
        return pack(properties, self.data)

    @classmethod
    def deserialize(
        cls,
        serialization: bytes,
        expected_backend_domain: BaseVM,
        expected_devclass: str | None = None,
    ) -> DeviceInfo:
        """Read a line of ``admin.vm.device.CLASS.Available``.

        What it says of itself is not trusted: a device of which nothing can be made is
        an unknown one.

        :param serialization: the port, a blank, and what `serialize` wrote.
        :param expected_backend_domain: the VM that was asked.
        :param expected_devclass: the class that was asked for, None for any.
        :raise QubesValueError: when not even the port can be.
        """
        head, _, rest = serialization.partition(b" ")
        port_id, _, device_id = head.decode("ascii", "replace").partition(":")
        port = Port(expected_backend_domain, port_id, expected_devclass)
        expected = VirtualDevice(port, device_id or None)
        try:
            return cls._from_said(rest, expected)
        except (
            ProtocolError,
            QubesException,
            ValueError,
            LookupError,
            TypeError,
        ) as error:
            log.warning(
                "the description of %s is not valid: %s", str(expected), str(error)
            )
            return UnknownDevice.from_device(expected)

    @classmethod
    def _from_said(cls, serialization: bytes, expected: VirtualDevice) -> DeviceInfo:
        properties, data = unpack(serialization)
        device = expected.accept(properties)
        options: dict[str, Any] = {
            field: properties.pop(field)
            for field in _DESCRIPTIONS
            if field in properties
        }
        if attachment := properties.pop("attachment", ""):
            options["attachment"] = device.port.backend.app.domains[attachment]
        encoded = properties.pop("interfaces", "")
        options["interfaces"] = DeviceInterface.from_str_bulk(encoded)
        if "parent_port_id" in properties:
            options["parent"] = Port(
                device.backend_domain,
                properties.pop("parent_port_id"),
                properties.pop("parent_devclass", None),
            )
        if properties:
            raise ProtocolError(f"a device has no {', '.join(sorted(properties))}")
        info = cls(device.port, device_id=device.device_id, **options)
        info.data = data
        return info


class UnknownDevice(DeviceInfo):
    """A device that is not there, or of which nothing can be known now."""

    @classmethod
    def from_device(cls, device: VirtualDevice) -> UnknownDevice:
        """Return the unknown device of a port."""
        known = None if device.device_id == ANY else device.device_id
        return cls(device.port, device_id=known)
