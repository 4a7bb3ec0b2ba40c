r"""Ports and devices: names, and their format on the wire.

::

    Port               where: a backend VM, a class of devices, a name
    VirtualDevice      a port, and which device is expected there; ``*`` for any
     +-- DeviceInfo    a device that is there, and what is known of it
          +-- UnknownDevice    one that is not there, or of a VM that does not run
    DeviceAssignment   a device for a frontend VM, with options and a mode

The names and the format on the wire are those of Qubes OS 4.3.  A device is sent as
``key='value' key='value'``, of printable ASCII, with ``\'`` for a quotation mark.  Keys
that begin with ``_`` are options, or data of one class of devices.  Qubes OS leaves
some of that ambiguous, which is refused here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.core.exc import (
    ProtocolError,
    QubesValueError,
    UnexpectedDeviceProperty,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qubes_itests.core.domains import VMCollection
    from qubes_itests.core.vm.base import BaseVM

__all__ = ["ANY", "Port", "VirtualDevice", "check_devclass", "pack", "unpack"]

#: Stands for any port, any device, any backend.
ANY: Final = "*"

_DEVCLASS: Final = re.compile(r"[a-z][a-z0-9-]{0,31}")
_PORT: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DEVICE: Final = re.compile(r"[!-&(-\[\]-~]{1,255}")
#: Backend, port and device in an argument, which may have neither ``:`` nor ``*``.
_ARGUMENT: Final = re.compile(r"([^+]+)\+([^+:]+)\+(.+)")
_PLACEHOLDER: Final = "_"
#: The interface of a device of which nothing is known.
_NO_INTERFACE: Final = "?******"

_KEY: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_VALUE: Final = re.compile(r"[ -~]*")
#: A backslash that no quotation mark follows stands for itself.
_PAIR: Final = re.compile(
    r"([A-Za-z0-9_.-]{1,128})='((?:[^'\\]|\\'|\\(?!'))*)'(?: +|$)"
)


def check_devclass(name: str) -> None:
    """Raise QubesValueError unless a class of devices can have this name."""
    if not _DEVCLASS.fullmatch(name):
        raise QubesValueError(f"{name!r} is no class of devices")


def pack(
    properties: Mapping[str, str | None], options: Mapping[str, str] | None = None
) -> bytes:
    """Return properties and options as they are sent; None is left out.

    :raise ProtocolError: for a key or a value that cannot be sent.
    """
    pairs = {key: value for key, value in properties.items() if value is not None}
    pairs |= {f"_{key}": value for key, value in (options or {}).items()}
    return " ".join(_pair(key, str(value)) for key, value in pairs.items()).encode()


def _pair(key: str, value: str) -> str:
    if not _KEY.fullmatch(key):
        raise ProtocolError(f"{key!r} cannot be the name of a device's property")
    # with a backslash at the end, the closing mark would be taken for part of it
    if not _VALUE.fullmatch(value) or value.endswith("\\"):
        raise ProtocolError(f"{key!r} of a device cannot be {value!r}")
    quoted = value.replace("'", r"\'")
    return f"{key}='{quoted}'"


def unpack(serialization: bytes) -> tuple[dict[str, str], dict[str, str]]:
    """Return the properties and the options of what was sent.

    :raise ProtocolError: for anything that `pack` does not write, duplicates included.
    """
    try:
        text = serialization.decode("ascii").strip(" ")
    except UnicodeDecodeError as error:
        raise ProtocolError("expected the description of a device in ASCII") from error
    found: dict[str, str] = {}
    end = 0
    while end < len(text):
        pair = _PAIR.match(text, end)
        if pair is None or not _VALUE.fullmatch(pair[2]):
            raise ProtocolError(
                f"expected KEY='VALUE' at character {end} of a device's description"
            )
        key, end = pair[1], pair.end()
        if key in found:
            raise ProtocolError(f"the description of a device has {key!r} twice")
        found[key] = pair[2].replace(r"\'", "'")
    options = {k[1:]: v for k, v in found.items() if k.startswith("_")}
    return {k: v for k, v in found.items() if not k.startswith("_")}, options


@dataclass(frozen=True, eq=False, repr=False)
class Port:
    """Where a device is.

    :param backend_domain: the VM that exposes it; None for any.
    :param port_id: its name there; None or ``*`` for any.
    :param devclass: class of devices, as ``block``.
    :raise QubesValueError: for a name that no port can have.
    """

    backend_domain: BaseVM | None
    port_id: str | None = ANY
    devclass: str | None = None
    #: Whether the class was given; without one it is called ``peripheral``.
    has_devclass: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "port_id", self.port_id or ANY)
        object.__setattr__(self, "has_devclass", bool(self.devclass))
        object.__setattr__(self, "devclass", self.devclass or "peripheral")
        if self.port_id != ANY and not _PORT.fullmatch(str(self.port_id)):
            raise QubesValueError(f"{self.port_id!r} is no name of a port")
        check_devclass(str(self.devclass))

    @property
    def backend(self) -> BaseVM:
        """The VM that exposes it; QubesValueError where that may be any."""
        if self.backend_domain is None:
            raise QubesValueError(f"expected a device of one VM, got {self}")
        return self.backend_domain

    @property
    def backend_name(self) -> str:
        """Name of the VM that exposes it, or ``*``."""
        return ANY if self.backend_domain is None else self.backend_domain.name

    @property
    def _key(self) -> tuple[str, str, str]:
        return self.backend_name, str(self.devclass), str(self.port_id)

    def __eq__(self, other: object) -> bool:
        return self._key == other._key if isinstance(other, Port) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key)

    def __lt__(self, other: Port) -> bool:
        return self._key < other._key if isinstance(other, Port) else NotImplemented

    def __str__(self) -> str:
        return f"{self.backend_name}:{self.port_id}"

    def __repr__(self) -> str:
        return f"{self.backend_name}+{self.port_id}"

    @classmethod
    def from_qarg(
        cls, representation: str, devclass: str, domains: VMCollection
    ) -> Port:
        """Read ``BACKEND+PORT``, as in arguments of the Admin API."""
        return VirtualDevice.from_qarg(representation, devclass, domains).port

    @classmethod
    def from_str(
        cls, representation: str, devclass: str, domains: VMCollection
    ) -> Port:
        """Read ``BACKEND:PORT``, as users write it."""
        return VirtualDevice.from_str(representation, devclass, domains).port


class VirtualDevice:
    """A device that is expected at a port.

    :param port: where.
    :param device_id: what it says of itself; None or ``*`` for any device there.
    :raise QubesValueError: for what no device can say.
    """

    def __init__(self, port: Port, device_id: str | None = None) -> None:
        if device_id is not None and not _DEVICE.fullmatch(device_id):
            raise QubesValueError(f"{device_id!r} identifies no device")
        self.port = port
        self._device_id = device_id

    def clone(self, **changes: Any) -> VirtualDevice:
        """Return a copy, with `port` or `device_id` changed."""
        parameters: dict[str, Any] = {"port": self.port, "device_id": self.device_id}
        return VirtualDevice(**(parameters | changes))

    @property
    def device_id(self) -> str:
        """What the device says of itself, ``*`` for any."""
        return self._device_id or ANY

    @property
    def backend_domain(self) -> BaseVM | None:
        """The VM that exposes it, None for any."""
        return self.port.backend_domain

    @property
    def backend_name(self) -> str:
        """Name of the VM that exposes it, ``*`` for any."""
        return self.port.backend_name

    @property
    def port_id(self) -> str:
        """Name of the port, ``*`` for any."""
        return str(self.port.port_id)

    @property
    def devclass(self) -> str:
        """Class of the device."""
        return str(self.port.devclass)

    @property
    def description(self) -> str:
        """A short text for users."""
        return "any device" if self.device_id == ANY else self.device_id

    @property
    def _key(self) -> tuple[Any, ...]:
        """Sort the less specific first: ``*`` comes before all names."""
        return self.port_id != ANY, self.port._key, self.device_id  # noqa: SLF001

    def __eq__(self, other: object) -> bool:
        if isinstance(other, VirtualDevice):
            return (self.port, self.device_id) == (other.port, other.device_id)
        if isinstance(other, Port):
            return self.port == other and self.device_id == ANY
        return NotImplemented

    def __hash__(self) -> int:
        return hash((self.port, self.device_id))

    def __lt__(self, other: VirtualDevice) -> bool:
        return self._key < other._key

    def __str__(self) -> str:
        return f"{self.port}:{self.device_id}"

    def __repr__(self) -> str:
        return f"{self.port!r}:{self.device_id}"

    @property
    def repr_for_qarg(self) -> str:
        """As it is written in arguments of the Admin API; `from_qarg` reads it."""
        text = repr(self).replace(":", "+")
        text = text.replace(_NO_INTERFACE, _PLACEHOLDER * len(_NO_INTERFACE))
        return text.replace(ANY, _PLACEHOLDER)

    @classmethod
    def from_qarg(
        cls, representation: str, devclass: str, domains: VMCollection
    ) -> VirtualDevice:
        """Read ``BACKEND+PORT[+DEVICE]``, as in arguments of the Admin API.

        There ``+`` stands for the ``:`` of a device too, and ``_`` for a ``*``; after
        ``:`` the device is taken as it is.

        :param domains: the VMs of the app, by name.
        :raise QubesVMNotFoundError: when there is no such backend.
        :raise QubesValueError: for invalid text.
        """
        if found := _ARGUMENT.fullmatch(representation):
            backend, port_id, device_id = (
                ANY if each == _PLACEHOLDER else each for each in found.groups()
            )
            unknown = _PLACEHOLDER * len(_NO_INTERFACE)
            device_id = device_id.replace("+", ":").replace(unknown, _NO_INTERFACE)
            representation = f"{backend}+{port_id}:{device_id}"
        return cls._read(representation, "+", devclass, domains)

    @classmethod
    def from_str(
        cls, representation: str, devclass: str, domains: VMCollection
    ) -> VirtualDevice:
        """Read ``BACKEND:PORT[:DEVICE]``, as users write it; see `from_qarg`."""
        return cls._read(representation, ":", devclass, domains)

    @classmethod
    def _read(
        cls, representation: str, separator: str, devclass: str, domains: VMCollection
    ) -> VirtualDevice:
        backend, found, rest = representation.partition(separator)
        if not found:
            raise QubesValueError(
                f"{representation!r} names no device: it takes BACKEND{separator}PORT"
            )
        port_id, colon, device_id = rest.partition(":")
        if not port_id or (colon and not device_id):
            raise QubesValueError(f"{representation!r} names no device")
        domain = None if backend == ANY else domains[backend]
        return VirtualDevice(Port(domain, port_id, devclass), device_id or None)

    @property
    def basic_properties(self) -> dict[str, str]:
        """What is sent of every device."""
        return {
            "device_id": self.device_id,
            "port_id": self.port_id,
            "devclass": self.devclass,
            "backend_domain": self.backend_name,
        }

    def serialize(self) -> bytes:
        """Return it as it is sent over the Admin API."""
        return pack(self.basic_properties)

    def accept(self, properties: dict[str, str]) -> VirtualDevice:
        """Take the basic properties out of what was received, and return the device.

        :raise UnexpectedDeviceProperty: when one of them contradicts this device.
        """
        port, device_id = self.port, self.device_id
        for name, expected in self.basic_properties.items():
            found = properties.pop(name, expected)
            if name == "device_id" and expected == ANY:
                device_id = found
            elif name == "devclass" and not self.port.has_devclass:
                port = Port(port.backend_domain, port.port_id, found)
            elif found != expected:
                raise UnexpectedDeviceProperty(
                    f"{name} of the device is {found!r}, not {expected!r}"
                )
        return VirtualDevice(port, device_id)
