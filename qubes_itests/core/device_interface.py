"""What a device is: its interfaces, and the categories that users know."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Final

from qubes_itests.core.exc import QubesValueError

__all__ = ["DeviceCategory", "DeviceInterface"]

_CLASSES: Final = {"p": "pci", "u": "usb", "b": "block", "m": "mic"}
_ENCODING: Final = re.compile(r"[a-z?][0-9a-f*]{6}")


class DeviceCategory(enum.Enum):
    """Kinds of devices that matter to users, as patterns of interfaces."""

    Other = ("*******",)
    Communication = ("u02****", "p07****")
    Input = ("u03****", "p09****")
    Keyboard = ("u03**01", "p0900**")
    Mouse = ("u03**02", "p0902**")
    Printer = ("u07****",)
    Scanner = ("p0903**",)
    Microphone = ("m******",)
    Multimedia = ("u01****", "u0e****", "u06****", "u10****", "p03****", "p04****")
    Wireless = ("ue0****", "p0d****")
    Bluetooth = ("ue00101", "p0d11**")
    Mass_Data = ("b******", "u08****", "p01****")
    Network = ("p02****",)
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


@dataclass(frozen=True)
class DeviceInterface:
    """One interface of a device: letter of its class, then class, subclass, protocol.

    :param encoding: seven characters, as ``u030102`` or ``b******``.
    :raise QubesValueError: when it is no such encoding.
    """

    encoding: str

    def __post_init__(self) -> None:
        if not _ENCODING.fullmatch(self.encoding):
            raise QubesValueError(f"{self.encoding!r} is no interface of a device")

    @classmethod
    def unknown(cls) -> DeviceInterface:
        """Return the interface of a device of which nothing is known."""
        return cls("?******")

    @property
    def devclass(self) -> str | None:
        """Class of the device, None if unknown."""
        return _CLASSES.get(self.encoding[0])

    @property
    def category(self) -> DeviceCategory:
        """What users know it as."""
        return DeviceCategory.from_str(self.encoding)

    def matches(self, other: DeviceInterface) -> bool:
        """Tell whether another one is within this pattern."""
        pairs = zip(self.encoding, other.encoding, strict=True)
        return all(pattern in ("*", found) for pattern, found in pairs)

    def __repr__(self) -> str:
        return self.encoding

    def __str__(self) -> str:
        names = {"block": "Block Device", "mic": "Microphone"}
        return names.get(self.devclass or "", self.encoding)
