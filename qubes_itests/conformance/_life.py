"""Tests of the kinds of volumes: what each holds when its VM starts and stops."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

from qubes_itests.conformance.features import feature
from qubes_itests.conformance.trial import SIZE, Trial
from qubes_storage.exc import (
    StoragePoolException,
    VolumeExistsError,
    VolumeNotFoundError,
    VolumeStateError,
)

if TYPE_CHECKING:
    from qubes_storage import Volume

__all__ = ["KindTests", "LifeTests"]


class LifeTests:
    """What all saved volumes do."""

    @feature("life")
    def test_new_volume_is_empty_and_as_large_as_configured(self, trial: Trial) -> None:
        """It reads as zeros, to the last byte."""
        volume = trial.made()
        assert volume.size == SIZE
        trial.run(volume.verify())
        assert not volume.is_dirty()
        trial.run(volume.start())
        with volume.block_device().path.open("rb") as image:
            assert image.read() == bytes(SIZE)

    @feature("life")
    def test_what_a_vm_writes_is_there_at_its_next_start(self, trial: Trial) -> None:
        """It is committed by the stop."""
        volume = trial.made()
        trial.run(volume.start())
        assert volume.block_device().rw
        trial.write(volume, "first")
        trial.run(volume.stop())
        assert not volume.is_dirty()
        assert trial.started(volume) == "first"

    @feature("dirty")
    @pytest.mark.parametrize("keep", [None, -1])
    def test_volume_is_dirty_from_its_start_to_its_stop(
        self, trial: Trial, keep: int | None
    ) -> None:
        """With the revisions of the pool, and without snapshots."""
        volume = trial.made(revisions_to_keep=keep)
        assert not volume.is_dirty()
        trial.run(volume.start())
        assert volume.is_dirty()
        trial.run(volume.stop())
        assert not volume.is_dirty()

    @feature("strict_states")
    def test_each_operation_is_refused_in_the_wrong_state(self, trial: Trial) -> None:
        """A second start, removal while started, a second creation."""
        volume = trial.made("first")
        for again in (volume.create, volume.check_absent):
            with pytest.raises(VolumeExistsError):
                trial.run(again())
        assert volume.vid in trial.run(trial.pool.find_volumes())
        trial.run(volume.start())
        trial.write(volume, "second")
        with pytest.raises(VolumeStateError):
            trial.run(volume.start())
        with pytest.raises(VolumeStateError):
            trial.run(volume.remove())
        assert trial.read(volume) == "second"
        trial.run(volume.stop())
        trial.run(volume.stop())
        assert trial.started(volume) == "second"

    @feature("life")
    def test_volume_that_was_not_created_does_not_start(self, trial: Trial) -> None:
        """Verification says so before a VM does."""
        volume = trial.volume()
        for action in (volume.verify, volume.start):
            with pytest.raises(VolumeNotFoundError):
                trial.run(action())

    @feature("errors")
    def test_start_that_failed_can_be_repeated(self, trial: Trial) -> None:
        """Once its cause is gone."""
        volume = trial.volume()
        with pytest.raises(VolumeNotFoundError):
            trial.run(volume.start())
        trial.run(volume.create())
        assert trial.started(volume) == ""

    @feature("life")
    def test_removed_volume_is_gone(self, trial: Trial) -> None:
        """A new one of its name is empty; removing twice is no error."""
        volume = trial.made("secret")
        trial.run(volume.remove())
        trial.run(volume.remove())
        with pytest.raises(VolumeNotFoundError):
            trial.run(volume.start())
        assert trial.started(trial.made()) == ""

    @feature("life")
    def test_pool_knows_its_volumes(self, trial: Trial) -> None:
        """By id and as a list, until they are removed."""
        volume = trial.made()
        assert trial.pool.get_volume(volume.vid) is volume
        assert volume in trial.pool.list_volumes()
        trial.run(volume.remove())
        assert volume not in trial.pool.list_volumes()
        with pytest.raises(VolumeNotFoundError):
            trial.pool.get_volume(volume.vid)

    @feature("life")
    def test_volumes_of_one_name_are_independent(self, trial: Trial) -> None:
        """Each VM has its own."""
        one, other = trial.made("one", vm="one"), trial.made("other", vm="other")
        trial.run(one.start())
        trial.write(one, "changed")
        assert trial.started(other) == "other"
        trial.run(one.remove() if not one.is_dirty() else one.stop())
        assert trial.read(other) == "other"

    @feature("strict_states")
    def test_of_many_starts_at_once_one_succeeds(self, trial: Trial) -> None:
        """The others say that it is started."""
        volume = trial.made()

        async def start_ten_times() -> list[Volume | BaseException]:
            starts = (volume.start() for _ in range(10))
            return await asyncio.gather(*starts, return_exceptions=True)

        outcomes = trial.run(start_ten_times())
        refused = [found for found in outcomes if found is not volume]
        assert [type(error) for error in refused] == [VolumeStateError] * 9

    @feature("life")
    def test_volumes_start_and_stop_beside_each_other(self, trial: Trial) -> None:
        """Twenty at once, and each has its own content."""
        volumes = [trial.made(f"of {n}", vm=f"work{n}") for n in range(20)]

        async def start_all() -> None:
            await asyncio.gather(*(volume.start() for volume in volumes))

        async def stop_all() -> None:
            await asyncio.gather(*(volume.stop() for volume in volumes))

        trial.run(start_all())
        for number, volume in enumerate(volumes):
            assert trial.read(volume) == f"of {number}"
            trial.write(volume, f"new {number}")
        trial.run(stop_all())
        trial.run(start_all())
        contents = [trial.read(volume) for volume in volumes]
        assert contents == [f"new {number}" for number in range(20)]


class KindTests:
    """What snapshots, volatile and read-only volumes do."""

    @feature("snapshots")
    def test_snapshot_starts_from_its_source_and_forgets_what_is_written(
        self, trial: Trial
    ) -> None:
        """The source does not change, and another snapshot of it is independent."""
        source = trial.made("source", vm="template")
        one = trial.made(kind="snapshot", vm="one", source=source)
        other = trial.made(kind="snapshot", vm="other", source=source)
        assert trial.started(one) == trial.started(other) == "source"
        assert one.size == source.size
        trial.write(one, "one")
        assert trial.read(other) == "source"
        trial.run(one.stop())
        assert trial.started(one) == "source"
        assert trial.started(source) == "source"

    @feature("snapshots")
    def test_snapshot_needs_a_source_with_an_image(self, trial: Trial) -> None:
        """Verification says so as well."""
        source = trial.volume(vm="template")
        snapshot = trial.made(kind="snapshot", source=source)
        for action in (snapshot.verify, snapshot.start):
            with pytest.raises(VolumeNotFoundError):
                trial.run(action())

    @feature("snapshots")
    def test_snapshots_of_one_source_start_at_once(self, trial: Trial) -> None:
        """Ten VMs on one template."""
        source = trial.made("source", vm="template")
        snapshots = [
            trial.made(kind="snapshot", vm=f"work{n}", source=source) for n in range(10)
        ]

        async def start_all() -> None:
            await asyncio.gather(*(snapshot.start() for snapshot in snapshots))

        trial.run(start_all())
        assert {trial.read(snapshot) for snapshot in snapshots} == {"source"}

    @feature("snapshot_running_source")
    def test_source_may_run(self, trial: Trial) -> None:
        """What it writes is seen after its stop and the snapshot's own restart."""
        source = trial.made("old", vm="template")
        snapshot = trial.made(kind="snapshot", source=source)
        trial.run(source.start())
        trial.write(source, "new")
        assert trial.started(snapshot) == "old"
        trial.run(source.stop())
        assert trial.read(snapshot) == "old"
        trial.run(snapshot.stop())
        assert trial.started(snapshot) == "new"

    @feature("snapshot_saved")
    def test_saved_snapshot_is_committed_as_its_own(self, trial: Trial) -> None:
        """Its next start is from the source again, its own image can be exported."""
        source = trial.made("source", vm="template")
        both = trial.made(kind="both", source=source)
        trial.session(both, "own")
        assert trial.committed(both) == "own"
        assert trial.committed(source) == "source"
        assert trial.started(both) == "source"

    @feature("outdated")
    def test_snapshot_is_outdated_once_its_source_is_committed_anew(
        self, trial: Trial
    ) -> None:
        """Not while the source runs, and not any more after a restart."""
        source = trial.made("old", vm="template")
        snapshot = trial.made(kind="snapshot", source=source)
        assert not snapshot.is_outdated()
        trial.run(snapshot.start())
        assert not snapshot.is_outdated()
        trial.session(source, "new")
        assert snapshot.is_outdated()
        assert not source.is_outdated()
        trial.run(snapshot.stop())
        assert not snapshot.is_outdated()
        trial.run(snapshot.start())
        assert not snapshot.is_outdated()

    @feature("volatile")
    def test_volatile_volume_is_empty_at_every_start(self, trial: Trial) -> None:
        """It has its size, and is never dirty."""
        volume = trial.made(kind="volatile")
        for _ in range(2):
            assert trial.started(volume) == ""
            assert volume.size == SIZE
            assert not volume.is_dirty()
            trial.write(volume, "secret")
            trial.run(volume.stop())
        assert dict(volume.revisions) == {}

    @feature("strict_states")
    def test_volatile_volume_has_nothing_to_export_or_to_replace(
        self, trial: Trial
    ) -> None:
        """It holds nothing while it is not started."""
        volume = trial.made(kind="volatile")
        for action in (volume.export, volume.import_data):
            with pytest.raises(VolumeStateError):
                trial.run(action())

    @feature("read_only")
    def test_read_only_volume_changes_by_imports_alone(self, trial: Trial) -> None:
        """Starts and stops leave it as it is."""
        volume = trial.made(kind="read_only")
        trial.run(volume.import_volume(trial.made("kernel", vm="other")))
        for _ in range(2):
            assert trial.started(volume) == "kernel"
            assert not volume.block_device().rw
            assert not volume.is_dirty()
            trial.run(volume.stop())

    @feature("snapshots")
    def test_source_is_not_lost_with_its_snapshot(self, trial: Trial) -> None:
        """Removing a snapshot touches nothing but it."""
        source = trial.made("source", vm="template")
        snapshot = trial.made(kind="snapshot", source=source)
        trial.run(snapshot.start())
        with contextlib.suppress(StoragePoolException):
            trial.run(snapshot.remove())
        trial.run(snapshot.stop())
        trial.run(snapshot.remove())
        assert trial.started(source) == "source"
