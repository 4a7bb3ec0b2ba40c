"""Tests of contents: revisions, resizing, imports, exports."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from qubes_itests.conformance.features import feature
from qubes_itests.conformance.trial import MIB, SIZE, Owner, Trial
from qubes_storage import StoragePoolException
from qubes_storage.exc import (
    InvalidSizeError,
    VolumeNotFoundError,
    VolumeStateError,
)
from qubes_storage.reflink import ReflinkPool

if TYPE_CHECKING:
    from pathlib import Path

    from qubes_storage import Volume

__all__ = ["ResizeTests", "RevisionTests", "TransferTests"]


class RevisionTests:
    """Former images."""

    @feature("revisions")
    def test_former_image_is_kept_and_reverted_to(self, trial: Trial) -> None:
        """What was there before the revert becomes a revision."""
        volume = trial.made("one", revisions_to_keep=1)
        trial.session(volume, "two")
        assert len(volume.revisions) == 1
        trial.run(volume.revert())
        assert trial.committed(volume) == "one"
        assert len(volume.revisions) == 1
        trial.run(volume.revert())
        assert trial.started(volume) == "two"

    @feature("revisions")
    def test_revert_is_refused_while_the_vm_runs(self, trial: Trial) -> None:
        """And what the VM writes is committed as if nothing had been tried."""
        volume = trial.made("one", revisions_to_keep=1)
        trial.session(volume, "two")
        trial.run(volume.start())
        trial.write(volume, "three")
        with pytest.raises(VolumeStateError):
            trial.run(volume.revert())
        trial.run(volume.stop())
        assert trial.committed(volume) == "three"
        trial.run(volume.revert())
        assert trial.started(volume) == "two"

    @feature("revisions")
    def test_revert_changes_what_snapshots_start_from(self, trial: Trial) -> None:
        """One that runs keeps what it started from, and is outdated."""
        source = trial.made("good", vm="template", revisions_to_keep=1)
        trial.session(source, "bad")
        snapshot = trial.made(kind="snapshot", source=source)
        trial.run(snapshot.start())
        trial.run(source.revert())
        assert trial.read(snapshot) == "bad"
        assert snapshot.is_outdated()
        trial.run(snapshot.stop())
        assert trial.started(snapshot) == "good"

    @feature("revisions")
    def test_unknown_revision_is_an_error(self, trial: Trial) -> None:
        """Whatever it is called, and also where there are none."""
        volume = trial.made("one", revisions_to_keep=0)
        assert dict(volume.revisions) == {}
        for name in (None, "1@2026-01-02T03:04:05Z", "../private", ""):
            with pytest.raises(VolumeNotFoundError):
                trial.run(volume.revert(name))
        assert trial.committed(volume) == "one"

    @feature("many_revisions")
    def test_revisions_are_in_order_and_the_oldest_go(self, trial: Trial) -> None:
        """Each can be reverted to by its id."""
        volume = trial.made(revisions_to_keep=3)
        trial.session(volume, "1", "2", "3", "4", "5")
        ids = list(volume.revisions)
        assert len(ids) == 3
        trial.run(volume.revert(ids[0]))
        assert trial.committed(volume) == "2"
        left = list(volume.revisions)
        assert left[:2] == ids[1:]
        trial.run(volume.revert(left[0]))
        assert trial.committed(volume) == "3"
        trial.run(volume.revert())
        assert trial.committed(volume) == "2"

    @feature("many_revisions")
    def test_keeping_fewer_takes_effect_at_the_next_commit(self, trial: Trial) -> None:
        """Three become one, then none."""
        volume = trial.made(revisions_to_keep=3)
        trial.session(volume, "1", "2", "3")
        assert len(volume.revisions) == 3
        for keep in (1, 0):
            volume.revisions_to_keep = keep
            trial.session(volume, f"keep {keep}")
            assert len(volume.revisions) == keep
        assert trial.committed(volume) == "keep 0"

    @feature("no_snapshot")
    def test_volume_without_snapshots_is_committed_all_the_same(
        self, trial: Trial
    ) -> None:
        """It has no revisions."""
        volume = trial.made("one", revisions_to_keep=-1)
        assert dict(volume.revisions) == {}
        trial.session(volume, "two")
        assert dict(volume.revisions) == {}
        assert trial.committed(volume) == "two"

    @feature("strict_states")
    def test_volume_without_snapshots_is_not_exported_while_its_vm_runs(
        self, trial: Trial
    ) -> None:
        """What it has then is being written."""
        volume = trial.made("one", revisions_to_keep=-1)
        trial.run(volume.start())
        with pytest.raises(VolumeStateError):
            trial.run(volume.export())

    @feature("export")
    def test_image_that_others_rely_on_is_not_written(self, trial: Trial) -> None:
        """A reader keeps what it was given."""
        volume = trial.made("one", revisions_to_keep=-1)
        path = trial.run(volume.export())
        with path.open("rb"):
            trial.session(volume, "two")
        trial.run(volume.export_end(path))
        assert trial.committed(volume) == "two"


class ResizeTests:
    """Larger volumes, and smaller ones."""

    @feature("stopped_resize")
    def test_stopped_volume_grows_and_keeps_its_content(self, trial: Trial) -> None:
        """The new part reads as zeros."""
        volume = trial.made("kept")
        trial.run(volume.resize(2 * SIZE))
        assert volume.size == 2 * SIZE
        assert trial.started(volume) == "kept"
        with volume.block_device().path.open("rb") as image:
            image.seek(SIZE)
            assert image.read() == bytes(SIZE)

    @feature("stopped_shrink")
    def test_stopped_volume_shrinks_and_keeps_the_rest(self, trial: Trial) -> None:
        """What was cut off does not come back when it grows again."""
        volume = trial.made("kept")
        trial.run(volume.resize(SIZE // 2))
        assert volume.size == SIZE // 2
        trial.run(volume.resize(SIZE))
        trial.run(volume.start())
        with volume.block_device().path.open("rb") as image:
            assert image.read(4) == b"kept"
            image.seek(SIZE // 2)
            assert image.read() == bytes(SIZE // 2)

    @feature("online_resize")
    def test_running_volume_grows_at_once_and_for_good(self, trial: Trial) -> None:
        """What the VM has open is larger, and so is what it commits."""
        volume = trial.made("kept")
        trial.run(volume.start())
        path = volume.block_device().path
        with path.open("rb") as image:
            trial.run(volume.resize(2 * SIZE))
            assert image.seek(0, os.SEEK_END) == 2 * SIZE
        assert volume.size == 2 * SIZE
        assert trial.read(volume) == "kept"
        trial.run(volume.stop())
        assert volume.size == 2 * SIZE
        assert trial.started(volume) == "kept"

    @feature("snapshots")
    def test_snapshots_and_volatile_volumes_grow_while_they_run(
        self, trial: Trial
    ) -> None:
        """A snapshot has its source's size again at its next start."""
        source = trial.made("source", vm="template")
        snapshot = trial.made(kind="snapshot", source=source)
        volatile = trial.made(kind="volatile")
        for volume in (snapshot, volatile):
            trial.run(volume.start())
            trial.run(volume.resize(2 * SIZE))
            assert volume.size == 2 * SIZE
            trial.run(volume.stop())
        assert trial.started(snapshot) == "source"
        assert snapshot.size == SIZE

    @feature("size_checks")
    @pytest.mark.parametrize("size", [0, 1, SIZE - 1, -1, 2**63, 1.5, "1M", None, True])
    def test_bad_size_is_refused(self, trial: Trial, size: object) -> None:
        """Stopped and running; nothing is changed.  One less than now: running only."""
        volume = trial.made("kept")
        smaller = size in (1, SIZE - 1) and size is not True
        for prepare in (volume.start,) if smaller else (volume.verify, volume.start):
            trial.run(prepare())
            with pytest.raises(InvalidSizeError) as caught:
                trial.run(volume.resize(size))  # type: ignore[arg-type]
            assert caught.value.vid == volume.vid
            assert volume.size == SIZE
        assert trial.read(volume) == "kept"


class TransferTests:
    """Imports and exports."""

    @feature("export")
    def test_export_stays_what_it_was(self, trial: Trial) -> None:
        """While the VM starts, writes, stops; the next export has the new content."""
        volume = trial.made("old")
        path = trial.run(volume.export())
        with path.open("rb") as image:
            trial.session(volume, "new")
            assert image.read(3) == b"old"
        trial.run(volume.export_end(path))
        assert trial.committed(volume) == "new"

    @feature("export")
    def test_export_of_a_running_volume_is_what_was_committed(
        self, trial: Trial
    ) -> None:
        """Without what its VM has written since."""
        volume = trial.made("old")
        trial.run(volume.start())
        trial.write(volume, "new")
        assert trial.committed(volume) == "old"

    @feature("import_data")
    @pytest.mark.parametrize("size", [MIB, SIZE, 2 * SIZE])
    def test_import_replaces_content_and_size(self, trial: Trial, size: int) -> None:
        """When it is ended, and not before."""
        volume = trial.made("old")
        path = trial.run(volume.import_data(size))
        _fill(path, size)
        assert trial.committed(volume) == "old"
        trial.run(volume.import_data_end(success=True))
        assert volume.size == size
        trial.run(volume.start())
        with volume.block_device().path.open("rb") as image:
            assert image.read() == b"i" * size

    @feature("import_creates")
    def test_import_begins_a_volume(self, trial: Trial) -> None:
        """One that was never created needs no creation then."""
        volume = trial.volume()
        path = trial.run(volume.import_data())
        trial.write(path, "imported")
        trial.run(volume.import_data_end(success=True))
        assert volume.size == SIZE
        assert dict(volume.revisions) == {}
        assert trial.started(volume) == "imported"

    @feature("import_data")
    def test_failed_import_changes_nothing(self, trial: Trial) -> None:
        """Neither content nor size nor revisions, and the next one works."""
        volume = trial.made("old")
        revisions = dict(volume.revisions)
        path = trial.run(volume.import_data(2 * SIZE))
        trial.write(path, "bad")
        trial.run(volume.import_data_end(success=False))
        assert (volume.size, dict(volume.revisions)) == (SIZE, revisions)
        assert trial.committed(volume) == "old"
        trial.write(trial.run(volume.import_data()), "good")
        trial.run(volume.import_data_end(success=True))
        assert trial.started(volume) == "good"

    @feature("size_checks")
    @pytest.mark.parametrize("length", [0, MIB - 1, MIB + 1])
    def test_import_of_another_length_is_dropped(
        self, trial: Trial, length: int
    ) -> None:
        """Where the import is a file; a device has the length that was declared."""
        volume = trial.made("old")
        path = trial.run(volume.import_data(MIB))
        if not path.is_file():
            trial.run(volume.import_data_end(success=False))
            return
        path.write_bytes(b"i" * length)
        with pytest.raises(InvalidSizeError):
            trial.run(volume.import_data_end(success=True))
        assert volume.size == SIZE
        assert trial.started(volume) == "old"

    @feature("strict_states")
    def test_import_and_vm_keep_apart(self, trial: Trial) -> None:
        """No start during an import, no import while started, no end without one."""
        volume = trial.made("old")
        with pytest.raises(VolumeStateError):
            trial.run(volume.import_data_end(success=True))
        trial.run(volume.import_data())
        for action in (volume.start, volume.import_data, volume.revert):
            with pytest.raises(VolumeStateError):
                trial.run(action())
        trial.run(volume.import_data_end(success=False))
        trial.run(volume.start())
        with pytest.raises(VolumeStateError):
            trial.run(volume.import_data())
        assert trial.read(volume) == "old"

    @feature("export")
    def test_volume_is_imported_as_it_was_committed(self, trial: Trial) -> None:
        """With its size, and without what its VM has written since."""
        source = trial.made("source", vm="other", size=2 * SIZE)
        volume = trial.made("old")
        trial.run(source.start())
        trial.write(source, "uncommitted")
        trial.run(volume.import_volume(source))
        assert volume.size == 2 * SIZE
        assert trial.started(volume) == "source"

    @feature("import_volume")
    def test_imports_cross_pools_both_ways(self, trial: Trial, tmp_path: Path) -> None:
        """From and to a pool of another driver, on another filesystem."""
        foreign = ReflinkPool(name="foreign", dir_path=tmp_path, setup_check="no")
        trial.run(foreign.setup())
        config = {"name": "private", "rw": True, "save_on_stop": True, "size": SIZE}
        there = foreign.init_volume(Owner("work"), config)
        here = trial.made("here")
        trial.run(there.import_volume(here))
        trial.session(there, "there")
        trial.run(here.import_volume(there))
        assert trial.started(here) == "there"

    @feature("import_volume")
    def test_import_into_what_keeps_nothing_does_nothing(self, trial: Trial) -> None:
        """As when a VM is cloned with all its volumes."""
        volatile = trial.made(kind="volatile")
        trial.run(volatile.import_volume(trial.made("source", vm="other")))
        assert trial.started(volatile) == ""

    @feature("import_volume")
    def test_failed_import_of_a_volume_changes_nothing(self, trial: Trial) -> None:
        """Its source has no image."""
        volume = trial.made("old")
        missing: Volume = trial.volume(vm="other")
        with pytest.raises(StoragePoolException):
            trial.run(volume.import_volume(missing))
        assert trial.started(volume) == "old"

    @feature("strict_states")
    def test_nothing_is_imported_while_the_vm_runs(self, trial: Trial) -> None:
        """From another volume, either."""
        volume = trial.made("old")
        trial.run(volume.start())
        with pytest.raises(VolumeStateError):
            trial.run(volume.import_volume(trial.made("source", vm="third")))
        assert trial.read(volume) == "old"


def _fill(path: Path, size: int) -> None:
    with path.open("r+b") as image:
        image.write(b"i" * size)
