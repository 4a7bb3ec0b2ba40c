"""QEMU back end: libvirt's QEMU driver inside this process, no daemon.

It must run in a sandbox: the QEMU processes that it starts are children of the
sandbox's first process, and end with it.
"""

# ruff: noqa: D102 - the contract documents its methods
from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from uuid import UUID

import libvirt
import libvirt_qemu

from qubes_itests.exc import EnvironmentNotReadyError
from qubes_itests.host.cache import Cache, digest
from qubes_itests.host.kernel import find_kernel
from qubes_itests.host.packages import find_program
from qubes_itests.hypervisor.connection import Connection
from qubes_itests.hypervisor.contract import Disk, DomainSpec
from qubes_itests.hypervisor.domain_xml import Machine, channel_path, domain_xml
from qubes_itests.hypervisor.embed import CapabilityCache, emulator_key, make_root
from qubes_itests.hypervisor.kvm import EMULATOR, kvm_usable
from qubes_itests.hypervisor.libvirt_hypervisor import LibvirtHypervisor
from qubes_itests.hypervisor.qemu_domain import QemuDomain
from qubes_itests.hypervisor.shared_memory import link_memory_library
from qubes_itests.hypervisor.tsc import tsc_rate

if TYPE_CHECKING:
    from qubes_itests.hypervisor.domain import LibvirtDomain

__all__ = ["QemuHypervisor"]

_LOG = logging.getLogger(__name__)

#: What the kernel takes as a socket's path, less its final NUL.
_SOCKET_PATH = 107
#: The longest that libvirt adds to its root for a domain's monitor.
_MONITOR = len("/lib/qemu/domain-99999-12345678901234567890/monitor.sock")

#: How many times longer a guest may take whose CPUs are emulated.
_EMULATED = 2.0


#: A domain, for what all of them have.
_ANY = DomainSpec(
    name="any",
    uuid=UUID(int=0),
    directory=Path("/"),
    memory=1,
    max_memory=1,
    kernel=Path("/kernel"),
    initramfs=Path("/initramfs"),
)


class QemuHypervisor(LibvirtHypervisor):
    """Domains that are QEMU processes; make it with :meth:`open`."""

    name = "qemu"

    def __init__(
        self,
        connection: Connection,
        machine: Machine,
        capabilities: CapabilityCache,
        root: Path,
    ) -> None:
        super().__init__(connection)
        self._root = root
        self._machine = machine
        self.slowness = 1.0 if machine.kvm else _EMULATED
        self._capabilities = capabilities
        self._ports: int | None = None

    async def _listen(self) -> None:
        await super()._listen()
        # libvirt has an event of its own for the port of its own agent alone
        register = libvirt_qemu.qemuMonitorEventRegister
        words = (self._connection.native, None, "VSERPORT_CHANGE", self._on_port, None)
        self._ports = await self._connection.call("", "listen to", register, *words)

    def _on_port(
        self,
        _connection: Any,
        native: Any,
        _event: str,
        _seconds: int,
        _microseconds: int,
        details: str,
        _opaque: Any,
    ) -> None:
        domain = self._find(native)
        if isinstance(domain, QemuDomain) and not json.loads(details)["open"]:
            domain.handle_closed_port()

    @classmethod
    async def open(
        cls,
        directory: Path,
        cache: Cache | Path,
        *,
        kvm: bool | None = None,
        kernel: Path | None = None,
    ) -> QemuHypervisor:
        """Open libvirt's embedded QEMU driver.

        :param directory: an existing directory of the run, its path short, for
            libvirt's own files. libvirt takes one per process, for the life of it.
        :param cache: where what libvirt learns about QEMU lasts.
        :param kvm: whether to use hardware virtualisation; None: if it works here.
        :param kernel: image of the kernel that tries it; by default the guests'.
        :raise EnvironmentNotReadyError: QEMU is missing, or the path is too long.
        :raise HypervisorError: libvirt refuses.
        """
        if isinstance(cache, Path):
            cache = Cache(cache)
        emulator = find_program(EMULATOR)
        if emulator is None:
            raise EnvironmentNotReadyError(
                f"{EMULATOR} is not installed.",
                "Install it: apt install qemu-system-x86.",
            )
        if kvm is None:
            kvm = await asyncio.to_thread(_kvm_works, cache, kernel)
        root = directory / "libvirt"
        excess = len(str(root)) + _MONITOR - _SOCKET_PATH
        if excess > 0:
            raise EnvironmentNotReadyError(
                f"The path {root} is {excess} bytes too long for the sockets in it.",
                "Set QUBES_ITESTS_CACHE to a directory with a shorter path.",
            )
        capabilities = CapabilityCache(cache, root, emulator)
        await asyncio.to_thread(make_root, root)
        library = await asyncio.to_thread(link_memory_library, cache, emulator, root)
        machine = Machine(
            kvm=kvm,
            emulator=emulator,
            tsc_khz=None if kvm else await asyncio.to_thread(tsc_rate),
            memory_library=library,
        )
        # before the driver opens, which reads it then and not again
        await asyncio.to_thread(capabilities.fetch)
        connection = await Connection.open(
            f"qemu:///embed?root={quote(str(root))}", keep=True
        )
        hypervisor = cls(connection, machine, capabilities, root)
        await hypervisor._listen()
        return hypervisor

    def _make(self, spec: DomainSpec) -> LibvirtDomain:
        return QemuDomain(
            self._connection,
            spec,
            self._publish,
            self._forget,
            machine=self._machine,
            root=self._root,
        )

    def _problem(self, spec: DomainSpec) -> str:
        problem = super()._problem(spec)
        if problem:
            return problem
        for path in (spec.kernel, spec.initramfs):
            if path is not None and not path.is_file():
                return f"there is no file {path}"
        if not spec.directory.is_dir():
            return f"there is no directory {spec.directory}"
        if len(str(channel_path(spec))) > _SOCKET_PATH:
            return f"the path {spec.directory} is too long for a socket in it"
        return ""

    async def machine(self) -> dict[str, str]:
        number = await self._connection.call(
            "", "ask", self._connection.native.getVersion
        )
        major, minor, micro = number // 10**6, number // 1000 % 1000, number % 1000
        kvm = self._machine.kvm
        nowhere = replace(
            self._machine, emulator=Path("/"), tsc_khz=None, memory_library=None
        )
        definition = domain_xml(_ANY, nowhere, incoming="defer")
        return {
            "QEMU": f"{major}.{minor}.{micro}",
            "libvirt": str(libvirt.getVersion()),
            "machine type": self._machine.machine,
            "virtualization": "KVM" if kvm else "emulation",
            "CPU": await asyncio.to_thread(_host_cpu) if kvm else self._machine.cpu,
            "devices": digest(definition)[:8],
        }

    async def state_key(
        self, spec: DomainSpec, *, saved_disks: tuple[str, ...] = ()
    ) -> str | None:
        # what a disk boots is no state that others could begin from
        if spec.kernel is None:
            return None
        return await asyncio.to_thread(self._state_key, spec, saved_disks)

    def _state_key(self, spec: DomainSpec, saved_disks: tuple[str, ...]) -> str:
        """Digest the definition less what clones may differ in, and the contents."""
        assert spec.kernel is not None and spec.initramfs is not None  # noqa: S101, PT018
        neutral = replace(
            spec,
            name="state",
            uuid=UUID(int=0),
            directory=Path("/"),
            kernel=Path("/kernel"),
            initramfs=Path("/initramfs"),
            disks=tuple(Disk(name, Path("/disk")) for name in saved_disks),
            interfaces=(),
        )
        library = self._machine.memory_library
        return digest(
            domain_xml(neutral, self._machine, incoming="defer"),
            _contents(spec.kernel, _version(spec.kernel)),
            _contents(spec.initramfs, _version(spec.initramfs)),
            emulator_key(self._machine.emulator),
            library or "no memory in common",
            _host_cpu() if self._machine.kvm else "",
        )

    async def _disconnect(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(super()._disconnect)
            if self._ports is not None:
                deregister = libvirt_qemu.qemuMonitorEventDeregister
                words = (self._connection.native, self._ports)
                stack.push_async_callback(
                    self._connection.call, "", "leave", deregister, *words
                )
            await asyncio.to_thread(self._capabilities.store)


@functools.lru_cache(maxsize=64)
def _contents(path: Path, _version: tuple[int, ...]) -> str:
    """Return a digest of a file's contents, read once for each of its versions."""
    return digest(path)


def _version(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _host_cpu() -> str:
    """Return the CPU that guests see whose CPUs are those of this machine."""
    first = Path("/proc/cpuinfo").read_text(encoding="ascii").partition("\n\n")[0]
    fields = {
        name.strip(): value.strip()
        for name, _, value in (line.partition(":") for line in first.splitlines())
    }
    features = digest(fields.get("flags", ""), fields.get("microcode", ""))
    return f"{fields.get('model name', 'unknown')} ({features[:8]})"


def _kvm_works(cache: Cache, kernel: Path | None) -> bool:
    verdict = kvm_usable(cache, kernel or find_kernel(cache).image)
    _LOG.info("KVM is %s: %s", "used" if verdict.usable else "not used", verdict.reason)
    return verdict.usable
