"""A guest that is a shell on the agent's port, and hypervisors to run it on."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import tempfile
import uuid
from pathlib import Path

import pytest

from qubes_itests.host.cache import Cache
from qubes_itests.host.kernel import find_kernel
from qubes_itests.hypervisor.contract import DomainSpec
from qubes_itests.hypervisor.qemu import QemuHypervisor
from qubes_itests.run.hooks import offers, registry

MODULES = """
virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio-rng
virtio_console virtio_balloon scsi_common scsi_mod virtio_scsi crc64 crc64-rocksoft
t10-pi sd_mod failover net_failover virtio_net pvpanic pvpanic-mmio
"""

INIT = """#!/bin/busybox sh
/bin/busybox mkdir /b
/bin/busybox --install -s /b
export PATH=/b
mount -t devtmpfs d /dev; mount -t proc p /proc; mount -t sysfs s /sys
for m in $(cat /modules); do insmod /m/$m; done
echo "the guest is up" > /dev/console
for p in /sys/class/virtio-ports/*; do
    grep -q org.qubes_itests.agent $p/name && port=/dev/${p##*/}
done
exec 3<>$port
while true; do
    # Without a reader on the host's side the port is at its end.
    read -r line <&3 || { usleep 10000; continue; }
    { eval "$line" 2>&1; echo "END $?"; } >&3
done
"""


def _cpio(files):
    """Return an initramfs of (name, mode, contents) files."""
    archive = bytearray()
    for number, (name, mode, data) in enumerate([*files, ("TRAILER!!!", 0, b"")], 1):
        path = name.encode() + b"\0"
        device = (5, 1) if mode & 0o170000 == 0o020000 else (0, 0)
        fields = [number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0]
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + path
        archive += b"\0" * (-len(archive) % 4) + data
        archive += b"\0" * (-len(archive) % 4)
    return bytes(archive)


def _modules(directory):
    found = {path.name.split(".")[0]: path for path in directory.rglob("*.ko")}
    wanted = [found[name] for name in MODULES.split() if name in found]
    assert len(wanted) >= 12, directory
    return wanted


@pytest.fixture(scope="session")
def cache():
    return Cache()


@pytest.fixture(scope="session")
def kernel(cache):
    return find_kernel(cache)


@pytest.fixture(scope="session")
def initramfs(kernel, tmp_path_factory):
    modules = _modules(kernel.modules)
    files = [(name, 0o040755, b"") for name in ("bin", "dev", "proc", "sys", "m")]
    files += [
        ("dev/console", 0o020600, b""),
        ("bin/busybox", 0o100755, Path("/bin/busybox").read_bytes()),
        ("modules", 0o100644, "\n".join(m.name for m in modules).encode()),
        ("init", 0o100755, INIT.encode()),
    ]
    files += [(f"m/{path.name}", 0o100644, path.read_bytes()) for path in modules]
    image = tmp_path_factory.mktemp("initramfs") / "initramfs.cpio"
    image.write_bytes(_cpio(files))
    return image


@pytest.fixture(scope="module")
def directory():
    """Return a directory with a short path, as sockets want it."""
    with tempfile.TemporaryDirectory(prefix="qi") as path:
        yield Path(path)


@pytest.fixture(scope="module")
def make_spec(directory, kernel, initramfs):
    numbers = itertools.count()

    def make(**changes):
        name = changes.pop("name", f"vm{next(numbers)}")
        place = directory / name
        place.mkdir(exist_ok=True)
        values = {"memory": 160, "max_memory": 160, **changes}
        return DomainSpec(
            name=name,
            uuid=values.pop("uuid", uuid.uuid4()),
            directory=place,
            kernel=kernel.image,
            initramfs=initramfs,
            **values,
        )

    return make


@pytest.fixture(scope="session")
def open_qemu(cache):
    """Return a context manager that opens a QEMU hypervisor."""
    with tempfile.TemporaryDirectory(prefix="qi") as place:

        @contextlib.asynccontextmanager
        async def opened():
            async with await QemuHypervisor.open(Path(place), cache) as hypervisor:
                yield hypervisor

        yield opened


@pytest.fixture(scope="session")
def open_back_end(open_qemu, cache, kernel):
    @contextlib.asynccontextmanager
    async def opened(name):
        if name == "qemu":
            async with open_qemu() as hypervisor:
                yield hypervisor
            return
        with tempfile.TemporaryDirectory() as place:
            connect = offers(registry(), "hypervisors")[name]
            async with await connect(Path(place), cache, kernel) as hypervisor:
                yield hypervisor

    return opened


class Shell(asyncio.Protocol):
    """The host's end of the guest's shell: a line in, output and `END STATUS` out."""

    def __init__(self):
        self.received = b""
        self.news = asyncio.Event()

    @classmethod
    async def connect(cls, domain):
        transport, shell = await domain.open_channel(cls)
        shell.transport = transport
        return shell

    def data_received(self, data):
        self.received += data
        self.news.set()

    async def run(self, command, *, timeout=300):
        """Run a command; return its output. A status other than 0 fails the test."""
        self.transport.write(command.encode() + b"\n")
        async with asyncio.timeout(timeout):
            while b"END " not in self.received or self.received[-1:] != b"\n":
                self.news.clear()
                await self.news.wait()
        output, _, status = self.received.rpartition(b"END ")
        self.received = b""
        assert status == b"0\n", (command, output, status)
        return output.decode()

    async def wait_for(self, command, *, timeout=300):
        """Run a command until it succeeds."""
        line = f"until {command}; do usleep 20000; done"
        return await self.run(line, timeout=timeout)

    def close(self):
        self.transport.close()


@pytest.fixture(scope="session")
def connect_shell():
    return Shell.connect


@pytest.fixture(scope="session")
def eventually():
    """Return a coroutine function that waits until a condition holds."""

    async def wait(condition, timeout=300):
        async with asyncio.timeout(timeout):
            while True:
                outcome = condition()
                if asyncio.iscoroutine(outcome):
                    outcome = await outcome
                if outcome:
                    return
                await asyncio.sleep(0.01)

    return wait
