"""VMs that start from a state of our init over the root of their template."""

from __future__ import annotations

import contextlib

import pytest
from warm_states import found_states

from qubes_itests import timeline
from qubes_itests.exc import DeadlineError
from qubes_itests.guest.link.agent import GuestAgent
from qubes_itests.guest.link.process import answer_of
from qubes_itests.guest.start import warm
from qubes_itests.host.cache import Cache
from qubes_itests.host.filesystem import FilesystemType, LoopFilesystem
from qubes_storage.ficlone import places_of_data

MIB = 1 << 20


@pytest.fixture
def states(testbed, qubes_app, tmp_path, monkeypatch):
    """Return a list of the states that starts find; the first start makes one."""
    monkeypatch.setattr(warm, "_WORTH", 1)
    starts = warm.WarmStarts(Cache(tmp_path / "cache"), testbed.hypervisor)
    image = testbed.template(qubes_app.default_template.name).root_image
    starts.add_root(image, "as it is")
    qubes_app.warm_starts = starts
    return found_states(monkeypatch)


def test_clones_share_no_identity_and_have_disks_of_their_own(
    qubes_app, vm_factory, portal, states, monkeypatch
):
    """All disks but the root were blank when the state was saved, and one smaller."""
    known, enter = [], GuestAgent.enter

    async def record(agent, identity, *, timeout, unchanged):
        known.append(unchanged)
        await enter(agent, identity, timeout=timeout, unchanged=unchanged)

    on_loop, clone = [], warm.clone_or_copy

    def note_and_clone(*files):
        on_loop.append(portal.loop.in_own_thread())
        return clone(*files)

    monkeypatch.setattr(GuestAgent, "enter", record)
    monkeypatch.setattr(warm, "clone_or_copy", note_and_clone)

    def sh(vm, command):
        return portal.run(vm.run_for_stdio(command, user="root"))[0].decode().strip()

    recorder = timeline.Recorder()
    with timeline.recording(recorder):
        for name in ("one", "two"):
            vm_factory(name, start=False)
        vms = [qubes_app.domains[name] for name in ("one", "two")]
        sizes = [vm.volumes["private"].size + 64 * MIB * n for n, vm in enumerate(vms)]
        for vm, size in zip(vms, sizes, strict=True):
            portal.run(vm.storage.resize("private", size))
            portal.run(vm.start())
    assert [state.disks for state in states] == [("xvda", "xvdb", "xvdc")] * 2
    assert known == [("xvda", "xvdb", "xvdc"), ("xvda", "xvdc")]
    assert on_loop == [False]
    assert states[0].path == states[1].path
    # the harness runs a command in the guest that it saves
    assert {record["vm"] for record in recorder.records("run")} <= {"one", "two"}
    for command in (
        "cat /proc/sys/kernel/random/boot_id",
        "head -c 32 /dev/urandom | sha256sum",
        "hostname",
    ):
        assert sh(vms[0], command) != sh(vms[1], command), command
    for vm, size in zip(vms, sizes, strict=True):
        assert sh(vm, "blockdev --getsize64 /dev/xvdb") == str(size)
        assert int(sh(vm, "df -m /rw | awk 'END{print $2}'")) > 0.9 * size / MIB
        swap = vm.volumes["volatile"].size
        assert sh(vm, "blockdev --getsize64 /dev/xvdc") == str(swap)
        assert "partition" in sh(vm, "cat /proc/swaps")
        mounts = sh(vm, "cat /proc/mounts")
        assert "/ ext4 rw" in mounts
        assert "/rw ext4 rw" in mounts
        command = f"echo {vm} | tee /rw/mine >/mine; cat /mine /rw/mine; ls /rw"
        assert sh(vm, command).split() == [
            *(vm.name, vm.name),
            *("config", "home", "lost+found", "mine", "usrlocal"),
        ]


def test_data_in_the_same_places_of_another_filesystem_are_others(testbed, tmp_path):
    kind = FilesystemType.XFS
    starts = warm.WarmStarts(Cache(tmp_path / "cache"), testbed.hypervisor)
    with contextlib.ExitStack() as stack:
        images = []
        for name in ("a", "b"):
            made = LoopFilesystem(
                *(tmp_path / f"{name}.img", tmp_path / name),
                kind=kind,
                size=kind.minimum_size,
            )
            images.append(stack.enter_context(made).mount_point / "root")
            images[-1].write_bytes(name.encode() * MIB)
        places = [
            places_of_data(stack.enter_context(image.open("rb")).fileno())
            for image in images
        ]
        assert places[0] == places[1]
        starts.add_root(images[0], "a")
        assert [starts._same_root(image) for image in images] == [images[0], None]


async def _fail(*_args, **_options):
    raise DeadlineError("answer", 1)


async def _write_to_root(agent, identity, *, timeout):
    await _PREPARE(agent, identity, timeout=timeout)
    command = "mount -o remount,rw / && touch /written && sync"
    process = await agent.spawn(command, user="root")
    await answer_of(process, "write to its root", timeout=timeout)


_PREPARE = GuestAgent.prepare


@pytest.mark.parametrize("prepare", [_fail, _write_to_root])
def test_where_that_state_cannot_be_made_stage_one_serves(
    vm_factory, states, monkeypatch, prepare
):
    monkeypatch.setattr(GuestAgent, "prepare", prepare)
    assert vm_factory().run("true", wait=True) == 0
    assert [state.disks for state in states] == [()]
