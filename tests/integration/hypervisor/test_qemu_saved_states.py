"""Saved states: one guest's memory started again, as other domains."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
import re
import shutil
from pathlib import Path

import libvirt
import pytest
import pytest_asyncio
from qemu_processes import processes

from qubes_itests.host.cache import digest, disk_usage
from qubes_itests.host.command import run
from qubes_itests.hypervisor.contract import Disk, DomainState, LifecycleEvent
from qubes_itests.hypervisor.exc import HypervisorError, SavedStateError
from qubes_itests.hypervisor.qemu_domain import setup_part
from qubes_itests.hypervisor.saved_state import make_memory_file, memory_file

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hypervisor(open_qemu):
    async with open_qemu() as opened:
        yield opened


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def saved(hypervisor, make_spec, connect_shell, directory):
    domain = await hypervisor.define(make_spec(name="original"))
    path = directory / "state"
    await domain.start(to_save=path)
    shell = await connect_shell(domain)
    await shell.run("mark=remembered")
    shell.close()
    await domain.save(path)
    assert await domain.state() is DomainState.HALTED
    await domain.undefine()
    return path


async def test_clones(hypervisor, saved, make_spec, connect_shell, directory):
    """Two at once remember what the original knew, and get disks of their own."""
    events = []
    end = hypervisor.subscribe(lambda _domain, event: events.append(event))
    disks = []
    for number in range(2):
        path = directory / f"clone{number}.img"
        path.write_bytes(f"clone {number}\n".encode() + bytes((1 << 20) - 8))
        disks.append(Disk("xvda", path))
    domains = [await hypervisor.define(make_spec(disks=(disk,))) for disk in disks]
    await asyncio.gather(*(domain.start(saved_state=saved) for domain in domains))
    for number, domain in enumerate(domains):
        shell = await connect_shell(domain)
        assert await shell.run("echo $mark") == "remembered\n"
        assert await shell.run("ls /sys/block") == ""
        await domain.attach_disk(disks[number])
        await shell.wait_for("head -n1 /dev/sda | grep -q clone")
        assert await shell.run("head -n1 /dev/sda") == f"clone {number}\n"
        shell.close()
    statistics = await domains[0].memory_statistics()
    assert statistics.actual > 0
    await asyncio.gather(*(domain.undefine() for domain in domains))
    assert sorted(event.value for event in events) == ["started"] * 2 + ["stopped"] * 2
    assert events[0] is LifecycleEvent.STARTED
    end()


async def test_clones_share_memory_and_nothing_else(
    hypervisor, saved, make_spec, connect_shell, eventually
):
    """What one writes no other sees; what it gives back is given back, and no more."""
    memory = memory_file(saved)
    before = digest(memory)
    assert disk_usage(saved.parent) < memory.stat().st_size == 160 << 20
    domains = [await hypervisor.define(make_spec()) for _ in range(2)]
    await asyncio.gather(*(domain.start(saved_state=saved) for domain in domains))
    shells = [await connect_shell(domain) for domain in domains]
    for number, shell in enumerate(shells):
        await shell.run(f"mark=of_{number}; {_fill(number, 30)}")
    for number, shell in enumerate(shells):
        assert await shell.run("echo $mark") == f"of_{number}\n"
        assert await shell.run("md5sum < /f") == _md5(number, 30)
    full = [_private_memory(domain) for domain in domains]
    await shells[0].run("rm /f")
    await domains[0].set_memory_target(80 << 20)
    await eventually(lambda: _private_memory(domains[0]) < full[0] - (25 << 20))
    assert await shells[1].run("md5sum < /f; rm /f") == _md5(1, 30)
    # what was given back, and so is the file's again, serves as well as any other
    await domains[0].set_memory_target(160 << 20)
    assert await shells[0].run(f"{_fill(2, 40)}; md5sum < /f") == _md5(2, 40)
    third = await hypervisor.define(make_spec())
    await third.start(saved_state=saved)
    shell = await connect_shell(third)
    assert await shell.run("echo $mark; ls /f 2> /dev/null || true") == "remembered\n"
    assert digest(memory) == before
    assert memory.stat().st_mode & 0o777 == 0o400
    for end in (*shells, shell):
        end.close()
    for domain in (*domains, third):
        await domain.undefine()
    assert digest(memory) == before


async def test_without_memory_in_common(
    hypervisor, make_spec, connect_shell, directory, monkeypatch
):
    """Where QEMU cannot share it a state holds all of the memory, and loads as well."""
    machine = dataclasses.replace(hypervisor._machine, memory_library=None)
    spec = make_spec()
    shared = await hypervisor.state_key(spec)
    monkeypatch.setattr(hypervisor, "_machine", machine)
    assert await hypervisor.state_key(spec) != shared
    domain = await hypervisor.define(spec)
    path = directory / "whole"
    await domain.start(to_save=path)
    shell = await connect_shell(domain)
    await shell.run("mark=whole")
    shell.close()
    await domain.save(path)
    assert not memory_file(path).exists()
    await domain.start(saved_state=path)
    shell = await connect_shell(domain)
    assert await shell.run("echo $mark") == "whole\n"
    shell.close()
    await domain.undefine()


def _fill(digit, megabytes):
    """Return a command that fills a file with lines of one digit."""
    block = f"yes {digit} | head -c 1000000 > /block"
    return f"{block}; for i in $(seq {megabytes}); do cat /block; done > /f"


def _md5(digit, megabytes):
    """Return what md5sum says of that file."""
    content = f"{digit}\n".encode() * (500_000 * megabytes)
    return f"{hashlib.md5(content, usedforsecurity=False).hexdigest()}  -\n"


def _private_memory(domain):
    """Return how many bytes of a domain's memory are its own."""
    (process,) = processes(domain.spec.name)
    text = Path(f"/proc/{process}/smaps").read_text()
    # several mappings: the kernel may use huge pages for some of it
    found = re.findall(r"state\.memory\n(?:[A-Z].*\n)*?Anonymous: +([0-9]+) kB", text)
    assert found
    return 1024 * sum(map(int, found))


def _cut(data):
    return data[: len(data) // 2]


def _garble_head(data):
    return b"\xff" * 64 + data[64:]


def _garble_tail(data):
    return data[:-200_000] + b"\xa5" * 200_000


def _cut_memory(path):
    memory_file(path).chmod(0o600)
    os.truncate(memory_file(path), 1 << 20)
    memory_file(path).chmod(0o400)


def _take_another_memory(path):
    other = path.with_name("other")
    # As like as another state's can be: QEMU notices nothing.
    run(["cp", "--sparse=always", memory_file(path), other])
    other.chmod(0o400)
    other.replace(memory_file(path))


def _write_memory(path):
    with memory_file(path).open("r+b") as file:
        file.write(b"\xa5")


DAMAGES = {
    "cut": lambda path: path.write_bytes(_cut(path.read_bytes())),
    "empty": lambda path: path.write_bytes(b""),
    "garbled head": lambda path: path.write_bytes(_garble_head(path.read_bytes())),
    "garbled tail": lambda path: path.write_bytes(_garble_tail(path.read_bytes())),
    "memory gone": lambda path: memory_file(path).unlink(),
    "memory cut": _cut_memory,
    "memory written": _write_memory,
    "memory of another": _take_another_memory,
    "memory writable": lambda path: memory_file(path).chmod(0o600),
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_state(hypervisor, saved, make_spec, directory, damage):
    """QEMU says so, no domain is left, and a cold start may follow."""
    place = directory / "bad"
    place.mkdir(exist_ok=True)
    for file in (saved, memory_file(saved)):
        run(["cp", "--preserve", "--sparse=always", file, place])
    bad = place / saved.name
    DAMAGES[damage](bad)
    domain = await hypervisor.define(make_spec())
    with pytest.raises(SavedStateError, match="did not load") as caught:
        await domain.start(saved_state=bad)
    assert " within " not in str(caught.value), "it was given up, and not refused"
    assert await domain.state() is DomainState.HALTED
    assert [path.name for path in domain.spec.directory.iterdir()] == ["console.log"]
    if damage == "cut":
        await domain.start()
        assert await domain.state() is DomainState.RUNNING
    await domain.undefine()


@pytest.mark.parametrize("change", [{"memory": 60, "max_memory": 64}, {"vcpus": 2}])
async def test_a_state_of_a_domain_of_another_kind(
    hypervisor, saved, make_spec, change
):
    """They have keys of their own; should one be mistaken, it does not load."""
    domain = await hypervisor.define(make_spec(**change))
    with pytest.raises(SavedStateError, match="did not load"):
        await domain.start(saved_state=saved)
    assert await domain.state() is DomainState.HALTED
    await domain.undefine()


async def test_a_state_is_not_blamed_for_a_disk(
    hypervisor, saved, make_spec, directory
):
    """Who is told that it does not load deletes it."""
    disk = Disk("xvda", directory / "no-disk")
    domain = await hypervisor.define(make_spec(disks=(disk,)))
    with pytest.raises(HypervisorError, match="no-disk") as caught:
        await domain.start(saved_state=saved, saved_disks=("xvda",))
    assert not isinstance(caught.value, SavedStateError)
    await domain.undefine()


async def test_without_the_library_a_state_does_not_load(
    hypervisor, saved, make_spec, monkeypatch
):
    """It is what keeps QEMU from writing to the memory of all."""
    machine = dataclasses.replace(
        hypervisor._machine, memory_library=Path("/nowhere/library.so")
    )
    monkeypatch.setattr(hypervisor, "_machine", machine)
    domain = await hypervisor.define(make_spec())
    with pytest.raises(SavedStateError, match="backing store"):
        await domain.start(saved_state=saved)
    await domain.undefine()


async def test_the_memory_of_another_state_stays(hypervisor, saved, make_spec):
    """A domain that would keep its own there does not start, and removes nothing."""
    before = memory_file(saved).stat()
    domain = await hypervisor.define(make_spec())
    with pytest.raises(HypervisorError, match="File exists"):
        await domain.start(to_save=saved)
    assert await domain.state() is DomainState.HALTED
    await domain.undefine()
    assert memory_file(saved).stat() == before


async def test_of_a_memory_that_is_too_large_nothing_is_left(tmp_path):
    with pytest.raises(OSError, match="File too large"):
        make_memory_file(tmp_path / "memory", 1 << 62)
    assert not list(tmp_path.iterdir())


async def test_a_missing_state(hypervisor, make_spec, directory):
    domain = await hypervisor.define(make_spec())
    with pytest.raises(SavedStateError):
        await domain.start(saved_state=directory / "none")
    await domain.undefine()


async def test_a_save_that_fails_leaves_no_file(hypervisor, make_spec, directory):
    domain = await hypervisor.define(make_spec())
    await domain.start()
    with pytest.raises((HypervisorError, OSError)):
        await domain.save(directory / "no" / "such" / "directory")
    assert await domain.state() is DomainState.HALTED
    assert not (directory / "no").exists()
    place = directory / "unsaved"
    place.mkdir()
    await domain.start(to_save=place / "state")
    with pytest.raises(HypervisorError, match="beside"):
        await domain.save(place / "another")
    await domain.undefine()
    assert not list(place.iterdir())


async def test_the_key_is_of_what_shapes_a_state(hypervisor, make_spec, tmp_path):
    spec, other = make_spec(), make_spec()
    key = await hypervisor.state_key(spec)
    assert key is not None
    assert key == await hypervisor.state_key(other)
    disk = Disk("xvda", tmp_path / "disk")
    assert key == await hypervisor.state_key(dataclasses.replace(spec, disks=(disk,)))
    initramfs = tmp_path / "initramfs"
    initramfs.write_bytes(b"another")
    changes = [
        {"memory": 150},
        {"max_memory": 170},
        {"vcpus": 2},
        {"kernel_options": "debug"},
        {"initramfs": initramfs},
        {"kernel": initramfs},
    ]
    keys = [
        await hypervisor.state_key(dataclasses.replace(spec, **change))
        for change in changes
    ]
    assert len({key, *keys}) == 1 + len(changes)


async def test_a_state_of_another_machine_or_qemu_has_another_key(
    hypervisor, make_spec, tmp_path, monkeypatch
):
    """QEMU itself loads what another CPU has left, and the guest crashes later."""
    machine, spec = hypervisor._machine, make_spec()
    updated = tmp_path / machine.emulator.name
    await asyncio.to_thread(shutil.copyfile, machine.emulator, updated)
    others = [
        machine,
        dataclasses.replace(machine, cpu="Westmere"),
        dataclasses.replace(machine, tsc_khz=1_000_000),
        dataclasses.replace(machine, machine="pc-q35-7.1"),
        dataclasses.replace(machine, emulator=updated),
        dataclasses.replace(machine, kvm=not machine.kvm),
    ]
    keys = set()
    for other in others:
        monkeypatch.setattr(hypervisor, "_machine", other)
        keys.add(await hypervisor.state_key(spec))
    monkeypatch.setattr(libvirt, "getVersion", lambda: 1)
    keys.add(await hypervisor.state_key(spec))
    assert len(keys) == len(others) + 1


async def test_a_clone_holds_no_kernel_image(kernel, tmp_path):
    """What QEMU is given has the set-up code of a bzImage, and all of another file."""
    cut = setup_part(kernel.image, tmp_path)
    whole, part = kernel.image.read_bytes(), cut.read_bytes()
    assert whole.startswith(part)
    assert len(part) == (1 + part[0x1F1]) * 512 + 1
    assert setup_part(kernel.image, tmp_path) == cut
    other = tmp_path / "vmlinux"
    other.write_bytes(b"\x7fELF" + bytes(2000))
    assert setup_part(other, tmp_path) == other
