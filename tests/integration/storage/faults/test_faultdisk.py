"""The disk itself: what it records, how it fails, and that nothing of it stays."""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest

from qubes_itests.exc import EnvironmentNotReadyError
from qubes_itests.faultdisk import CrashStateError, FaultDisk, Kind
from qubes_itests.faultdisk.exc import FaultDiskError
from qubes_itests.host.command import run

MIB = 1024**2


@contextlib.contextmanager
def opened(disk, flags=0):
    fd = os.open(disk.device, os.O_RDWR | os.O_CLOEXEC | flags)
    try:
        yield fd
    finally:
        os.close(fd)


def kinds(disk):
    """Return what happened since the device was attached, which flushes it."""
    seen = [operation.kind for operation in disk.operations()]
    return list(itertools.dropwhile(lambda kind: kind is Kind.FLUSH, seen))


def write(device, number):
    """Write a block past the page cache, flush, and return the error's number."""
    block = mmap.mmap(-1, 4096)
    try:
        os.pwrite(device, block, number * 8192)
        os.fsync(device)
    except OSError as error:
        return error.errno
    return 0


def test_what_is_written_is_recorded_in_order(faultdisk):
    """Nothing stays in a page cache below the device; a flush comes after its data."""
    disk = faultdisk.disk(4 * MIB)
    with opened(disk) as device:
        for number in range(3):
            os.pwrite(device, bytes([number + 1]) * 4096, number * 8192)
            os.fsync(device)
            disk.note(f"written {number}")
    assert kinds(disk)[:9] == [Kind.WRITE, Kind.FLUSH, Kind.NOTE] * 3
    writes = [op for op in disk.operations() if op.kind is Kind.WRITE]
    assert [op.offset for op in writes] == [0, 8192, 16384]
    assert [op.data[:1] for op in writes] == [b"\1", b"\2", b"\3"]


def test_what_nobody_flushes_is_not_flushed(faultdisk):
    disk = faultdisk.disk(MIB)
    with opened(disk, os.O_DIRECT) as device:
        os.pwrite(device, mmap.mmap(-1, 4096), 0)
        disk.note("written")
        assert kinds(disk) == [Kind.WRITE, Kind.NOTE]
        os.fsync(device)
        assert kinds(disk) == [Kind.WRITE, Kind.NOTE, Kind.FLUSH]


def test_a_discard_is_a_change(faultdisk):
    disk = faultdisk.disk(4 * MIB)
    with opened(disk) as device:
        os.pwrite(device, b"x" * MIB, 0)
        os.fsync(device)
    run(["blkdiscard", "--offset", "4096", "--length", "8192", disk.device])
    zeros = [op for op in disk.operations() if op.kind is Kind.ZERO]
    assert [(op.offset, op.length) for op in zeros] == [(4096, 8192)]
    with opened(disk) as device:
        assert os.pread(device, 12288, 0) == b"x" * 4096 + bytes(8192)


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_the_nth_write_fails_and_only_that(faultdisk, error):
    disk = faultdisk.disk(4 * MIB)
    disk.fail("write", nth=2, error=error)
    with opened(disk, os.O_DIRECT) as device:
        assert [write(device, number) for number in range(3)] == [0, error, 0]
    assert disk.counts()["failed"] == 1
    writes = [op.offset for op in disk.operations() if op.kind is Kind.WRITE]
    assert writes == [0, 2 * 8192]


def test_a_flush_that_fails_and_one_that_lies(faultdisk):
    disk = faultdisk.disk(4 * MIB)
    with opened(disk, os.O_DIRECT) as device:
        disk.fail("flush")
        assert write(device, 0) == errno.EIO
        disk.lie_about_flushes()
        assert write(device, 1) == 0
        disk.mend()
        assert write(device, 2) == 0
    assert kinds(disk)[:2] == [Kind.WRITE] * 2
    assert kinds(disk)[2:5] == [Kind.LIE, Kind.WRITE, Kind.FLUSH]


def test_without_power_everything_fails(faultdisk):
    disk = faultdisk.disk(4 * MIB)
    with opened(disk, os.O_DIRECT) as device:
        assert write(device, 0) == 0
        disk.cut_power()
        disk.note("never")
        assert write(device, 1) == errno.EIO
    assert kinds(disk) == [Kind.WRITE, Kind.FLUSH]


def test_an_order_that_makes_no_sense_is_an_error(faultdisk):
    disk = faultdisk.disk(MIB)
    with pytest.raises(ValueError, match="expected 1 or more"):
        disk.fail("write", nth=0)
    with pytest.raises(FaultDiskError, match=r"no order .dance"):
        disk._order("dance")
    disk.note("it lives on")


def test_a_machine_without_fuse_is_told_so(tmpfs, monkeypatch):
    image = tmpfs / "image"
    image.write_bytes(bytes(MIB))
    monkeypatch.setenv("FUSE_LIBRARY_PATH", "/nonexistent/libfuse.so")
    with (
        pytest.raises(EnvironmentNotReadyError, match="libfuse3-3"),
        FaultDisk(image, tmpfs),
    ):
        pass
    assert list(tmpfs.iterdir()) == [image]


@pytest.mark.usefixtures("expected_failure")
def test_a_check_that_leaves_a_file_open_is_told_its_error(faultdisk):
    """And nothing stays mounted because of it."""
    held = []

    def check(crash):
        held.append((crash.directory / "held").open("w"))
        raise ValueError("this is wrong")

    recording = faultdisk.record("ext4", lambda fs: fs.disk.note("done"))
    with pytest.raises(CrashStateError, match="ValueError: this is wrong"):
        faultdisk.examine(recording, check)
    held.pop().close()
    assert not re.search(r"/faultdisk-.* ext4 ", mounts())


def mounts():
    return Path("/proc/self/mountinfo").read_text()


def test_nothing_of_a_disk_stays(tmpfs):
    image = tmpfs / "image"
    with image.open("wb") as file:
        file.truncate(MIB)
    with FaultDisk(image, tmpfs) as disk:
        process = disk._process
        assert str(tmpfs) + "/" in mounts()
        with opened(disk):
            pass
    assert process.returncode == 0
    assert str(tmpfs) + "/" not in mounts()
    assert list(tmpfs.iterdir()) == [image]


def test_nothing_of_a_disk_survives_who_made_it(tmpfs):
    """The process is killed with a disk in use; its server unmounts and ends."""
    program = (
        "import os, pathlib, signal, sys\n"
        "from qubes_itests.faultdisk import FaultDisk\n"
        "place = pathlib.Path(sys.argv[1])\n"
        "image = place / 'image'\n"
        "image.write_bytes(bytes(1 << 20))\n"
        "disk = FaultDisk(image, place).__enter__()\n"
        "print(disk._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    argv = [sys.executable, "-c", program, tmpfs]
    output = subprocess.run(argv, capture_output=True, check=False).stdout
    assert ends(int(output))
    assert str(tmpfs) + "/" not in mounts()


def ends(pid):
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], 300)[0])
    finally:
        os.close(process)
