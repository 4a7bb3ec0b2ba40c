"""The file of a store after a power cut at any moment, and on a disk that fails."""

import errno
import os

import pytest

from qubes_itests.core.store.file import StoreFile
from qubes_itests.faultdisk import CrashStateError

SAVES = 15
STATES = 60


def state(number):
    # of several blocks, and of other lengths
    return b"%d\n" % number * (2000 + 700 * (number % 3))


def save(store, number):
    store.write(state(number), store.next_version())


def workload(fs):
    store = StoreFile(fs.mount_point / "qubes.xml")
    with fs.neighbour():
        for number in range(SAVES):
            save(store, number)
            fs.disk.note(str(number))
    store.release()


def check(crash):
    """Find what was promised or the one after it, and go on from there."""
    store = StoreFile(crash.directory / "qubes.xml")
    promised = int(crash.reached[-1]) if crash.reached else -1
    if store.path.exists():
        assert store.read() in (state(promised), state(promised + 1))
    else:
        assert promised == -1
    save(store, SAVES)
    store.release()
    assert StoreFile(store.path).read() == state(SAVES)
    assert not store.path.with_name("qubes.xml.new").exists()


@pytest.mark.parametrize("kind", ["btrfs", "xfs", "ext4"])
def test_power_cuts_lose_nothing_that_was_saved(kind, faultdisk, power_cuts):
    recording = faultdisk.record(kind, workload)
    examined = faultdisk.examine(recording, check, states=STATES)
    assert examined == power_cuts(STATES)


def test_check_would_see_a_save_that_is_not_brought_to_the_disk(faultdisk, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _fd: None)
    recording = faultdisk.record("xfs", workload)
    monkeypatch.undo()
    with pytest.raises(CrashStateError):
        faultdisk.examine(recording, check, states=STATES)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_disk_that_fails_leaves_what_was_saved(faultdisk, error):
    fs = faultdisk.filesystem("xfs")
    store = StoreFile(fs.mount_point / "qubes.xml")
    save(store, 1)
    fs.disk.fail("write", error=error, times=None)
    with pytest.raises(OSError, match=r"error|space"):
        save(store, 2)
    fs.disk.mend()
    store.release()
    fs.unmount()
    fs.mount()
    again = StoreFile(store.path)
    assert again.read() in (state(1), state(2))
    save(again, 3)
    again.release()
    assert StoreFile(store.path).read() == state(3)
