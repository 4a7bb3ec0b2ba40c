"""A running domain that goes on as another one, of which libvirt knows nothing.

libvirt renames no domain that runs.  What it says of one is put right here, for those
who hold its object; in its own lists, and in QEMU's command line, the name stays.
"""

# ruff: noqa: D102, N802, SLF001 - libvirt documents its methods, and names them
from __future__ import annotations

from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

import libvirt

from qubes_itests.hypervisor.exc import HypervisorError

if TYPE_CHECKING:
    from qubes_itests.hypervisor.contract import Disk, DomainSpec
    from qubes_itests.hypervisor.monitor import Monitor

__all__ = ["AdoptedDomain", "exchange_disks"]

_QUOTES = {"'": "&apos;", '"': "&quot;"}


class AdoptedDomain(libvirt.virDomain):  # type: ignore[misc]
    """libvirt's object for a domain, with the name and the UUID that it has with us.

    :param native: libvirt's own object, of no use from then on.
    :param was: what the domain was started as.
    :param spec: what it is now; it has the disks that it was started with, too.
    """

    def __init__(
        self, native: libvirt.virDomain, was: DomainSpec, spec: DomainSpec
    ) -> None:
        super().__init__(native.connect(), native._o)
        native._o = None  # each object frees what it refers to
        self._spec = spec
        paths = {disk.name: disk.path for disk in spec.disks}
        self._words = {
            f"<name>{was.name}</name>": f"<name>{spec.name}</name>",
            f"<uuid>{was.uuid}</uuid>": f"<uuid>{spec.uuid}</uuid>",
            # The files in it have been moved. The quote keeps it from others' names.
            f"'{_xml(was.directory)}/": f"'{_xml(spec.directory)}/",
            **{f"'{_xml(d.path)}'": f"'{_xml(paths[d.name])}'" for d in was.disks},
        }

    def name(self) -> str:
        return self._spec.name

    def UUID(self) -> bytes:
        return self._spec.uuid.bytes

    def UUIDString(self) -> str:
        return str(self._spec.uuid)

    def XMLDesc(self, flags: int = 0) -> str:
        xml: str = super().XMLDesc(flags)
        for was, now in self._words.items():
            xml = xml.replace(was, now)
        return xml


def _xml(path: object) -> str:
    return escape(str(path), _QUOTES)


async def exchange_disks(
    monitor: Monitor, was: tuple[Disk, ...], disks: dict[str, tuple[Disk, bool]]
) -> None:
    """Put other files behind the disks of a domain whose CPUs stand still.

    libvirt has no word for it. For QEMU the guest's disk, and the node of the format
    that libvirt knows it by, stay what they are; their file is another one. How large
    that is the guest learns when it looks.

    :param was: the disks that it has.
    :param disks: by their names what they shall be, and whether that can be opened past
        the page cache.
    :raise HypervisorError: for what went wrong; then it has some of both.
    """
    action = "exchange the disks of"
    nodes = await monitor.execute(action, "query-named-block-nodes", flat=True)
    formats = {node["file"]: node for node in nodes if node["drv"] == "raw"}
    options = []
    for old in was:
        disk, direct = disks[old.name]
        if str(old.path) not in formats:
            raise HypervisorError(monitor.domain, action, f"no disk is {old.path}")
        node: dict[str, Any] = {
            "node-name": f"adopted-{old.name}",
            "driver": "host_device" if disk.path.is_block_device() else "file",
            "filename": str(disk.path),
            "read-only": False,
            "discard": "unmap",
            "cache": {"direct": direct, "no-flush": False},
        }
        await monitor.execute(action, "blockdev-add", **node)
        options.append(
            {
                "node-name": formats[str(old.path)]["node-name"],
                "driver": "raw",
                "file": node["node-name"],
                "read-only": False,
                "discard": "unmap",
                "detect-zeroes": "unmap",
                "cache": node["cache"],
            }
        )
    # all of them or none
    await monitor.execute(action, "blockdev-reopen", options=options)
