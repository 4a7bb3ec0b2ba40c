"""What a device is: its interfaces, and the categories that users know."""

from __future__ import annotations

import enum
import re
from typing import Final

from qubes_itests.core.exc import QubesValueError

__all__ = ["DeviceCategory", "DeviceInterface"]

_CLASSES: Final = {"p": "pci", "u": "usb", "b": "block", "m": "mic"}
#: Of class, subclass and protocol together.
_DIGITS: Final = 6
_NUMBERS: Final = re.compile(r"[0-9A-Fa-f*]{6}")
#: As lenient as Qubes OS: what else a device says matches no category.
_ENCODING: Final = re.compile(r"[ -&(-\[\]-~]{7}")


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
