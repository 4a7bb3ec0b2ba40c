"""Filesystems in image files, and the fixtures on them."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from qubes_itests.host.command import CommandError, run
from qubes_itests.host.filesystem import (
    FilesystemType,
    LoopFilesystem,
    is_mounted,
    make_ext4,
    make_filesystem,
    mount,
    unmount,
)
from qubes_itests.host.loop import loop_devices_over
from qubes_storage.ficlone import supports_reflink

MIB = 1024**2
MOUNTS = Path("/proc/self/mountinfo")


def filesystem_type(directory):
    return run(["stat", "--file-system", "--format=%T", directory]).strip()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("btrfs", "btrfs"),
        ("xfs", "xfs"),
        ("xfs_no_reflink", "xfs"),
        ("ext4", "ext2/ext3"),
        ("tmpfs", "tmpfs"),
    ],
)
@pytest.mark.parametrize("turn", [1, 2])
def test_a_fixture_is_an_empty_directory_on_its_filesystem(name, kind, turn, request):
    """Also in the second test that uses it, whatever the first left there."""
    directory = request.getfixturevalue(name)
    assert filesystem_type(directory) == kind
    assert list(directory.iterdir()) == []
    (directory / f"left-{turn}").mkdir()
    (directory / f"left-{turn}" / "file").write_text("left")


LEFT = """
    import os, subprocess
    import pytest

    def sh(*words):
        subprocess.run(words, check=True, capture_output=True)

    def leave_subvolume(place):
        sh("btrfs", "subvolume", "create", place / "sub")
        sh("btrfs", "subvolume", "snapshot", "-r", place / "sub", place / "sub/snap")

    def leave_snapshot_of_all(place):
        (place / "file").write_text("x")
        sh("btrfs", "subvolume", "snapshot", "-r", place, place / "snap")

    def leave_immutable_file(place):
        (place / "dir").mkdir()
        (place / "dir/file").write_text("x")
        sh("chattr", "-R", "+i", place / "dir")

    def leave_working_directory(place):
        os.chdir(place)

    def leave_open_file(place):
        held.append((place / "file").open("w"))

    def leave_mount(place):
        (place / "dir").mkdir()
        sh("mount", "--bind", outside, place / "dir")
        sh("mount", "-t", "tmpfs", "none", place / "dir")

    held = []
    outside = os.environ["LEFT_OUTSIDE"]
    ALL = [leave for name, leave in list(vars().items()) if name.startswith("leave")]

    @pytest.fixture(params=["btrfs", "xfs", "ext4", "tmpfs", "small_fs"])
    def place(request):
        made = request.getfixturevalue(request.param)
        return made if request.param != "small_fs" else made(128 << 20)

    @pytest.mark.parametrize("leave", ALL)
    def test_left(place, leave):
        assert list(place.iterdir()) == []
        if "sub" in leave.__name__ or "snap" in leave.__name__:
            if subprocess.run(["btrfs", "subvolume", "show", place]).returncode:
                return
        if "immutable" in leave.__name__ and "tmpfs" in str(place):
            return
        leave(place)

    def test_afterwards(place):
        assert os.getcwd() == os.environ["PWD"]
        (place / "file").write_text("x")
"""


def test_what_a_test_leaves_in_its_directory_harms_no_other(tmp_path):
    """Nor the test itself, nor what is outside and was mounted there."""
    (tmp_path / "test_left.py").write_text(textwrap.dedent(LEFT))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").touch()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "qubes_itests", "-q", "test_left.py"],
        cwd=tmp_path,
        env=os.environ
        | {"LEFT_OUTSIDE": str(tmp_path / "outside"), "PWD": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "35 passed" in done.stdout
    assert (tmp_path / "outside" / "precious").exists()


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("btrfs", True),
        ("xfs", True),
        ("xfs_no_reflink", False),
        ("ext4", False),
        ("tmpfs", False),
    ],
)
def test_a_filesystem_shares_extents_or_not_as_its_fixture_says(name, shares, request):
    assert supports_reflink(request.getfixturevalue(name)) is shares


def test_the_pools_are_set_up_for_a_synchronous_test(
    reflink_pool, btrfs, file_pool, ext4
):
    for pool, directory in ((reflink_pool, btrfs), (file_pool, ext4)):
        assert pool.dir_path.parent == directory
        assert pool.size > 0
        asyncio.run(pool.setup())


@pytest.mark.asyncio
async def test_the_pools_are_set_up_for_an_asynchronous_test(reflink_pool, file_pool):
    await reflink_pool.setup()
    await file_pool.setup()


def test_nothing_is_left_of_a_session_with_fixtures(tmp_path):
    """Neither a mount, nor a loop device, nor a directory of the run."""
    (tmp_path / "test_uses.py").write_text(
        "def test_uses(\n"
        "    btrfs, xfs, xfs_no_reflink, ext4, tmpfs, small_fs, reflink_pool\n"
        "):\n"
        "    small_fs(128 * 1024**2)\n"
        "    assert False, 'a failure must not change it'\n"
    )
    before = MOUNTS.read_text()
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    with pytest.raises(CommandError) as caught:
        run(
            [
                "env",
                f"QUBES_ITESTS_CACHE={cache}",
                sys.executable,
                "-m",
                "pytest",
                "-pqubes_itests",
                f"--rootdir={tmp_path}",
                tmp_path,
            ]
        )
    assert caught.value.returncode == 1
    assert MOUNTS.read_text() == before
    assert [path for path in (cache / "runs").iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("kind", FilesystemType)
def test_a_loop_filesystem_goes_with_its_context(kind, run_directory):
    filesystem = LoopFilesystem(
        run_directory / "one.img",
        run_directory / "a mount point",
        kind=kind,
        size=kind.minimum_size,
    )
    with filesystem:
        assert is_mounted(filesystem.mount_point)
        assert len(loop_devices_over(filesystem.image)) == 1
        (filesystem.mount_point / "file").write_text("kept")
        filesystem.remount()
        assert (filesystem.mount_point / "file").read_text() == "kept"
    assert not filesystem.mount_point.exists()
    assert not filesystem.image.exists()
    assert loop_devices_over(filesystem.image) == ()


@pytest.mark.parametrize("kind", [FilesystemType.BTRFS, FilesystemType.EXT4])
def test_an_fsync_in_a_loop_filesystem_waits_for_no_disk(kind, run_directory):
    """It goes with the run: no flush ever gets to the disk of the host."""
    filesystem = LoopFilesystem(
        run_directory / "one.img",
        run_directory / "one",
        kind=kind,
        size=kind.minimum_size,
    )

    def flushes_of_a_write(device: Path) -> int:
        """Return how many flushes reach a disk when a file is written and fsynced."""
        statistics = Path("/sys/block", device.name, "stat")
        before = int(statistics.read_text().split()[15])
        with (filesystem.mount_point / "file").open("wb", buffering=0) as file:
            file.write(b"data")
            os.fsync(file.fileno())
        return int(statistics.read_text().split()[15]) - before

    with filesystem:
        (device,) = loop_devices_over(filesystem.image)
        assert flushes_of_a_write(device) == 0
        run(["mount", "-o", "remount,barrier", filesystem.mount_point])
        assert flushes_of_a_write(device) > 0, "they are not counted"


@pytest.mark.parametrize(
    "settings",
    [
        {"make_options": ["--no-such-option"]},
        {"mount_options": ["no_such_option"]},
    ],
)
def test_a_filesystem_that_fails_half_way_leaves_nothing(settings, run_directory):
    filesystem = LoopFilesystem(
        run_directory / "bad.img",
        run_directory / "bad",
        kind=FilesystemType.BTRFS,
        size=128 * MIB,
        **settings,
    )
    with pytest.raises(CommandError) as caught, filesystem:
        pass
    assert caught.value.stderr
    assert not filesystem.image.exists()
    assert not filesystem.mount_point.exists()
    assert loop_devices_over(filesystem.image) == ()


def test_a_filesystem_in_use_stays_and_says_so(run_directory):
    filesystem = LoopFilesystem(
        run_directory / "busy.img",
        run_directory / "busy",
        kind=FilesystemType.EXT4,
        size=8 * MIB,
    )
    filesystem.__enter__()
    with (
        (filesystem.mount_point / "file").open("w"),
        pytest.raises(CommandError, match="busy"),
    ):
        filesystem.__exit__()
    assert is_mounted(filesystem.mount_point)
    filesystem.__exit__()


def test_too_small_an_image_is_refused_before_mkfs(tmp_path):
    with pytest.raises(ValueError, match="at least 300 MiB"):
        make_filesystem(tmp_path / "small.img", FilesystemType.XFS, 299 * MIB)
    assert not (tmp_path / "small.img").exists()


def test_the_smallest_ext4_has_a_journal(tmp_path):
    """Without one it does not survive a power cut, whatever is stored in it."""
    kind, image = FilesystemType.EXT4, tmp_path / "small.img"
    make_filesystem(image, kind, kind.minimum_size)
    assert "has_journal" in run(["dumpe2fs", "-h", image])


def test_an_ext4_image_is_made_in_place(run_directory):
    """It keeps its inode and its size to the byte, is sparse, and mounts."""
    image = run_directory / "private.img"
    image.write_bytes(b"old" * 1000)
    before = image.stat().st_ino
    size = 2048 * MIB + 512
    make_ext4(image, size, "private")
    status = image.stat()
    assert (status.st_ino, status.st_size) == (before, size)
    assert status.st_blocks * 512 < 16 * MIB
    run(["e2fsck", "-f", "-n", image])
    assert run(["blkid", "-o", "value", "-s", "LABEL", image]).strip() == "private"
    directory = run_directory / "private"
    directory.mkdir()
    mount(image, directory)
    try:
        root = directory.stat()
        assert (root.st_uid, root.st_gid) == (0, 0)
        assert stat.S_IMODE(root.st_mode) == 0o755
    finally:
        unmount(directory)
        directory.rmdir()
        image.unlink()


def test_a_machine_without_loop_devices_is_told_so(tmp_path):
    """In a mount namespace whose /dev is empty."""
    program = (
        "import pathlib, sys\n"
        "from qubes_itests.exc import EnvironmentNotReadyError\n"
        "from qubes_itests.host.filesystem import FilesystemType, LoopFilesystem\n"
        "image, place = map(pathlib.Path, sys.argv[1:])\n"
        "kind = FilesystemType.EXT4\n"
        "try:\n"
        "    LoopFilesystem(image, place, kind=kind, size=8 << 20).__enter__()\n"
        "except EnvironmentNotReadyError as error:\n"
        "    assert not image.exists() and not place.exists()\n"
        "    print(error)\n"
    )
    script = 'mount -t tmpfs none /dev && mknod /dev/null c 1 3 && exec "$@"'
    paths = [tmp_path / "none.img", tmp_path / "none"]
    argv = ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-c"]
    output = run([*argv, program, *paths])
    assert "no usable loop device" in output
    assert "modprobe loop" in output
