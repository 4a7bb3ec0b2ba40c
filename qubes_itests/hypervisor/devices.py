"""Devices of a running domain: what is there, plugging and pulling."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import libvirt

from qubes_itests.exc import DeadlineError
from qubes_itests.hypervisor.contract import Disk, Interface
from qubes_itests.hypervisor.domain_xml import SPARE_PORTS
from qubes_itests.hypervisor.exc import HypervisorError

if TYPE_CHECKING:
    from qubes_itests.hypervisor.connection import Connection

__all__ = ["LiveDevices", "find_device", "plugged_in"]

#: Seconds that a guest may take to let go of a device.
_RELEASE = 10.0
_POLL = 0.02

_KEYS = {"disk": ("serial", None), "interface": ("mac", "address")}


def find_device(xml: str, kind: str, key: str) -> ET.Element | None:
    """Return a device's element of a live definition.

    :param kind: ``disk`` or ``interface``.
    :param key: a disk's name, an interface's address.
    """
    tag, attribute = _KEYS[kind]
    # The text is libvirt's own, not the guest's.
    for element in ET.fromstring(xml).iterfind(f"devices/{kind}"):  # noqa: S314
        found = element.find(tag)
        if found is not None:
            value = found.text if attribute is None else found.get(attribute)
            if value == key:
                return element
    return None


def plugged_in(xml: str) -> tuple[tuple[Disk, ...], tuple[Interface, ...]]:
    """Return the disks and interfaces of a live definition, in places that they keep.

    :raise ValueError: for one that a new domain would have elsewhere.
    """
    devices = ET.fromstring(xml).find("devices")  # noqa: S314 - libvirt's own
    if devices is None:
        return (), ()
    disks = tuple(_disk(element) for element in devices.iterfind("disk"))
    return disks, tuple(
        _interface(element) for element in devices.iterfind("interface")
    )


def _disk(element: ET.Element) -> Disk:
    name, path = element.findtext("serial", ""), _attribute(element, "source", "file")
    path = path or _attribute(element, "source", "dev")
    path = path or _attribute(element, "source/host", "socket")
    return Disk(name, Path(path), read_only=element.find("readonly") is not None)


def _interface(element: ET.Element) -> Interface:
    mac, place = _attribute(element, "mac", "address"), 0
    if _attribute(element, "address", "type") == "pci":
        place = int(_attribute(element, "address", "bus"), 16)
    if not 0 < place <= SPARE_PORTS:
        raise ValueError(f"interface {mac} is in no place for interfaces")
    bridge = _attribute(element, "source", "bridge")
    tap = "" if bridge else _attribute(element, "target", "dev")
    return Interface(mac, bridge=bridge, tap=tap, place=place)


def _attribute(element: ET.Element, tag: str, name: str) -> str:
    found = element.find(tag)
    return "" if found is None else found.get(name, "")


class LiveDevices:
    """The devices of one running domain, as libvirt sees them now."""

    def __init__(self, connection: Connection, domain: str, native: Any) -> None:
        self._connection = connection
        self._domain = domain
        self._native = native

    async def _find(self, kind: str, key: str) -> ET.Element | None:
        xml = await self._connection.call(self._domain, "ask", self._native.XMLDesc)
        return find_device(xml, kind, key)

    async def attach(self, kind: str, key: str, xml: str) -> None:
        """Plug in the device that `xml` describes.

        :raise HypervisorError: when it is there; libvirt would take an interface's
            address twice, and could pull out neither then.
        """
        action = f"attach {kind} {key} to"
        if await self._find(kind, key) is not None:
            raise HypervisorError(self._domain, action, "it is attached already")
        flags = libvirt.VIR_DOMAIN_AFFECT_LIVE
        await self._connection.call(
            self._domain, action, self._native.attachDeviceFlags, xml, flags
        )

    async def detach(self, kind: str, key: str) -> None:
        """Pull a device out; done when the guest has let go of it."""
        element = await self._find(kind, key)
        if element is None:
            return
        xml = ET.tostring(element, encoding="unicode")
        action, flags = f"detach {kind} {key} from", libvirt.VIR_DOMAIN_AFFECT_LIVE
        await self._connection.call(
            self._domain, action, self._native.detachDeviceFlags, xml, flags
        )
        # libvirt has only asked the guest. The file behind the disk may be used by
        # somebody else, or be removed, when the guest has let go of it, not before.
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _RELEASE
        while await self._find(kind, key) is not None:
            if loop.time() > deadline:
                raise DeadlineError(
                    f"release of {kind} {key} by domain {self._domain!r}",
                    _RELEASE,
                    "the guest still has it",
                )
            await asyncio.sleep(_POLL)

    async def resize(self, name: str, size: int) -> None:
        """Tell the guest a disk's new size in bytes."""
        action = f"resize disk {name} of"
        element = await self._find("disk", name)
        target = None if element is None else element.find("target")
        if target is None:
            raise HypervisorError(self._domain, action, f"it has no disk {name}")
        flags = libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES
        await self._connection.call(
            self._domain,
            action,
            self._native.blockResize,
            target.get("dev"),
            size,
            flags,
        )
