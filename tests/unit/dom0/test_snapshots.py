"""Devices of the driver `file`: what a snapshot shows while its origin goes on."""

import errno
import os

import pytest

from qubes_itests.dom0 import snapshots
from qubes_itests.dom0.snapshots import create_snapshot, destroy_snapshot

SIZE = 1 << 20


@pytest.fixture
def mapper(tmp_path, monkeypatch):
    place = tmp_path / "mapper"
    place.mkdir()
    monkeypatch.setattr(snapshots, "MAPPER", place)
    return place


@pytest.fixture
def new(tmp_path):
    """Return a function that makes a sparse file, as the driver does."""

    def make(name):
        path = tmp_path / name
        path.touch()
        os.truncate(path, SIZE)
        return path

    return make


def write(path, data):
    with path.open("r+b") as file:
        file.write(data)


@pytest.mark.parametrize("before", [b"old", b""])
def test_a_snapshot_shows_what_was_when_the_origin_began(mapper, new, before):
    """Also of a volume that nothing has been written to."""
    volume, changes = new("root.img"), new("root-cow.img")
    write(volume, before)
    create_snapshot("origin", volume, changes)
    write(mapper / "origin", b"new")
    assert volume.read_bytes().startswith(b"new")
    first, second = new("a-cow.img"), new("b-cow.img")
    create_snapshot("a", volume, changes, first)
    create_snapshot("b", volume, changes, second)
    write(mapper / "a", b"own")
    shown = (mapper / "b").read_bytes()
    assert shown == before + bytes(SIZE - len(before))
    assert (mapper / "a").read_bytes()[:3] == b"own"
    assert volume.read_bytes()[:3] == b"new"
    # its VM is killed, and started again: nobody has put the old state away
    create_snapshot("origin", volume, changes)
    third = new("c-cow.img")
    create_snapshot("c", volume, changes, third)
    assert (mapper / "c").read_bytes() == shown


def test_a_snapshot_without_an_origin_leaves_no_sign_of_one(mapper, new):
    """By data in that file the driver tells a volume that was not stopped."""
    volume, changes, own = new("root.img"), new("root-cow.img"), new("a-cow.img")
    write(volume, b"old")
    create_snapshot("a", volume, changes, own)
    assert (mapper / "a").read_bytes()[:3] == b"old"
    assert changes.stat().st_blocks == 0
    create_snapshot("origin", volume, changes)
    write(mapper / "origin", b"new")
    assert (mapper / "a").read_bytes()[:3] == b"old"


def test_a_device_is_removed_without_its_files(mapper, new):
    volume, changes = new("root.img"), new("root-cow.img")
    create_snapshot("origin", volume, changes)
    destroy_snapshot(mapper / "origin")
    assert (list(mapper.iterdir()), volume.exists(), changes.exists()) == (
        [],
        True,
        True,
    )
    with pytest.raises(FileNotFoundError):
        destroy_snapshot(mapper / "origin")


def test_files_that_are_no_devices_stay(mapper, new):
    volume, changes = new("root.img"), new("root-cow.img")
    for device in (volume, mapper / "../root.img"):
        with pytest.raises(ValueError, match=r"expected a device in .*root\.img"):
            destroy_snapshot(device)
    for name in ("../root.img", str(volume)):
        with pytest.raises(ValueError, match=r"expected a device in .*root\.img"):
            create_snapshot(name, volume, changes)
    assert not volume.is_symlink()
    assert changes.stat().st_blocks == 0


@pytest.mark.usefixtures("mapper")
def test_half_a_copy_does_not_pass_for_one(new, monkeypatch):
    """A disk may be full; the next start finds all as before."""
    volume, changes = new("root.img"), new("root-cow.img")
    write(volume, b"old")

    def half(_source, target):
        os.pwrite(target, b"ol", 0)
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(snapshots, "clone_or_copy", half)
        with pytest.raises(OSError, match="full"):
            create_snapshot("origin", volume, changes)
    assert (changes.stat().st_blocks, changes.stat().st_size) == (0, SIZE)
    create_snapshot("origin", volume, changes)
    assert changes.read_bytes()[:4] == b"old\0"
