"""The Xen XML that a core renders, read."""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True)
class DomainConfig:
    """What a core says of a domain.

    :param memory: at its start, MiB.
    :param max_memory: to which its balloon may grow, MiB.
    :param kernel: on the host; None for a guest that boots from its disk.
    :param kernel_options: its command line.
    :param disks: in the order of the XML.
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
        disks=tuple(map(_disk, disks)),
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


def read_disk(text: str) -> Disk:
    """Read a disk that is attached or detached.

    :raise ValueError: it is none.
    """
    return _disk(_parse(text, "disk"))


def with_disks(config: DomainConfig, added: Iterable[str]) -> str:
    """Return the definition of a running domain: that of its start, and more disks.

    :param added: XML of disks that have been attached.
    """
    root = _parse(config.xml, "domain")
    devices = root.find("devices")
    if devices is None:
        devices = ET.SubElement(root, "devices")
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
    return Disk(name, Path(path), read_only=element.find("readonly") is not None)


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
