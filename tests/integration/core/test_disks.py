"""Volumes as the disks of real guests: discard, resize, snapshots, revert, clones."""

import contextlib
import logging
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from qubes_itests.admin.dispatch import Dispatcher
from qubes_itests.admin.methods import METHODS
from qubes_itests.admin.protocol import Request
from qubes_itests.core.volume_content import copy_image, is_empty
from qubes_itests.host.command import run as run_tool
from qubes_itests.host.loop import loop_devices_over
from qubes_storage.exc import InvalidSizeError, StoragePoolException
from qubes_storage.reflink import ReflinkPool
from qubes_storage.volume import MAX_SIZE

MIB = 1024**2


@pytest.fixture
def vm(make_vm):
    return make_vm("work")


@pytest.fixture
def template(app):
    return app.domains["tiny"]


@pytest.fixture
def app(xfs, small_fs, app):  # noqa: ARG001
    """End the app before the filesystems that its pools may be on."""
    return app


@pytest.fixture
def xfs_pool(app, run, xfs):
    """Add a second pool to the app, on another filesystem than the first."""
    return run(app.add_pool(ReflinkPool(name="second", dir_path=xfs / "pool")))


@pytest.fixture
def session(run, sh):
    """Start a VM, run a command in it, shut it down."""

    def session(vm, command):
        run(vm.start())
        output = sh(vm, command)
        run(vm.shutdown(wait=True))
        return output

    return session


def allocated(path):
    """Return what a file takes on its filesystem, bytes."""
    return path.stat().st_blocks * 512


def disk_size(sh, vm, name):
    return int(sh(vm, f"blockdev --getsize64 $(readlink -f /dev/{name})"))


def filesystem_size(sh, vm, place):
    return int(sh(vm, f"df -k {place} | tail -n 1 | awk '{{print $2}}'")) * 1024


def test_trimming_in_the_guest_shrinks_the_image(vm, run, sh):
    """While the VM runs, and what it commits is as small."""
    image = vm.volumes["private"].path
    run(vm.start())
    sh(vm, "fstrim /rw; sync")
    before = allocated(image)
    sh(vm, "dd if=/dev/urandom of=/rw/big bs=1M count=24 conv=fsync; cp /rw/big /tmp")
    full = allocated(image)
    assert full >= before + 24 * MIB
    sh(vm, "rm /rw/big; sync; fstrim /rw; sync")
    assert allocated(image) <= before + 2 * MIB
    run(vm.shutdown(wait=True))
    assert vm.volumes["private"].usage <= before + 2 * MIB


@pytest.mark.parametrize("name", ["private", "root"])
def test_resizing_a_running_template_grows_disk_and_filesystem(template, run, sh, name):
    """The guest has the new size at once, and after its next start."""
    disk, place = {"private": ("xvdb", "/rw"), "root": ("xvda", "/")}[name]
    volume = template.volumes[name]
    run(template.start())
    old = filesystem_size(sh, template, place)
    new = volume.size + 64 * MIB
    run(template.storage.resize(name, new))
    assert volume.size == disk_size(sh, template, disk) == new
    grown = filesystem_size(sh, template, place)
    assert grown > old + 48 * MIB
    sh(template, f"echo kept > {place}/kept")
    run(template.shutdown(wait=True))
    assert volume.size == new
    run(template.start())
    assert disk_size(sh, template, disk) == new
    assert filesystem_size(sh, template, place) == grown
    assert sh(template, f"cat {place}/kept") == "kept"


def test_resizing_a_running_volume_is_seen_by_loop_devices(vm, run, sh):
    """A device over the image that a guest uses has the guest's size."""
    volume = vm.volumes["private"]
    run(vm.start())
    loop = run_tool(["losetup", "--find", "--show", volume.path]).strip()
    try:
        assert loop in map(str, loop_devices_over(volume.path))
        new = volume.size + 16 * MIB
        run(vm.storage.resize(volume, new))
        assert int(run_tool(["blockdev", "--getsize64", loop])) == new
        assert disk_size(sh, vm, "xvdb") == new
    finally:
        run_tool(["losetup", "--detach", loop])


def test_a_block_device_is_copied_as_a_file_is(tmp_path):
    """As of a disk that dom0 exposes, when its VM is frozen."""
    image, copy = tmp_path / "image", tmp_path / "copy"
    image.write_bytes(bytes(3 * MIB) + os.urandom(MIB + 512))
    copy.touch()
    loop = run_tool(["losetup", "--find", "--show", image]).strip()
    try:
        copy_image(Path(loop), copy)
        assert not is_empty(Path(loop))
    finally:
        run_tool(["losetup", "--detach", loop])
    assert copy.read_bytes() == image.read_bytes()


def test_a_resized_disk_without_filesystem_has_its_size_at_once(vm, run, sh):
    run(vm.start())
    for _ in range(3):
        new = vm.volumes["volatile"].size + 16 * MIB
        run(vm.storage.resize("volatile", new))
        assert disk_size(sh, vm, "xvdc") == new


def test_resizing_a_halted_vm_is_seen_at_its_next_start(vm, run, sh):
    new = vm.volumes["private"].size + 16 * MIB
    run(vm.storage.resize("private", new))
    run(vm.start())
    assert disk_size(sh, vm, "xvdb") == new


def test_the_largest_volumes_leave_a_vm_usable(vm, run, sh):
    """A disk without a filesystem may be as large as QEMU opens it."""
    run(vm.storage.resize("volatile", MAX_SIZE))
    with pytest.raises(InvalidSizeError):
        run(vm.storage.resize("volatile", MAX_SIZE + 1))
    run(vm.start())
    assert disk_size(sh, vm, "xvdc") == MAX_SIZE
    assert sh(vm, "tail -n 1 /proc/swaps | awk '{print $3}'") == str((64 << 20) - 4)


def clear(vm):
    request = Request("admin.vm.volume.Clear", "private", "dom0", vm.name, b"")
    return Dispatcher(vm.app, METHODS).answer(request)


def test_a_private_volume_that_is_cleared_is_as_new(vm, run, session):
    """It has a filesystem at the next start, which lasts; what was there is kept."""
    session(vm, "echo kept > /home/user/kept")
    assert run(clear(vm)) == b"0\0"
    assert vm.volumes["private"].usage == 0
    assert len(vm.volumes["private"].revisions) > 0
    assert session(vm, "ls /home/user; echo new > /home/user/new") == ""
    assert session(vm, "ls /home/user") == "new"


def test_disposable_vms_start_from_a_volume_that_was_cleared(make_vm, app, run, sh):
    base = make_vm("base", template_for_dispvms=True)
    run(clear(base))
    vm = run(app.get_vm_class("DispVM").from_appvm(base))
    run(vm.start())
    assert sh(vm, "ls -A /home/user") == ""
    assert base.volumes["private"].usage > 0
    run(vm.cleanup())


def test_a_guest_that_cannot_grow_its_filesystem_fails_the_resize(vm, run, sh):
    """The disk has grown all the same: nothing takes that back under a guest."""
    run(vm.start())
    sh(vm, "printf '#!/bin/sh\\nexit 3\\n' > /etc/qubes-rpc/qubes.ResizeDisk")
    new = vm.volumes["private"].size + 16 * MIB
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run(vm.storage.resize("private", new))
    assert caught.value.returncode == 3
    assert vm.volumes["private"].size == new


def test_a_filesystem_that_cannot_grow_is_told(vm, run, caplog):
    """A VM starts all the same, as on Qubes OS: what it has is there."""
    old = vm.volumes["private"].size
    fixed = ("-O", "sparse_super2,^resize_inode", "-L", "private")

    async def replace_by_one_that_cannot():
        async with vm.storage.importing(vm.volumes["private"], old) as path:
            os.truncate(path, old)
            run_tool(["mke2fs", "-q", "-t", "ext4", "-F", *fixed, path])

    run(replace_by_one_that_cannot())
    run(vm.storage.resize("private", 20 << 30))
    with caplog.at_level(logging.WARNING, "qubes_itests.guest"):
        run(vm.start())
    assert "work starts with a problem: /rw does not grow: " in caplog.text
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run(vm.storage.resize("private", 21 << 30))
    assert b"resize2fs: " in caught.value.stderr


def test_the_root_grows_by_more_than_its_own_size(template, run, sh, caplog):
    """Its journal has room for what the kernel reserves; at a start and in a guest."""
    size = 3 << 30
    run(template.storage.resize("root", size))
    with caplog.at_level(logging.WARNING, "qubes_itests.guest"):
        run(template.start())
    assert "problem" not in caplog.text
    blocks = "stat -f -c %b /"
    assert size * 0.9 < 4096 * int(sh(template, blocks)) < size
    run(template.storage.resize("root", 8 * size))
    assert 8 * size * 0.9 < 4096 * int(sh(template, blocks)) < 8 * size


def test_snapshots_see_a_template_after_its_stop_and_their_own_restart(
    vm, template, run, sh
):
    """Neither alone is enough; what is outdated is known at each moment."""
    look = "cat /etc/version 2>/dev/null || true"
    run(vm.start())
    assert vm.storage.outdated_volumes == []
    run(template.start())
    sh(template, "echo 1 > /etc/version; sync")
    assert vm.storage.outdated_volumes == []
    run(vm.shutdown(wait=True))
    run(vm.start())
    assert sh(vm, look) == "", "the template has not stopped yet"
    run(template.shutdown(wait=True))
    assert vm.storage.outdated_volumes == [vm.volumes["root"]]
    assert sh(vm, look) == "", "the VM has not restarted yet"
    run(vm.shutdown(wait=True))
    assert vm.storage.outdated_volumes == []
    run(vm.start())
    assert sh(vm, look) == "1"
    assert vm.storage.outdated_volumes == []


def test_reverting_a_template_takes_its_vms_back(vm, template, run, sh, session):
    """One revision back; a VM that runs meanwhile keeps what it started from."""
    session(template, "echo good > /etc/version")
    session(template, "echo bad > /etc/version")
    run(vm.start())
    run(template.volumes["root"].revert())
    assert sh(vm, "cat /etc/version") == "bad"
    assert vm.storage.outdated_volumes == [vm.volumes["root"]]
    run(vm.shutdown(wait=True))
    run(vm.start())
    assert sh(vm, "cat /etc/version") == "good"
    assert session(template, "cat /etc/version") == "good"


def test_a_vm_cloned_to_another_filesystem_boots_with_its_data(
    app, run, session, xfs_pool
):
    """From btrfs to XFS: own root, own data, and independent from then on."""
    source = app.add_new_vm("StandaloneVM", name="alone", label="red", kernel="tiny")
    run(source.clone_disk_files(app.domains["tiny"]))
    session(source, "echo root > /etc/kept; echo home > /home/user/kept")
    clone = app.add_new_vm("StandaloneVM", name="copy", label="red", kernel="tiny")
    run(clone.clone_disk_files(source, pool="second"))
    assert {volume.pool for volume in clone.volumes.values()} == {xfs_pool}
    assert clone.volumes["root"].revisions == {}
    look = "cat /etc/kept /home/user/kept"
    assert session(clone, f"{look}; rm /etc/kept") == "root\nhome"
    assert session(source, look) == "root\nhome"


def test_an_appvm_keeps_its_data_in_another_pool_than_its_template(
    app, run, session, xfs_pool
):
    """Its root stays where its template is; a clone of it in the first pool boots."""
    vm = app.add_new_vm("AppVM", name="far", label="red")
    run(vm.create_on_disk(pool="second"))
    assert vm.volumes["private"].pool is vm.volumes["volatile"].pool is xfs_pool
    assert vm.volumes["root"].pool is app.domains["tiny"].volumes["root"].pool
    session(vm, "echo home > /home/user/kept")
    clone = app.add_new_vm("AppVM", name="near", label="red")
    run(clone.clone_disk_files(vm, pool="varlibqubes"))
    assert clone.volumes["private"].pool is app.pools["varlibqubes"]
    assert session(clone, "cat /home/user/kept") == "home"


def test_a_pool_may_go_before_the_vms_that_have_volumes_in_it(app, run, tmp_path):
    """As where a test removes its directory: its app is closed without a complaint."""
    pool = run(app.add_pool("gone", driver="file", dir_path=tmp_path / "gone"))
    vm = app.add_new_vm("AppVM", name="late", label="red")
    run(vm.create_on_disk(pool=pool))
    run(vm.start())
    shutil.rmtree(tmp_path / "gone")


def test_a_private_volume_imported_from_another_filesystem_is_mounted(
    vm, app, run, session, xfs_pool
):
    """Contents and size are the source's."""
    far = app.add_new_vm("AppVM", name="far", label="red")
    run(far.create_on_disk(pool=xfs_pool.name))
    size = far.volumes["private"].size + 32 * MIB
    run(far.storage.resize("private", size))
    session(far, "echo far > /home/user/kept")
    run(vm.volumes["private"].import_volume(far.volumes["private"]))
    assert vm.volumes["private"].size == size
    look = "cat /home/user/kept; blockdev --getsize64 $(readlink -f /dev/xvdb)"
    assert session(vm, look) == f"far\n{size}"


def test_a_clone_that_fails_leaves_no_volume(app, run, small_fs):
    """The pool is too small for the root; what was copied before is gone again."""
    directory = small_fs(128 * MIB)
    run(app.add_pool(ReflinkPool(name="small", dir_path=directory / "pool")))
    with (
        (directory / "full").open("wb", buffering=0) as file,
        contextlib.suppress(OSError),
    ):
        while True:
            file.write(b"full" * MIB)
    clone = app.add_new_vm("StandaloneVM", name="copy", label="red", kernel="tiny")
    with pytest.raises(StoragePoolException):
        run(clone.clone_disk_files(app.domains["tiny"], pool="small"))
    assert list((directory / "pool").rglob("*.img*")) == []


def test_extra_volumes_are_disks_of_their_own(vm, run, sh):
    """As xvde and xvdf, in this order; kept, or empty again, as configured."""
    kept = {"size": 16 * MIB, "rw": True, "save_on_stop": True}
    extra = vm.storage.init_volume("data", kept)
    vm.storage.init_volume("scratch", {"size": 32 * MIB, "rw": True})
    run(extra.create())
    run(vm.start())
    assert disk_size(sh, vm, "xvde") == 16 * MIB
    assert disk_size(sh, vm, "xvdf") == 32 * MIB
    for disk in ("xvde", "xvdf"):
        sh(vm, f"echo {disk} | dd of=/dev/{disk} conv=notrunc,fsync")
    run(vm.storage.resize("data", 24 * MIB))
    run(vm.shutdown(wait=True))
    run(vm.start())
    assert disk_size(sh, vm, "xvde") == 24 * MIB
    assert sh(vm, "head -c 4 /dev/xvde") == "xvde"
    assert sh(vm, "head -c 4 /dev/xvdf | tr '\\0' 0") == "0000"


def test_a_read_only_volume_cannot_be_written_by_its_vm(vm, run, sh):
    kernel = vm.storage.init_volume("modules", {"size": MIB})
    run(kernel.create())
    run(vm.start())
    assert sh(vm, "cat /sys/block/$(basename $(readlink -f /dev/xvde))/ro") == "1"
    with pytest.raises(subprocess.CalledProcessError):
        sh(vm, "echo x | dd of=/dev/xvde conv=notrunc,fsync")
    run(vm.shutdown(wait=True))
    assert kernel.path.read_bytes() == bytes(MIB)
