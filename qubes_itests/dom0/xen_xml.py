"""The Xen XML that a core renders, read."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import TYPE_CHECKING, Final
from xml.etree import ElementTree as ET

from qubes_itests.hypervisor.contract import Disk

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "DomainConfig",
    "InterfaceConfig",
    "read_device",
    "read_domain",
    "with_devices",
]

#: Of a unit that libvirt knows, so many bytes.
_UNITS: Final = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
#: Devices that a guest here has of its own, or goes without.
_IGNORED: Final = ("console", "emulator", "input", "video", "graphics", "sound")
#: What a guest here may call a disk.
_NAME: Final = re.compile("xvd[a-z]")
_MAC: Final = re.compile("[0-9a-f]{2}(:[0-9a-f]{2}){5}")


@dataclass(frozen=True, slots=True)
class InterfaceConfig:
    """What a core says of an interface of a VM.

    :param mac: hardware address, in lower case.
    :param ip: the VM's own.
    :param ip6: the same of IPv6, None if it has none.
    :param backend: name of the net VM.
    """

    mac: str
    ip: IPv4Address
    ip6: IPv6Address | None
    backend: str


@dataclass(frozen=True, slots=True)
class DomainConfig:
    """What a core says of a domain.

    :param memory: at its start, MiB.
    :param max_memory: to which its balloon may grow, MiB.
    :param kernel: on the host; None for a guest that boots from its disk.
    :param kernel_options: its command line.
    :param disks: of dom0, in the order of the XML.
    :param borrowed: XML of what other VMs serve: their disks, and interfaces.
    :param xml: the text that it was read from.
    :param unsupported: elements below ``devices`` that no guest here can have.
    """

    name: str
    uuid: uuid.UUID
    memory: int
    max_memory: int
    vcpus: int
    kernel: Path | None
    disks: tuple[Disk, ...]
    xml: str
    kernel_options: str = ""
    unsupported: tuple[str, ...] = ()
    borrowed: tuple[str, ...] = ()


def read_domain(text: str) -> DomainConfig:
    """Read the definition of a domain.

    :raise ValueError: it is no XML, or lacks what each domain has.
    """
    root = _parse(text, "domain")
    memory = _mebibytes(root, "currentMemory") or _mebibytes(root, "memory")
    kernel = root.findtext("os/kernel")
    devices = [
        element for element in root.iterfind("devices/*") if element.tag not in _IGNORED
    ]
    disks = [element for element in devices if element.tag == "disk"]
    borrowed = [e for e in devices if e.tag == "interface" or _is_borrowed_disk(e)]
    others = {element.tag for element in devices} - {"disk", "interface"}
    return DomainConfig(
        name=_text(root, "name"),
        uuid=uuid.UUID(_text(root, "uuid")),
        memory=memory,
        max_memory=max(
            memory, _mebibytes(root, "memory"), _mebibytes(root, "maxMemory")
        ),
        vcpus=int(_text(root, "vcpu")),
        kernel=Path(kernel) if kernel else None,
        disks=tuple(_disk(element) for element in disks if not _backend(element)),
        borrowed=tuple(
            ET.tostring(element, encoding="unicode") for element in borrowed
        ),
        xml=text,
        # without the identity: a guest is told that later, and one that was saved for
        # any VM has none
        kernel_options=" ".join(
            word
            for word in root.findtext("os/cmdline", "").split()
            if not word.startswith("systemd.machine_id=")
        ),
        unsupported=tuple(sorted(others)),
    )


def read_device(text: str) -> tuple[Disk, str] | InterfaceConfig:
    """Read a device that is attached or detached.

    :return: an interface; or a disk, and the name of the VM whose device it is, empty
        for dom0.
    :raise ValueError: it is neither.
    """
    element = _parse(text, "disk", "interface")
    if element.tag == "interface":
        return _interface(element)
    return _disk(element), _backend(element)


def with_devices(config: DomainConfig, added: Iterable[str]) -> str:
    """Return the definition of a running domain: what it has of dom0, and more devices.

    :param added: XML of what has been attached, that of other VMs from the start
        included.
    """
    root = _parse(config.xml, "domain")
    devices = root.find("devices")
    if devices is None:
        devices = ET.SubElement(root, "devices")
    for element in tuple(devices):
        if element.tag == "interface" or _is_borrowed_disk(element):
            devices.remove(element)
    devices.extend(_parse(text, "disk", "interface") for text in added)
    return ET.tostring(root, encoding="unicode")


def _is_borrowed_disk(element: ET.Element) -> bool:
    return element.tag == "disk" and bool(_backend(element))


def _interface(element: ET.Element) -> InterfaceConfig:
    mac = element.find("mac")
    address = "" if mac is None else mac.get("address", "").lower()
    backend = _backend(element)
    if not _MAC.fullmatch(address) or not backend:
        raise ValueError(
            "expected an interface with mac and backenddomain,"
            f" got {address!r}, {backend!r}"
        )
    ips = {e.get("family", "ipv4"): e.get("address", "") for e in element.iter("ip")}
    ip6 = ips.get("ipv6")
    return InterfaceConfig(
        mac=address,
        ip=IPv4Address(ips.get("ipv4", "")),
        ip6=IPv6Address(ip6) if ip6 else None,
        backend=backend,
    )


def _parse(text: str, *tags: str) -> ET.Element:
    try:
        root = ET.fromstring(text)  # noqa: S314 - the core's own
    except ET.ParseError as error:
        raise ValueError(f"expected XML, got {text[:80]!r}: {error}") from None
    if root.tag not in tags:
        raise ValueError(f"expected <{'> or <'.join(tags)}>, got <{root.tag}>")
    return root


def _disk(element: ET.Element) -> Disk:
    source, target = element.find("source"), element.find("target")
    path = "" if source is None else source.get("dev") or source.get("file") or ""
    name = "" if target is None else target.get("dev", "")
    if not path or not name:
        raise ValueError(
            f"expected a disk with source and target, got {path!r}, {name!r}"
        )
    if not _NAME.fullmatch(name):
        raise ValueError(f"expected a disk called xvda to xvdz, got {name!r}")
    # as with Xen, a CD-ROM is one more disk to a guest that runs, without a tray
    read_only = element.find("readonly") is not None or element.get("device") == "cdrom"
    return Disk(name, Path(path), read_only=read_only)


def _backend(element: ET.Element) -> str:
    found = element.find("backenddomain")
    return "" if found is None else found.get("name", "")


def _text(root: ET.Element, tag: str) -> str:
    text = root.findtext(tag)
    if not text:
        raise ValueError(f"expected <{tag}> in <{root.tag}>")
    return text.strip()


def _mebibytes(root: ET.Element, tag: str) -> int:
    element = root.find(tag)
    if element is None or not element.text:
        return 0
    # KiB, where the XML names no unit
    unit = _UNITS.get(element.get("unit", "KiB"))
    if unit is None:
        raise ValueError(f"expected one of {', '.join(_UNITS)}, got {element.attrib}")
    return int(element.text) * unit >> 20
