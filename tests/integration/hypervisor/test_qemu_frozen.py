"""A running guest, frozen with all that is plugged in, and thawed in other domains."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import subprocess
import uuid

import pytest
import pytest_asyncio

from qubes_itests.hypervisor import monitor
from qubes_itests.hypervisor.contract import (
    Disk,
    DomainState,
    Interface,
    LifecycleEvent,
)
from qubes_itests.hypervisor.exc import HypervisorError, SavedStateError, StateError

pytestmark = pytest.mark.asyncio(loop_scope="module")

MIB = 1 << 20
MAC = "00:16:3e:5e:6c:01"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hypervisor(open_qemu):
    async with open_qemu() as opened:
        yield opened


@pytest.fixture(scope="module")
def bridge():
    subprocess.run(["ip", "link", "add", "qibr1", "type", "bridge"], check=True)
    subprocess.run(["ip", "link", "set", "qibr1", "up"], check=True)
    yield "qibr1"
    subprocess.run(["ip", "link", "del", "qibr1"], check=True)


@pytest.fixture
def full(directory):
    """Return a directory on a filesystem with less room than a guest's memory."""
    place = directory / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none"]
    subprocess.run([*mount, place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def original(hypervisor, make_spec, connect_shell, directory, bridge):
    """Return a domain with two disks, one of them plugged in, and an interface."""
    paths = [directory / name for name in ("first.img", "second.img")]
    for path in paths:
        path.write_bytes(bytes(MIB))
    disks = tuple(map(Disk, ("xvda", "xvdi"), paths))
    domain = await hypervisor.define(make_spec(name="original", disks=disks[:1]))
    await domain.start()
    await domain.attach_disk(disks[1])
    # the first place is free again when the second one is taken
    for mac in ("00:16:3e:5e:6c:00", MAC):
        await domain.attach_interface(Interface(mac, bridge=bridge))
    shell = await connect_shell(domain)
    await shell.wait_for(f"grep -q {MAC} /sys/class/net/*/address")
    await domain.detach_interface("00:16:3e:5e:6c:00")
    # By its address: names are given in the order in which the disks have answered.
    name = "$(ls /sys/bus/scsi/devices/0:0:8:0/block)"
    await shell.wait_for(f"[ -b /dev/{name} ]")
    await shell.run(f"mark=remembered disk=/dev/{name}")
    # in the guest's memory alone, when it is frozen
    await shell.run("echo written > $disk")
    shell.close()
    return domain


async def test_a_frozen_guest_is_thawed(
    hypervisor, original, make_spec, connect_shell, directory
):
    """It goes on where it was, twice over, and so does the one that was frozen."""
    await original.pause()
    images = {}
    for disk in (*original.spec.disks, Disk("xvdi", directory / "second.img")):
        images[disk.name] = directory / f"frozen-{disk.name}"
        shutil.copy(disk.path, images[disk.name])
    path = directory / "frozen"
    spec = await original.freeze(path)
    assert await original.state() is DomainState.PAUSED
    assert [disk.name for disk in spec.disks] == ["xvda", "xvdi"]
    (interface,) = spec.interfaces
    assert interface.mac == MAC
    await original.resume()
    shell = await connect_shell(original)
    assert await shell.run("echo $mark; sync; head -n1 $disk") == (
        "remembered\nwritten\n"
    )
    shell.close()

    events = []
    end = hypervisor.subscribe(lambda _domain, event: events.append(event))
    for _ in range(2):
        copies = [
            dataclasses.replace(disk, path=shutil.copy(images[disk.name], copy))
            for disk in spec.disks
            for copy in [directory / f"copy-{disk.name}"]
        ]
        blank = make_spec()
        thawed = await hypervisor.define(
            dataclasses.replace(
                spec,
                name=blank.name,
                uuid=uuid.uuid4(),
                directory=blank.directory,
                disks=tuple(copies),
            )
        )
        await thawed.thaw(path)
        assert await thawed.state() is DomainState.PAUSED
        await thawed.resume()
        shell = await connect_shell(thawed)
        assert await shell.run("echo $mark; sync; head -n1 $disk") == (
            "remembered\nwritten\n"
        )
        assert await shell.run(f"grep -l {MAC} /sys/class/net/*/address")
        # its devices are where libvirt takes them to be
        await thawed.detach_disk("xvdi")
        await shell.wait_for("[ ! -b $disk ]")
        await thawed.detach_interface(MAC)
        await shell.wait_for(f"! grep -q {MAC} /sys/class/net/*/address")
        shell.close()
        await thawed.undefine()
    end()
    once = [LifecycleEvent.STARTED, LifecycleEvent.PAUSED, LifecycleEvent.RESUMED]
    assert events == [*once, LifecycleEvent.STOPPED] * 2


async def test_only_a_paused_domain_is_frozen(original, directory):
    with pytest.raises(StateError, match="it is Running"):
        await original.freeze(directory / "running")
    assert not (directory / "running").exists()


async def test_a_freeze_that_fails_leaves_a_domain_that_goes_on(
    original, connect_shell, full
):
    await original.pause()
    with pytest.raises(HypervisorError, match="No space left on device"):
        await original.freeze(full / "state")
    assert list(full.iterdir()) == []
    await original.resume()
    shell = await connect_shell(original)
    assert await shell.run("echo $mark") == "remembered\n"
    shell.close()


async def test_a_freeze_that_is_given_up_leaves_a_domain_that_goes_on(
    original, connect_shell, directory, monkeypatch
):
    """QEMU stops a guest when it has written all of it, however late that is."""
    execute = monitor.Monitor.execute

    async def slowly(self, action, command, **arguments):
        if command == "migrate-set-parameters":
            arguments["max-bandwidth"] = 1 << 20
        return await execute(self, action, command, **arguments)

    monkeypatch.setattr(monitor.Monitor, "execute", slowly)
    await original.pause()
    freezing = asyncio.ensure_future(original.freeze(directory / "late"))
    control = monitor.Monitor(original._connection, "original", original.native)

    async def wait_for(status):
        found = None
        while found != status:
            found = (await control.execute("ask", "query-migrate")).get("status")
            await asyncio.sleep(0.01)

    async with asyncio.timeout(300):
        await wait_for("active")
        freezing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await freezing
        assert not list(directory.glob("*late*"))
        await original.resume()
        await wait_for("cancelled")
    assert await original.state() is DomainState.RUNNING
    shell = await connect_shell(original)
    assert await shell.run("echo $mark") == "remembered\n"
    shell.close()


async def test_a_state_that_does_not_load(hypervisor, make_spec, directory):
    (directory / "bad").write_bytes(b"\xff" * MIB)
    domain = await hypervisor.define(make_spec())
    with pytest.raises(SavedStateError, match="did not load"):
        await domain.thaw(directory / "bad")
    assert await domain.state() is DomainState.HALTED
    await asyncio.wait_for(domain.undefine(), 600)


async def test_memory_that_others_share_is_none_of_a_frozen_guest(
    hypervisor, make_spec, directory
):
    """Such a state would have QEMU open whatever is there by the name of that file."""
    saved = await hypervisor.define(make_spec())
    await saved.start(to_save=directory / "shared")
    await saved.save(directory / "shared")
    await saved.undefine()
    domain = await hypervisor.define(make_spec())
    with pytest.raises(SavedStateError, match="has all of its memory with it"):
        await domain.thaw(directory / "shared")
    await domain.undefine()


async def test_the_machine_in_words(hypervisor):
    machine = await hypervisor.machine()
    assert machine["virtualization"] in ("KVM", "emulation")
    assert machine["QEMU"].count(".") == 2
    assert all(machine.values())
