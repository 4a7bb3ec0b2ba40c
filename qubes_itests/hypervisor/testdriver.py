"""Test back end: libvirt's in-memory test driver, for tests without a guest.

Its domains have states, events and invented memory statistics, but no guest: what
needs one raises `HypervisorError`.
"""

# ruff: noqa: ARG002, ARG003, D102 - the contract has its arguments, and documents them
from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NoReturn
from xml.etree import ElementTree as ET

from qubes_itests.hypervisor.connection import Connection
from qubes_itests.hypervisor.domain import LibvirtDomain
from qubes_itests.hypervisor.exc import HypervisorError, SavedStateError
from qubes_itests.hypervisor.libvirt_hypervisor import LibvirtHypervisor

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from pathlib import Path

    from qubes_itests.host.cache import Cache
    from qubes_itests.hypervisor.contract import Disk, DomainSpec, Interface

__all__ = ["TestHypervisor"]

#: An empty node: the driver's default one has a running domain, and is shared by all
#: connections of a process.
_NODE = "<node/>"


class _TestDomain(LibvirtDomain):
    """A domain that exists in libvirt's memory only."""

    def console_log(self) -> Path:
        return self.spec.directory / "console.log"

    def _describe(self) -> str:
        return _domain_xml(self.spec)

    async def _create(
        self,
        saved_state: Path | None,
        saved_disks: tuple[str, ...],
        to_save: Path | None,
    ) -> None:
        if saved_state is not None:
            raise SavedStateError(
                self.spec.name, "start", "the test back end has no saved states"
            )
        self.console_log().touch()
        create = self._connection.native.createXML
        self._native = await self._call("start", create, self._describe(), 0)

    def _refuse(self, action: str) -> NoReturn:
        self._running(action)
        raise HypervisorError(
            self.spec.name, action, "the test back end's domains have no guest"
        )

    async def save(self, path: Path) -> None:
        self._refuse("save")

    async def freeze(self, path: Path) -> DomainSpec:
        self._refuse("freeze")

    async def open_channel(
        self,
        protocol: Callable[[], asyncio.BaseProtocol],
        *,
        timeout: float = 10.0,
    ) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
        self._refuse("open the channel of")

    async def attach_disk(self, disk: Disk) -> None:
        self._refuse("attach a disk to")

    async def detach_disk(self, name: str) -> None:
        self._refuse("detach a disk from")

    async def resize_disk(self, name: str, size: int) -> None:
        self._refuse("resize a disk of")

    async def attach_interface(self, interface: Interface) -> None:
        self._refuse("attach an interface to")

    async def detach_interface(self, mac: str) -> None:
        self._refuse("detach an interface from")


class TestHypervisor(LibvirtHypervisor):
    """Domains in memory; make it with :meth:`open`."""

    # Its name begins as a test class's does, and it is none.
    __test__ = False

    name = "test"
    networked = False
    takes_memory = False
    _numbers = itertools.count()

    @classmethod
    async def open(
        cls,
        directory: Path,
        cache: Cache | Path,
    ) -> TestHypervisor:
        """Open an empty test driver; any number may be open at once.

        :param directory: an existing directory for the driver's definition.
        :param cache: not used.
        :raise HypervisorError: libvirt refuses.
        """
        node = directory / f"test-node-{next(cls._numbers)}.xml"
        node.write_text(_NODE)
        hypervisor = cls(await Connection.open(f"test://{node}"))
        await hypervisor._listen()
        return hypervisor

    def _make(self, spec: DomainSpec) -> LibvirtDomain:
        return _TestDomain(self._connection, spec, self._publish, self._forget)

    async def state_key(
        self, spec: DomainSpec, *, saved_disks: tuple[str, ...] = ()
    ) -> str | None:
        return None


def _domain_xml(spec: DomainSpec) -> str:
    root = ET.Element("domain", type="test")
    texts = {
        "name": spec.name,
        "uuid": str(spec.uuid),
        "memory": str(spec.max_memory << 10),
        "currentMemory": str(spec.memory << 10),
        "vcpu": str(spec.vcpus),
    }
    for tag, text in texts.items():
        ET.SubElement(root, tag).text = text
    ET.SubElement(ET.SubElement(root, "os"), "type").text = "hvm"
    return ET.tostring(root, encoding="unicode")
