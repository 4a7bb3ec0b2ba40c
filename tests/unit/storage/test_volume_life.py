"""What each kind of volume does at start and stop, and what changes it in between."""

from __future__ import annotations

import asyncio

import pytest

from qubes_storage.exc import (
    InvalidSizeError,
    VolumeExistsError,
    VolumeNotFoundError,
    VolumeStateError,
)


@pytest.fixture
def saved(shop):
    volume = shop.volume()
    shop.run(volume.create())
    return volume


def test_a_saved_volume_keeps_what_its_vm_wrote(shop, saved):
    shop.session(saved, b"1")
    shop.run(saved.start())
    assert shop.read(saved.path) == b"1"
    assert saved.size == shop.SIZE


def test_a_saved_volume_is_dirty_between_start_and_stop(shop, saved):
    assert not saved.is_dirty()
    shop.run(saved.start())
    assert saved.is_dirty()
    assert shop.committed(saved) == b"\0"
    shop.run(saved.stop())
    assert not saved.is_dirty()


def test_a_volatile_volume_is_new_at_each_start(shop):
    volume = shop.volume("volatile")
    shop.run(volume.create())
    shop.session(volume, b"1")
    shop.run(volume.start())
    assert shop.read(volume.path, shop.SIZE + 1) == b"\0" * shop.SIZE
    assert not volume.is_dirty()


def test_a_volatile_volume_is_new_after_a_crash(shop):
    volume = shop.volume("volatile")
    shop.run(volume.start())
    shop.write(volume.path, b"1")
    shop.reopen()
    volume = shop.volume("volatile", size=shop.SIZE * 2)
    shop.run(volume.start())
    assert shop.read(volume.path) == b"\0"
    assert volume.size == volume.path.stat().st_size == shop.SIZE * 2


def test_a_snapshot_loses_what_its_vm_wrote(shop):
    snapshot = shop.volume("snapshot", source=shop.template(b"T"))
    shop.run(snapshot.create())
    shop.session(snapshot, b"x")
    shop.run(snapshot.start())
    assert shop.read(snapshot.path) == b"T"
    assert shop.committed(snapshot.source) == b"T"
    shop.run(snapshot.stop())
    assert shop.tree() == {path for path in shop.tree() if "vm-templates" in path}


def test_a_snapshot_sees_a_change_after_the_stop_of_both(shop):
    """The origin must stop, and then the snapshot start anew; neither is enough."""
    template = shop.template(b"1")
    snapshot = shop.volume("snapshot", source=template)
    shop.run(template.start())
    shop.write(template.path, b"2")
    shop.run(snapshot.start())
    assert shop.read(snapshot.path) == b"1"
    assert not snapshot.is_outdated()
    shop.run(template.stop())
    assert shop.read(snapshot.path) == b"1"
    assert snapshot.is_outdated()
    shop.run(snapshot.stop())
    assert not snapshot.is_outdated()
    shop.run(snapshot.start())
    assert shop.read(snapshot.path) == b"2"
    assert not snapshot.is_outdated()


def test_a_snapshot_that_is_saved_keeps_its_own_changes_as_revisions(shop):
    both = shop.volume("both", source=shop.template(b"T"), revisions_to_keep=2)
    shop.session(both, b"1")
    shop.session(both, b"2")
    assert shop.committed(both) == b"2"
    assert shop.kept(both) == b"1"
    shop.run(both.start())
    assert shop.read(both.path) == b"T"
    assert not both.is_outdated()
    shop.session(both.source, b"U")
    assert both.is_outdated()


def test_a_read_only_volume_hands_out_its_committed_image(shop):
    kernel = shop.volume("read_only")
    path = shop.run(kernel.import_data(3))
    path.write_bytes(b"abc")
    shop.run(kernel.import_data_end(success=True))
    shop.run(kernel.start())
    assert kernel.path.read_bytes() == b"abc"
    assert not kernel.block_device().rw
    shop.run(kernel.stop())
    assert kernel.path.read_bytes() == b"abc"


def test_a_second_start_is_refused_and_spares_the_running_image(shop):
    for kind in ("saved", "volatile"):
        volume = shop.volume(kind)
        shop.run(volume.create())
        shop.run(volume.start())
        shop.write(volume.path, b"1")
        with pytest.raises(VolumeStateError, match="started already"):
            shop.run(volume.start())
        assert shop.read(volume.path) == b"1"


def test_a_volume_without_image_does_not_start(shop):
    for volume in (shop.volume(), shop.volume("read_only")):
        with pytest.raises(VolumeNotFoundError, match="create or import"):
            shop.run(volume.start())
        with pytest.raises(VolumeNotFoundError):
            shop.run(volume.verify())
    assert shop.tree() == set()


def test_a_snapshot_of_nothing_does_not_start(shop):
    template = shop.template()
    snapshot = shop.volume("snapshot", source=template)
    shop.run(snapshot.verify())
    shop.run(template.remove())
    for action in (snapshot.verify, snapshot.start):
        with pytest.raises(VolumeNotFoundError, match="vm-templates/tiny/root"):
            shop.run(action())


def test_creating_twice_is_refused_and_changes_nothing(shop, saved):
    shop.session(saved, b"1")
    with pytest.raises(VolumeExistsError):
        shop.run(saved.create())
    assert shop.committed(saved) == b"1"


def test_creating_in_an_existing_directory_works(shop):
    volume = shop.volume()
    volume.files.directory.mkdir(parents=True)
    (volume.files.directory / "notes.txt").write_text("mine")
    shop.run(volume.create())
    shop.run(volume.remove())
    assert shop.tree() == {"appvms/work/notes.txt"}


def test_an_empty_image_is_not_created(shop):
    with pytest.raises(InvalidSizeError):
        shop.run(shop.volume(size=0).create())


def test_removing_leaves_nothing_and_can_be_repeated(shop, saved):
    for content in (b"1", b"2"):
        shop.session(saved, content)
    shop.run(saved.prepare())
    shop.run(saved.remove())
    assert shop.tree() == set()
    assert not saved.files.directory.exists()
    shop.run(saved.remove())


def test_removing_a_started_volume_is_refused(shop, saved):
    shop.run(saved.start())
    with pytest.raises(VolumeStateError):
        shop.run(saved.remove())
    assert saved.path.exists()


@pytest.mark.parametrize(
    ("keep", "kept"), [(0, b""), (1, b"2"), (2, b"12"), (9, b"\x0012"), (-1, b"")]
)
def test_as_many_revisions_are_kept_as_configured(shop, keep, kept):
    volume = shop.volume(revisions_to_keep=keep)
    shop.run(volume.create())
    for content in (b"1", b"2", b"3"):
        shop.session(volume, content)
    assert shop.committed(volume) == b"3"
    assert shop.kept(volume) == kept
    assert list(volume.revisions) == [r.id for r in volume.files.revisions()]


def test_a_revision_is_the_former_image_itself(shop, saved):
    """A commit copies nothing: the old image gets a second name, then loses one."""
    before = saved.files.clean.stat().st_ino
    shop.run(saved.start())
    written = saved.path.stat().st_ino
    shop.run(saved.stop())
    (revision,) = saved.files.revisions()
    assert saved.files.revision(revision).stat().st_ino == before
    assert saved.files.clean.stat().st_ino == written


def test_without_any_snapshot_the_image_itself_is_written(shop):
    volume = shop.volume(revisions_to_keep=-1)
    shop.run(volume.create())
    before = volume.files.clean.stat().st_ino
    shop.session(volume, b"1")
    assert volume.files.clean.stat().st_ino == before
    shop.run(volume.start())
    with pytest.raises(VolumeStateError, match="no snapshot"):
        shop.run(volume.export())


def test_an_image_that_others_rely_on_is_never_written(shop):
    """Not even where no snapshots are kept: its other names would change too."""
    template = shop.template(b"1")
    snapshot = shop.volume("snapshot", source=template)
    shop.run(snapshot.start())
    template.revisions_to_keep = -1
    shop.session(template, b"2")
    assert snapshot.is_outdated()
    assert shop.read(snapshot.files.clean) == b"1"


def test_an_image_that_is_being_exported_is_never_written(shop):
    volume = shop.volume(revisions_to_keep=-1)
    shop.run(volume.create())
    image = shop.run(volume.export())
    with image.open("rb") as reader:
        shop.session(volume, b"1")
        assert reader.read(1) == b"\0"
    shop.run(volume.export_end(image))


def test_revert_takes_the_latest_revision_and_keeps_the_present_one(shop, saved):
    saved.revisions_to_keep = 5
    for content in (b"1", b"2", b"3"):
        shop.session(saved, content)
    shop.run(saved.revert())
    assert shop.committed(saved) == b"2"
    assert shop.kept(saved) == b"\x00123"
    shop.run(saved.revert())
    assert shop.committed(saved) == b"3"


def test_revert_goes_to_any_revision(shop, saved):
    saved.revisions_to_keep = 5
    for content in (b"1", b"2", b"3"):
        shop.session(saved, content)
    shop.run(saved.revert(list(saved.revisions)[1]))
    assert shop.committed(saved) == b"1"
    shop.session(saved, b"4")
    assert shop.kept(saved) == b"\x001231"


def test_a_prepared_clone_never_outlives_its_image(shop, saved):
    """After a revert, a resize, an import the next start sees their result."""
    shop.session(saved, b"1")
    shop.session(saved, b"2")
    shop.run(saved.prepare())
    shop.run(saved.revert())
    shop.run(saved.start())
    assert shop.read(saved.path) == b"1"
    shop.run(saved.stop())
    shop.run(saved.prepare())
    shop.run(saved.resize(shop.SIZE * 2))
    shop.run(saved.start())
    assert saved.path.stat().st_size == shop.SIZE * 2
    shop.run(saved.stop())
    shop.run(saved.prepare())
    shop.run(saved.import_volume(shop.template(b"T")))
    shop.run(saved.start())
    assert shop.read(saved.path) == b"T"


def test_a_prepared_clone_is_what_the_next_start_takes(shop, saved):
    shop.session(saved, b"1")
    shop.run(saved.prepare())
    prepared = saved.files.precache.stat().st_ino
    shop.run(saved.start())
    assert saved.path.stat().st_ino == prepared
    assert shop.read(saved.path) == b"1"
    assert not saved.files.precache.exists()


@pytest.mark.parametrize("revision", ["7@2026-01-02T03:04:05Z", "../work", ""])
def test_an_unknown_revision_is_an_error(shop, saved, revision):
    shop.session(saved, b"1")
    with pytest.raises(VolumeNotFoundError):
        shop.run(saved.revert(revision))
    assert shop.committed(saved) == b"1"


def test_reverting_a_running_volume_is_refused(shop, saved):
    shop.session(saved, b"1")
    shop.run(saved.start())
    with pytest.raises(VolumeStateError):
        shop.run(saved.revert())


def test_revisions_of_both_spellings_are_in_order(shop, saved):
    clean = saved.files.clean
    names = [
        "@2018-01-02T03:04:05Z",
        "@2019-01-01T00:00:00Z",
        ".2@2031-01-01T00:00:00Z",
        ".10@2026-01-01T00:00:00Z",
    ]
    for name in reversed(names):
        clean.with_name(f"{clean.name}{name}").write_bytes(name[-2:-1].encode())
    for stranger in (".x@2026-01-01T00:00:00Z", ".1@yesterday", "@", ".bak"):
        clean.with_name(f"{clean.name}{stranger}").touch()
    assert list(saved.revisions) == [
        "2018-01-02T03:04:05Z",
        "2019-01-01T00:00:00Z",
        "2@2031-01-01T00:00:00Z",
        "10@2026-01-01T00:00:00Z",
    ]
    saved.revisions_to_keep = 9
    shop.run(saved.revert("2018-01-02T03:04:05Z"))
    assert clean.read_bytes() == b"5"
    assert list(saved.revisions)[-1].startswith("11@")
    shop.run(saved.remove())
    assert len(shop.tree()) == 4


def test_resizing_a_stopped_volume_replaces_its_image(shop, saved):
    """The committed image may be a snapshot's origin: it must not change."""
    shop.session(saved, b"1")
    before = saved.files.clean.stat().st_ino
    shop.run(saved.resize(shop.SIZE * 3))
    assert saved.files.clean.stat().st_ino != before
    assert saved.size == saved.files.clean.stat().st_size == shop.SIZE * 3
    assert shop.committed(saved) == b"1"
    assert len(saved.revisions) == 1


def test_a_stopped_volume_shrinks_as_it_is_told(shop, saved):
    """The snapshots that run have what they had."""
    shop.session(saved, b"1")
    snapshot = shop.volume("snapshot", source=saved)
    shop.run(snapshot.start())
    shop.run(saved.resize(1000))
    assert saved.size == saved.files.clean.stat().st_size == 1000
    assert snapshot.path.stat().st_size == snapshot.size == shop.SIZE
    shop.run(saved.start())
    for size in (999, 1):
        with pytest.raises(InvalidSizeError, match="while it is started"):
            shop.run(saved.resize(size))
    assert saved.path.stat().st_size == saved.size == 1000


@pytest.mark.parametrize("kind", ["saved", "volatile", "snapshot"])
def test_resizing_a_running_volume_grows_its_image(shop, kind):
    source = {"source": shop.template(b"T")} if kind == "snapshot" else {}
    volume = shop.volume(kind, **source)
    shop.run(volume.create())
    shop.run(volume.start())
    shop.run(volume.resize(shop.SIZE * 2))
    assert volume.size == volume.path.stat().st_size == shop.SIZE * 2
    if kind == "saved":
        assert volume.files.clean.stat().st_size == shop.SIZE
    shop.run(volume.stop())
    shop.run(volume.start())
    assert volume.size == shop.SIZE * (1 if kind == "snapshot" else 2)


@pytest.mark.parametrize("size", [0, -1, 2**63, "1M", 1.5, True])
def test_a_bad_new_size_is_refused(shop, saved, size):
    with pytest.raises(InvalidSizeError):
        shop.run(saved.resize(size))
    assert saved.size == shop.SIZE


def test_what_is_never_written_is_not_resized(shop):
    kernel = shop.volume("read_only")
    shop.run(kernel.create())
    snapshot = shop.volume("snapshot", source=shop.template())
    for volume in (kernel, snapshot):
        with pytest.raises(VolumeStateError):
            shop.run(volume.resize(shop.SIZE * 2))


def test_an_import_replaces_content_and_size(shop, saved):
    shop.session(saved, b"1")
    path = shop.run(saved.import_data(4096))
    assert path.stat().st_size == 4096
    path.write_bytes(b"2" * 4096)
    assert shop.committed(saved) == b"1"
    shop.run(saved.import_data_end(success=True))
    assert saved.size == 4096
    assert shop.committed(saved) == b"2"
    shop.run(saved.revert())
    assert shop.committed(saved) == b"1"


def test_a_failed_import_changes_nothing(shop, saved):
    shop.session(saved, b"1")
    before = shop.tree()
    path = shop.run(saved.import_data())
    path.write_bytes(b"2" * shop.SIZE)
    shop.run(saved.import_data_end(success=False))
    assert shop.tree() == before
    assert shop.committed(saved) == b"1"


@pytest.mark.parametrize("length", [0, 4095, 4097])
def test_an_import_of_another_length_is_dropped(shop, saved, length):
    before = shop.tree()
    path = shop.run(saved.import_data(4096))
    path.write_bytes(b"2" * length)
    with pytest.raises(
        InvalidSizeError, match=f"expected 4096 bytes as declared, got {length}"
    ):
        shop.run(saved.import_data_end(success=True))
    assert shop.tree() == before
    shop.run(saved.start())


def test_nothing_else_happens_during_an_import(shop, saved):
    shop.run(saved.import_data())
    for action in (
        saved.start,
        saved.import_data,
        saved.revert,
        lambda: saved.resize(shop.SIZE * 2),
        lambda: saved.import_volume(shop.template()),
    ):
        with pytest.raises(VolumeStateError, match="import is under way"):
            shop.run(action())


def test_a_stop_does_not_end_an_import(shop, saved):
    path = shop.run(saved.import_data())
    shop.run(saved.stop())
    shop.write(path, b"2")
    shop.run(saved.import_data_end(success=True))
    assert shop.committed(saved) == b"2"


def test_ending_what_did_not_begin_is_an_error(shop, saved):
    with pytest.raises(VolumeStateError, match="no import"):
        shop.run(saved.import_data_end(success=True))


def test_importing_into_a_running_volume_is_refused(shop, saved):
    shop.run(saved.start())
    with pytest.raises(VolumeStateError):
        shop.run(saved.import_data())
    with pytest.raises(VolumeStateError):
        shop.run(saved.import_volume(shop.template()))


def test_importing_a_volume_takes_its_committed_content_and_size(shop):
    template = shop.template(b"T")
    shop.run(template.start())
    shop.write(template.path, b"x")
    clone = shop.volume(size=512)
    shop.run(clone.import_volume(template))
    assert shop.committed(clone) == b"T"
    assert clone.size == shop.SIZE


def test_importing_into_what_keeps_nothing_does_nothing(shop):
    volume = shop.volume("volatile")
    shop.run(volume.import_volume(shop.template(b"T")))
    shop.run(volume.start())
    assert shop.read(volume.path) == b"\0"


def test_a_source_in_another_pool_can_be_imported(shop, tmp_path):
    template = shop.template(b"T")
    shop.directory = tmp_path / "other"
    shop.reopen()
    clone = shop.volume()
    shop.run(clone.import_volume(template))
    assert shop.committed(clone) == b"T"


@pytest.mark.asyncio
async def test_operations_on_one_volume_wait_for_each_other(tmp_path, shop_class):
    """Twenty starts at once: one succeeds, the others find it started."""
    shop = await asyncio.to_thread(shop_class, tmp_path / "pool")
    volume = shop.volume()
    await volume.create()
    results = await asyncio.gather(
        *(volume.start() for _ in range(20)), return_exceptions=True
    )
    assert [type(result) for result in results if result is not volume] == [
        VolumeStateError
    ] * 19
