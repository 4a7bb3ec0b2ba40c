"""Pools on real filesystems: extents are shared, a full disk loses nothing."""

from __future__ import annotations

import asyncio
import errno
import os
import re
from types import SimpleNamespace

import pytest

from qubes_itests.host.command import run
from qubes_itests.host.filesystem import FilesystemType, LoopFilesystem
from qubes_storage.exc import (
    StoragePoolException,
    VolumeError,
)
from qubes_storage.file import FilePool
from qubes_storage.reflink import ReflinkPool

MIB = 1024**2
SIZE = 16 * MIB

WORK = SimpleNamespace(name="work", dir_path_prefix="appvms")
TEMPLATE = SimpleNamespace(name="tiny", dir_path_prefix="vm-templates")
SAVED = {"rw": True, "save_on_stop": True, "size": SIZE}


def fill(path, size=SIZE):
    """Write data that no filesystem can store as a hole."""
    with path.open("r+b") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
        os.fsync(file.fileno())


def fill_up(path):
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(os.urandom(MIB))


def shared_bytes(path):
    """Return how much of a file the filesystem says is shared with others."""
    text = run(["filefrag", "-v", "-b4096", "-s", path])
    extents = re.findall(r"^ *\d+: .*?: +(\d+):.*?([a-z_,]*)$", text, re.MULTILINE)
    return sum(int(length) * 4096 for length, flags in extents if "shared" in flags)


def used(directory):
    run(["sync", "--file-system", directory])
    status = os.statvfs(directory)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


@pytest.fixture(params=["btrfs", "xfs"])
def directory(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def opened():
    """Return a function that opens a pool; it is forgotten before its filesystem."""
    pools = []

    async def open_pool(name, directory, **options):
        pool = ReflinkPool(name=name, dir_path=directory / "pool", **options)
        pool.background.idle = 1e9
        await pool.setup()
        pools.append(pool)
        return pool

    yield open_pool
    for pool in pools:
        asyncio.run(pool.destroy())


@pytest.fixture
def pool(directory, opened):
    return asyncio.run(opened("real", directory))


async def template_root(pool):
    root = pool.init_volume(TEMPLATE, {"name": "root", **SAVED})
    await root.create()
    await root.start()
    await asyncio.to_thread(fill, root.path)
    await root.stop()
    return root


@pytest.mark.asyncio
async def test_a_snapshot_shares_all_of_its_source(pool):
    """Ten VMs on one template take no more space than one."""
    root = await template_root(pool)
    before = await asyncio.to_thread(used, pool.dir_path)
    snapshots = [
        pool.init_volume(
            SimpleNamespace(name=f"work{number}", dir_path_prefix="appvms"),
            {"name": "root", "rw": True, "snap_on_start": True, "source": root},
        )
        for number in range(10)
    ]
    await asyncio.gather(*(snapshot.start() for snapshot in snapshots))
    for snapshot in snapshots:
        assert shared_bytes(snapshot.path) == SIZE
    assert await asyncio.to_thread(used, pool.dir_path) - before < SIZE // 4


@pytest.mark.asyncio
async def test_only_what_a_vm_writes_stops_being_shared(pool):
    root = await template_root(pool)
    await root.start()
    with root.path.open("r+b") as image:
        image.seek(4 * MIB)
        image.write(b"x" * MIB)
        os.fsync(image.fileno())
    assert shared_bytes(root.path) == SIZE - MIB
    await root.stop()
    assert len(root.revisions) == 1


@pytest.mark.parametrize("kind", [FilesystemType.BTRFS, FilesystemType.XFS])
@pytest.mark.asyncio
async def test_a_vm_loses_nothing_when_the_machine_restarts(
    kind, run_directory, opened
):
    """What a pool holds is the same after unmounting and mounting again."""
    image, place = run_directory / "restart.img", run_directory / "restart"
    with LoopFilesystem(image, place, kind=kind, size=512 * MIB) as filesystem:
        root = await _survive_restart(filesystem, opened)
        await root.pool.destroy()


async def _survive_restart(filesystem, opened):
    async def restarted():
        pool = await opened("real", filesystem.mount_point)
        return pool.init_volume(TEMPLATE, {"name": "root", **SAVED})

    root = await restarted()
    await root.create()
    await root.start()
    fill(root.path)
    await root.stop()
    committed = root.files.clean.read_bytes()
    await root.start()
    await root.pool.destroy()
    filesystem.remount()
    root = await restarted()
    assert root.is_dirty()
    assert root.files.clean.read_bytes() == committed
    await root.start()
    assert root.path.read_bytes() == committed
    await root.stop()
    return root


@pytest.mark.parametrize(("kind", "size"), [("btrfs", 128), ("xfs", 300)])
@pytest.mark.asyncio
async def test_a_full_pool_refuses_and_keeps_what_it_has(
    kind, size, small_fs, ext4, opened
):
    """Importing what does not fit leaves the old image; less of it then fits."""
    directory = small_fs(size * MIB, kind)
    pool = await opened("small", directory)
    root = await template_root(pool)
    committed = root.files.clean.read_bytes()
    before = sorted(path.name for path in root.files.directory.iterdir())
    elsewhere = await opened("elsewhere", ext4, setup_check="no")
    source = elsewhere.init_volume(WORK, {"name": "root"})
    source.files.directory.mkdir(parents=True)
    source.files.clean.touch()
    fill(source.files.clean, size * MIB)
    with pytest.raises(VolumeError, match="No space left") as caught:
        await root.import_volume(source)
    assert caught.value.vid == root.vid
    assert root.files.clean.read_bytes() == committed
    assert sorted(path.name for path in root.files.directory.iterdir()) == before
    os.truncate(source.files.clean, MIB)
    await root.import_volume(source)
    assert root.size == MIB


@pytest.mark.asyncio
async def test_a_pool_full_to_the_brim_can_still_start_and_stop(small_fs, opened):
    """A start on a full filesystem works or fails cleanly, and works later."""
    directory = small_fs(128 * MIB)
    pool = await opened("small", directory)
    root = await template_root(pool)
    with pytest.raises(OSError, match="No space"):
        fill_up(directory / "ballast")
    committed = root.files.clean.read_bytes()
    try:
        await root.start()
    except VolumeError as error:
        if error.__cause__.errno != errno.ENOSPC:
            raise
        assert not root.is_dirty()
    await root.stop()
    assert root.files.clean.read_bytes() == committed
    (directory / "ballast").unlink()
    await asyncio.to_thread(used, directory)  # btrfs frees space when it commits
    await root.start()
    await root.stop()
    assert root.files.clean.read_bytes() == committed


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
@pytest.mark.asyncio
async def test_a_filesystem_without_reflinks_is_refused(kind, request, opened):
    """And the message names the way out, which then works."""
    directory = request.getfixturevalue(kind)
    with pytest.raises(StoragePoolException, match="setup_check=no"):
        await opened("plain", directory)
    pool = await opened("plain", directory, setup_check="no")
    root = await template_root(pool)
    await root.start()
    assert root.path.read_bytes() == root.files.clean.read_bytes()
    await pool.destroy()


@pytest.mark.asyncio
async def test_an_import_from_another_filesystem_is_a_sparse_copy(btrfs, xfs, opened):
    pools = [await opened("one", btrfs), await opened("two", xfs)]
    source = await template_root(pools[0])
    await source.resize(64 * SIZE)
    clone = pools[1].init_volume(WORK, {"name": "private", **SAVED})
    await clone.import_volume(source)
    assert clone.size == 64 * SIZE
    assert clone.usage < 2 * SIZE
    with clone.files.clean.open("rb") as one, source.files.clean.open("rb") as other:
        assert one.read(SIZE) == other.read(SIZE)


@pytest.mark.asyncio
async def test_a_loop_device_over_a_running_volume_follows_its_size(reflink_pool):
    volume = reflink_pool.init_volume(WORK, {"name": "private", **SAVED})
    await volume.create()
    await volume.start()
    device = run(["losetup", "--find", "--show", volume.path]).strip()
    try:
        await volume.resize(2 * SIZE)
        assert int(run(["blockdev", "--getsize64", device])) == 2 * SIZE
    finally:
        run(["losetup", "--detach", device])


@pytest.mark.asyncio
async def test_a_read_only_pool_says_so(small_fs, opened):
    directory = small_fs(128 * MIB)
    pool = await opened("small", directory)
    volume = pool.init_volume(WORK, {"name": "private", **SAVED})
    await volume.create()
    run(["mount", "-o", "remount,ro", directory])
    with pytest.raises(VolumeError, match="Read-only file system") as caught:
        await volume.start()
    assert caught.value.vid == volume.vid
    run(["mount", "-o", "remount,rw", directory])
    await volume.start()


@pytest.mark.asyncio
async def test_a_pool_whose_filesystem_is_absent_writes_nothing_below_it(
    run_directory, opened
):
    """An unmounted disk is an error, not a new pool in the mount point."""
    filesystem = LoopFilesystem(
        run_directory / "absent.img",
        run_directory / "absent",
        kind=FilesystemType.BTRFS,
        size=128 * MIB,
    )
    with filesystem:
        pool = await opened("p", filesystem.mount_point)
        volume = pool.init_volume(WORK, {"name": "private", **SAVED})
        await volume.create()
    filesystem.mount_point.mkdir()
    with pytest.raises(VolumeError, match="directory is absent"):
        await volume.start()
    assert not list(filesystem.mount_point.iterdir())
    filesystem.mount_point.rmdir()


def subvolume(directory):
    run(["btrfs", "subvolume", "create", directory])


def bound(directory):
    """Mount a directory onto itself, which hard links do not cross either."""
    directory.mkdir()
    run(["mount", "--bind", directory, directory])


@pytest.mark.parametrize("driver", [ReflinkPool, FilePool])
@pytest.mark.parametrize("boundary", [subvolume, bound])
@pytest.mark.parametrize("folder", ["appvms", "appvms/work", "vm-templates"])
@pytest.mark.parametrize("saved", [False, True])
def test_snapshots_across_subvolumes_and_mounts(
    btrfs, request, *, driver, boundary, folder, saved
):
    """A VM's directory may be where no hard link of its template's image can be."""
    (btrfs / folder).parent.mkdir(exist_ok=True)
    boundary(btrfs / folder)
    if boundary is bound:
        request.addfinalizer(lambda: run(["umount", "--lazy", btrfs / folder]))
    asyncio.run(two_starts(driver(name="p", dir_path=btrfs), saved=saved))


async def two_starts(pool, *, saved):
    await pool.setup()
    template = pool.init_volume(TEMPLATE, {"name": "root", **SAVED})
    await template.create()
    snapshot = pool.init_volume(
        WORK,
        {
            "name": "root",
            "rw": True,
            "snap_on_start": True,
            "save_on_stop": saved,
            "source": template,
        },
    )
    await commit(template, b"1")
    await snapshot.start()
    assert not snapshot.is_outdated()
    assert snapshot.path.read_bytes()[:1] == b"1"
    await commit(template, b"2")
    assert snapshot.is_outdated()
    assert snapshot.path.read_bytes()[:1] == b"1"
    await snapshot.stop()
    await snapshot.start()
    assert not snapshot.is_outdated()
    assert snapshot.path.read_bytes()[:1] == b"2"
    await snapshot.stop()
    await pool.destroy()


async def commit(volume, content):
    await volume.start()
    with volume.path.open("r+b") as image:
        image.write(content)
    await volume.stop()
