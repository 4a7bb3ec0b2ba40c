"""A running QEMU guest: its console, channel, disks, interfaces and memory."""

from __future__ import annotations

import subprocess

import pytest
import pytest_asyncio

from qubes_itests.hypervisor.contract import Disk, Interface
from qubes_itests.hypervisor.exc import HypervisorError

pytestmark = pytest.mark.asyncio(loop_scope="module")

MIB = 1 << 20


def image(path, mib):
    with path.open("wb") as file:
        file.truncate(mib * MIB)
    return path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def domain(open_qemu, make_spec, directory):
    disks = (Disk("xvda", image(directory / "root.img", 4), read_only=True),)
    async with open_qemu() as hypervisor:
        made = await hypervisor.define(make_spec(disks=disks))
        await made.start()
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shell(domain, connect_shell):
    connected = await connect_shell(domain)
    yield connected
    connected.close()


@pytest.fixture(scope="module")
def bridge():
    subprocess.run(["ip", "link", "add", "qibr0", "type", "bridge"], check=True)
    subprocess.run(["ip", "link", "set", "qibr0", "up"], check=True)
    yield "qibr0"
    subprocess.run(["ip", "link", "del", "qibr0"], check=True)


def block(name):
    """Return a shell condition: sets $d to the directory of the disk of that name."""
    return (
        f"for d in /sys/block/sd*; do grep -q {name} $d/device/vpd_pg80 && break; done"
        f" && grep -q {name} $d/device/vpd_pg80"
    )


async def test_console_and_channel(domain, shell, eventually):
    assert await shell.run("echo hello") == "hello\n"
    log = domain.console_log()
    await eventually(lambda: "the guest is up" in log.read_text())


async def test_a_disk_of_the_spec(shell):
    """It has its name as serial number, and its size; it is read-only if so asked."""
    await shell.wait_for(block("xvda"))
    assert await shell.run("cat $d/size $d/ro") == f"{4 * MIB // 512}\n1\n"


async def test_a_disk_comes_grows_and_goes(domain, shell, directory):
    path = image(directory / "data.img", 2)
    await domain.attach_disk(Disk("xvdb", path))
    await shell.wait_for(block("xvdb"))
    await shell.run("echo written | dd of=/dev/${d##*/} conv=fsync 2>/dev/null")
    assert path.read_bytes().startswith(b"written\n")
    image(path, 8)
    await domain.resize_disk("xvdb", 8 * MIB)
    await shell.wait_for(f"grep -q ^{8 * MIB // 512}$ $d/size")
    with pytest.raises(HypervisorError, match="attached already"):
        await domain.attach_disk(Disk("xvdb", path))
    await domain.detach_disk("xvdb")
    await shell.wait_for("[ ! -e $d ]")
    await domain.detach_disk("xvdb")
    with pytest.raises(HypervisorError, match="it has no"):
        await domain.resize_disk("xvdb", MIB)


@pytest.fixture
def tmpfs(directory):
    place = directory / "tmpfs"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "qi", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


async def test_a_disk_on_a_file_system_without_direct_io(domain, shell, tmpfs):
    await domain.attach_disk(Disk("xvdc", image(tmpfs / "disk.img", 1)))
    await shell.wait_for(block("xvdc"))
    await domain.detach_disk("xvdc")


async def test_an_interface_comes_and_goes(domain, shell, bridge):
    """Also a second time, and no address twice, which libvirt would take."""
    interface = Interface("00:16:3e:5e:6c:00", bridge)
    condition = f"grep -q {interface.mac} /sys/class/net/*/address"
    for _ in range(2):
        await domain.attach_interface(interface)
        await shell.wait_for(condition)
        with pytest.raises(HypervisorError, match="attached already"):
            await domain.attach_interface(interface)
        await domain.detach_interface(interface.mac)
        await shell.wait_for(f"! {condition}")
        await domain.detach_interface(interface.mac)


@pytest.mark.usefixtures("shell")
async def test_balloon(domain, eventually):
    """The domain gets exactly to its target, and its guest reports what it has."""

    async def reached(target):
        return (await domain.memory_statistics()).actual == target

    async def reported():
        return (await domain.memory_statistics()).available is not None

    for target in (128 * MIB, 160 * MIB):
        await domain.set_memory_target(target)
        await eventually(lambda: reached(target))  # noqa: B023 - used at once
    await eventually(reported)
    statistics = await domain.memory_statistics()
    assert 0 < statistics.available <= statistics.unused + statistics.cached
    assert statistics.unused + statistics.cached < statistics.total
    assert statistics.total <= 160 * MIB
