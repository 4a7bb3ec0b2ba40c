"""The Xen XML that a core renders, read."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from xml.etree import ElementTree as ET

from qubes_itests.hypervisor.contract import Disk

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["DomainConfig", "read_disk", "read_domain", "with_disks"]

#: Of a unit that libvirt knows, so many bytes.
_UNITS: Final = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
#: Devices that a guest here has of its own, or goes without: interfaces, too, for net
#: VMs of a core under test connect nobody yet.
_IGNORED: Final = (
    *("console", "emulator", "input", "video", "graphics", "sound"),
    "interface",
)
#: What a guest here may call a disk.
_NAME: Final = re.compile("xvd[a-z]")


@dataclass(frozen=True, slots=True)
class DomainConfig:
    """What a core says of a domain.

    :param memory: at its start, MiB.
    :param max_memory: to which its balloon may grow, MiB.
    :param kernel: on the host; None for a guest that boots from its disk.
    :param kernel_options: its command line.
    :param disks: of dom0, in the order of the XML.
    :param borrowed: XML of disks that are devices of other VMs.
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
    borrowed = [element for element in disks if _backend(element)]
    others = [element.tag for element in devices if element.tag != "disk"]
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
        unsupported=tuple(others),
    )


def read_disk(text: str) -> tuple[Disk, str]:
    """Read a disk that is attached or detached.

    :return: the disk, and the name of the VM whose device it is; empty for dom0.
    :raise ValueError: it is none.
    """
    element = _parse(text, "disk")
    return _disk(element), _backend(element)


def with_disks(config: DomainConfig, added: Iterable[str]) -> str:
    """Return the definition of a running domain: what it has of dom0, and more disks.

    :param added: XML of disks that have been attached, those of other VMs from the
        start among them.
    """
    root = _parse(config.xml, "domain")
    devices = root.find("devices")
    if devices is None:
        devices = ET.SubElement(root, "devices")
    for element in devices.findall("disk"):
        if _backend(element):
            devices.remove(element)
    devices.extend(_parse(text, "disk") for text in added)
    return ET.tostring(root, encoding="unicode")


def _parse(text: str, tag: str) -> ET.Element:
    try:
        root = ET.fromstring(text)  # noqa: S314 - the core's own
    except ET.ParseError as error:
        raise ValueError(f"expected XML, got {text[:80]!r}: {error}") from None
    if root.tag != tag:
        raise ValueError(f"expected <{tag}>, got <{root.tag}>")
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
