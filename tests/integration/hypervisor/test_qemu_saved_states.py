"""Saved states: one guest's memory started again, as other domains."""

from __future__ import annotations

import asyncio
import dataclasses
import time

import pytest
import pytest_asyncio

from qubes_itests.hypervisor.contract import Disk, DomainState, LifecycleEvent
from qubes_itests.hypervisor.exc import HypervisorError, SavedStateError

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hypervisor(open_qemu):
    async with open_qemu() as opened:
        yield opened


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def saved(hypervisor, make_spec, connect_shell, directory):
    domain = await hypervisor.define(make_spec(name="original"))
    await domain.start()
    shell = await connect_shell(domain)
    await shell.run("mark=remembered")
    shell.close()
    path = directory / "state"
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


def _cut(data):
    return data[: len(data) // 2]


def _garble_head(data):
    return b"\xff" * 64 + data[64:]


def _garble_tail(data):
    return data[:-200_000] + b"\xa5" * 200_000


@pytest.mark.parametrize(
    "damage", [_cut, _garble_head, _garble_tail, lambda _data: b""]
)
async def test_a_damaged_state(hypervisor, saved, make_spec, directory, damage):
    """It is said soon, no domain is left, and a cold start may follow."""
    bad = directory / "bad"
    bad.write_bytes(damage(saved.read_bytes()))
    domain = await hypervisor.define(make_spec())
    before = time.monotonic()
    with pytest.raises(SavedStateError, match="did not load"):
        await domain.start(saved_state=bad)
    assert time.monotonic() - before < 10
    assert await domain.state() is DomainState.HALTED
    assert [path.name for path in domain.spec.directory.iterdir()] == ["console.log"]
    await domain.start()
    assert await domain.state() is DomainState.RUNNING
    await domain.undefine()


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
    await domain.undefine()


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
