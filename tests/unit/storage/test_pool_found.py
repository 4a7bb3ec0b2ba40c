"""What a pool finds on its disk: volumes, leftovers, and what is not its own."""

from __future__ import annotations

import os

import pytest

from qubes_storage.exc import (
    InvalidVolumeConfigError,
    StoragePoolException,
    VolumeError,
    VolumeNotFoundError,
)
from qubes_storage.file import FilePool
from qubes_storage.layout import parse_name
from qubes_storage.reflink import ReflinkPool


def vids(shop):
    return sorted(volume.vid for volume in shop.pool.list_volumes())


def test_setup_finds_the_volumes_that_are_on_the_disk(shop):
    volume = shop.volume()
    shop.run(volume.create())
    shop.session(volume, b"1")
    shop.template(b"T")
    shop.reopen()
    assert vids(shop) == ["appvms/work/private", "vm-templates/tiny/root"]
    found = shop.pool.get_volume("appvms/work/private")
    assert found.name == "private"
    assert len(found.revisions) == 1
    assert found.size == shop.SIZE


def test_what_is_no_volume_is_not_found(shop):
    vm = shop.directory / "appvms" / "work"
    vm.mkdir(parents=True)
    for name in (
        "notes.txt",
        ".img",
        "private.img~01234567",
        "private-precache.img",
        "private-cow.img",
        "private.img.1@2026-01-02T03:04:05Z",
        "ünsafe.img",
        f"{'x' * 200}.img",
    ):
        (vm / name).touch()
    (shop.directory / "appvms" / "-bad").mkdir()
    (shop.directory / "appvms" / "-bad" / "private.img").touch()
    (shop.directory / "file.img").touch()
    shop.reopen()
    assert vids(shop) == []


def test_a_found_volume_cannot_lose_data_by_a_start(shop):
    """Nobody has said what it is: it is handed out read-only, as it is committed."""
    volume = shop.volume()
    shop.run(volume.create())
    shop.session(volume, b"1")
    shop.run(volume.start())
    shop.write(volume.path, b"2")
    shop.reopen()
    found = shop.pool.get_volume(volume.vid)
    shop.run(found.start())
    assert found.path == volume.files.clean
    assert not found.block_device().rw
    shop.run(found.stop())
    configured = shop.volume()
    assert configured.is_dirty()
    shop.run(configured.stop())
    assert shop.committed(configured) == b"2"


def test_a_found_volume_can_be_a_source(shop):
    shop.template(b"T")
    shop.reopen()
    snapshot = shop.volume("snapshot", source="vm-templates/tiny/root")
    shop.run(snapshot.start())
    assert shop.read(snapshot.path) == b"T"


def test_a_removed_volume_is_not_listed(shop):
    volume = shop.volume()
    shop.run(volume.create())
    shop.run(volume.remove())
    assert vids(shop) == []
    with pytest.raises(VolumeNotFoundError):
        shop.pool.get_volume(volume.vid)


def left(volume):
    """Return names of leftovers of a volume, of every kind."""
    clean = volume.files.clean
    names = (
        "private.img~01234567",
        "private-dirty.img~01234567",
        "private-precache.img~01234567",
        "private.img.3@2026-01-02T03:04:05Z~01234567.removed",
        "private-import.img",
        "private-cow.img",
        "private-cow.img.old",
    )
    return [clean.with_name(name) for name in names]


@pytest.mark.parametrize("opening", ["setup", "start", "remove"])
def test_leftovers_of_every_kind_go(shop, opening):
    volume = shop.volume()
    shop.run(volume.create())
    for path in left(volume):
        path.touch()
    if opening == "setup":
        shop.reopen()
    elif opening == "start":
        shop.session(volume, b"1")
    else:
        shop.run(volume.remove())
    assert not [path for path in shop.tree() if "~" in path]
    assert not [path for path in left(volume) if path.exists()]


def test_setup_leaves_what_is_not_ours(shop):
    vm = shop.directory / "appvms" / "work"
    vm.mkdir(parents=True)
    theirs = {
        "private.img~",
        "private.img~0123456g",
        "private.img~01234567.removed.bak",
        "private.txt~01234567.removed",
        "private-cow.img.older",
        "private.img.old",
        "private-import.img.txt",
        "~01234567.removed",
    }
    for name in theirs:
        (vm / name).touch()
    shop.reopen()
    assert {path.rpartition("/")[2] for path in shop.tree()} == theirs


@pytest.mark.parametrize("impostor", ["directory", "symlink", "fifo"])
def test_an_impostor_of_a_leftover_stays(shop, impostor, tmp_path):
    volume = shop.volume()
    shop.run(volume.create())
    path = volume.files.directory / "private.img~01234567"
    if impostor == "directory":
        path.mkdir()
    elif impostor == "symlink":
        path.symlink_to(tmp_path)
    else:
        os.mkfifo(path)
    with pytest.raises(VolumeError, match="not a regular file"):
        shop.run(volume.start())
    assert os.path.lexists(path)


def test_setup_spares_an_import_that_is_under_way(shop):
    volume = shop.volume()
    path = shop.run(volume.import_data())
    other = ReflinkPool(name="other", dir_path=shop.directory, setup_check="no")
    shop.run(other.setup())
    assert path.exists()
    shop.run(volume.import_data_end(success=True))
    shop.run(other.destroy())


def test_a_tree_of_the_other_driver_opens_unchanged(shop):
    """Whichever of the two wrote it; what a copy-on-write file was for is past."""
    pool = FilePool(name="file", dir_path=shop.directory)
    shop.run(pool.setup())
    shop.run(shop.pool.destroy())
    shop.pool = pool
    volume = shop.volume()
    shop.run(volume.create())
    shop.session(volume, b"1")
    shop.session(volume, b"2")
    for name in ("private-cow.img", "private-cow.img.old", "volatile.img"):
        (volume.files.directory / name).write_bytes(b"old")
    shop.run(pool.destroy())
    shop.reopen()
    volume = shop.volume()
    assert shop.kept(volume) == b"1"
    shop.run(volume.start())
    assert shop.read(volume.path) == b"2"
    shop.run(volume.stop())
    assert not [name for name in shop.tree() if "cow" in name]
    assert "appvms/work/volatile.img" in shop.tree()


def test_a_driver_that_copies_shares_nothing(shop):
    pool = FilePool(name="file", dir_path=shop.directory)
    shop.run(pool.setup())
    assert not pool.shares_extents
    assert pool.config == {
        "name": "file",
        "driver": "file",
        "dir_path": str(shop.directory),
        "revisions_to_keep": 1,
        "ephemeral_volatile": False,
    }


@pytest.mark.parametrize(
    ("name", "volume"),
    [
        ("private.img", "private"),
        ("private-dirty.img", "private"),
        ("a.img.img", "a.img"),
        ("x-dirty-dirty.img", "x-dirty"),
        ("private.img@2018-01-02T03:04:05Z", "private"),
        ("private.img.12@2018-01-02T03:04:05Z~01234567.removed", "private"),
        ("private-dirty.img.old", None),
        ("private.img\n", None),
        ("", None),
    ],
)
def test_the_name_of_a_file_tells_its_volume(name, volume):
    parsed = parse_name(name)
    assert (parsed and parsed.volume) == volume


def test_an_id_of_a_copy_on_write_file_is_no_volume(shop):
    with pytest.raises(InvalidVolumeConfigError):
        shop.volume(name="private-cow")


@pytest.mark.parametrize(
    "options",
    [
        {"name": "../x"},
        {"name": ""},
        {"name": "a\nb"},
        {"name": "x" * 300},
        {"name": ".hidden"},
        {"name": None},
        {"dir_path": ""},
        {"dir_path": None},
        {"dir_path": 7},
        {"revisions_to_keep": -2},
        {"revisions_to_keep": "many"},
        {"revisions_to_keep": 1.5},
        {"revisions_to_keep": True},
        {"ephemeral_volatile": "maybe"},
        {"setup_check": "maybe"},
    ],
)
def test_a_pool_of_senseless_options_is_refused(tmp_path, options):
    with pytest.raises(StoragePoolException):
        ReflinkPool(**{"name": "p", "dir_path": tmp_path / "p", **options})
    assert not list(tmp_path.iterdir())


def test_options_may_be_words_as_in_a_configuration_file(tmp_path):
    pool = ReflinkPool(
        name="p",
        dir_path=str(tmp_path),
        revisions_to_keep="-1",
        setup_check="no",
        ephemeral_volatile="yes",
    )
    assert (pool.revisions_to_keep, pool.setup_check) == (-1, False)
    assert pool.ephemeral_volatile


def test_an_ephemeral_volatile_image_is_emptied_before_it_goes(shop, monkeypatch):
    """Its blocks are free when stop returns, even if its removal has to wait."""
    shop.reopen(ephemeral_volatile=True)
    volume = shop.volume("volatile")
    shop.run(volume.start())
    shop.write(volume.path, b"secret")
    monkeypatch.setattr(shop.pool.background, "soon", lambda *_: None)
    shop.run(volume.stop())
    (path,) = volume.files.given_up()
    assert path.stat().st_size == 0


def test_a_directory_that_is_no_directory_is_a_typed_error(shop):
    volume = shop.volume()
    (shop.directory / "appvms").write_text("mine")
    with pytest.raises(VolumeError) as caught:
        shop.run(volume.create())
    assert caught.value.vid == volume.vid


def test_usage_is_told_by_the_names_of_the_admin_api(shop):
    details = shop.pool.usage_details
    assert details == {"data_size": shop.pool.size, "data_usage": shop.pool.usage}
    assert 0 < details["data_usage"] < details["data_size"]
