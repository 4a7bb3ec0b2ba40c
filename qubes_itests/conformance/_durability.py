"""Tests of durability, and of invalid configurations."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from qubes_itests.conformance.features import feature
from qubes_itests.conformance.trial import MIB, SIZE, Owner, Trial
from qubes_storage import StoragePoolException
from qubes_storage.exc import (
    InvalidSizeError,
    InvalidVolumeConfigError,
    VolumeError,
    VolumeNotFoundError,
)

if TYPE_CHECKING:
    from qubes_storage import Pool, Volume

__all__ = ["AccountTests", "CrashTests", "ErrorTests"]


_SAVED: dict[str, Any] = {"rw": True, "save_on_stop": True, "size": SIZE}


class CrashTests:
    """What another pool object, or another process, finds."""

    @feature("reopening")
    def test_new_pool_object_finds_everything(self, trial: Trial) -> None:
        """Contents and sizes, from the volumes' `config` alone."""
        volume = trial.made("one", size=2 * SIZE)
        volatile = trial.made(kind="volatile")
        volume, volatile = trial.reopen(volume, volatile)
        assert trial.committed(volume) == "one"
        assert volume.size == 2 * SIZE
        assert trial.started(volatile) == ""

    @feature("snapshots")
    def test_new_pool_object_finds_the_source(self, trial: Trial) -> None:
        """From the volumes' `config` alone."""
        source = trial.made("source", vm="template")
        snapshot = trial.made(kind="snapshot", source=source)
        source, snapshot = trial.reopen(source, snapshot)
        assert trial.started(snapshot) == "source"
        assert trial.started(source) == "source"

    @feature("many_revisions")
    def test_new_pool_object_finds_the_revisions(self, trial: Trial) -> None:
        """In their order."""
        volume = trial.made(revisions_to_keep=3)
        trial.session(volume, "1", "2", "3")
        revisions = dict(volume.revisions)
        (volume,) = trial.reopen(volume)
        assert list(volume.revisions.items()) == list(revisions.items())
        trial.run(volume.revert())
        assert trial.committed(volume) == "2"

    @feature("crash_recovery")
    def test_killed_process_loses_nothing_that_its_vm_had_written(
        self, trial: Trial
    ) -> None:
        """The committed image is the old one; the next start goes on with the new."""
        volume = trial.made("old")
        self._kill_while_started(trial, volume, "new")
        assert volume.is_dirty()
        assert trial.started(volume) == "new"
        trial.run(volume.stop())
        assert trial.committed(volume) == "new"

    @feature("crash_recovery")
    def test_what_a_killed_process_left_can_be_committed_without_a_start(
        self, trial: Trial
    ) -> None:
        """A stop does it, as after a crash of the machine that runs no VM again."""
        volume = trial.made("old")
        self._kill_while_started(trial, volume, "new")
        trial.run(volume.stop())
        assert not volume.is_dirty()
        assert trial.committed(volume) == "new"

    @feature("crash_recovery")
    @pytest.mark.parametrize("kind", ["snapshot", "volatile"])
    def test_killed_process_leaves_no_trace_of_what_is_not_saved(
        self, trial: Trial, kind: str
    ) -> None:
        """The next start is a fresh one."""
        source = trial.made("source", vm="template")
        config: dict[str, Any] = {"source": source} if kind == "snapshot" else {}
        volume = trial.made(kind=kind, **config)
        self._kill_while_started(trial, volume, "left")
        assert not volume.is_dirty()
        assert trial.started(volume) == ("source" if config else "")

    @feature("crash_recovery")
    def test_killed_process_leaves_no_import(self, trial: Trial) -> None:
        """The content is the old one, and a start is not in the way."""
        volume = trial.made("old")

        async def begin_import(pool: Pool) -> None:
            trial.write(await trial.again(pool, volume).import_data(), "half")

        with trial.process(begin_import):
            pass
        assert trial.started(volume) == "old"
        trial.run(volume.stop())
        assert trial.committed(volume) == "old"

    @feature("second_process")
    def test_second_process_cannot_use_a_started_volume(self, trial: Trial) -> None:
        """Until the first one is gone; then the volume is gone on with."""
        volume = trial.made("old")

        async def start(pool: Pool) -> None:
            other = trial.again(pool, volume)
            await other.start()
            trial.write(other, "new")

        with trial.process(start):
            for action in (
                volume.start,
                volume.stop,
                volume.remove,
                volume.revert,
                volume.import_data,
            ):
                with pytest.raises(VolumeError):
                    trial.run(action())
        assert trial.started(volume) == "new"

    @feature("second_process")
    def test_second_process_sees_what_was_committed(self, trial: Trial) -> None:
        """Two processes use one volume in turn."""
        volume = trial.made("one")

        async def commit(pool: Pool) -> None:
            other = trial.again(pool, volume)
            await other.start()
            trial.write(other, "two")
            await other.stop()

        with trial.process(commit):
            assert trial.started(volume) == "two"

    @staticmethod
    def _kill_while_started(trial: Trial, volume: Volume, content: str) -> None:
        async def start(pool: Pool) -> None:
            other = trial.again(pool, volume)
            await other.start()
            trial.write(other, content)

        with trial.process(start):
            pass


class AccountTests:
    """Sizes, usage, and configurations."""

    @feature("accounting")
    def test_usage_follows_what_is_written(self, trial: Trial) -> None:
        """Of the volume; an empty one takes next to nothing."""
        volume = trial.made(size=8 * MIB)
        empty = volume.usage
        trial.run(volume.start())
        with volume.block_device().path.open("r+b") as image:
            image.write(b"x" * 4 * MIB)
        trial.run(volume.stop())
        assert empty + 3 * MIB < volume.usage < empty + 6 * MIB
        assert volume.size == 8 * MIB

    @feature("accounting")
    def test_pool_tells_its_size_and_usage(self, trial: Trial) -> None:
        """Or None, where that has no meaning; the details agree."""
        pool = trial.pool
        if pool.size is not None and pool.usage is not None:
            assert pool.size > pool.usage >= 0
        details = pool.usage_details
        assert all(type(value) is int for value in details.values())
        if pool.size is not None:
            assert details["data_size"] == pool.size

    @feature("shared_extents")
    def test_starting_takes_no_room(self, trial: Trial) -> None:
        """Of a volume and of a snapshot of it, 16 MiB each."""
        size = 16 * MIB
        source = trial.made(vm="template", size=size)
        trial.run(source.start())
        with source.block_device().path.open("r+b") as image:
            image.write(os.urandom(size))
        trial.run(source.stop())
        snapshot = trial.made(kind="snapshot", source=source)
        before = trial.usage()
        trial.run(source.start())
        trial.run(snapshot.start())
        taken = trial.usage() - before
        if taken > size // 2:
            raise StoragePoolException(
                f"pool {trial.pool.name!r}: two starts of {size} bytes took {taken}"
            )

    @feature("accounting")
    def test_configuration_makes_the_same_pool(self, trial: Trial) -> None:
        """`config` has the driver's name, and all that it takes."""
        volume = trial.made("kept")
        settings = dict(trial.pool.config)
        trial.run(trial.pool.destroy())
        same = trial.pool_class(str(settings.pop("driver")))(**settings)
        trial.pool = same
        trial.run(same.setup())
        assert type(same) is type(volume.pool)
        assert trial.committed(trial.again(same, volume)) == "kept"

    @feature("accounting")
    def test_volume_takes_the_revisions_to_keep_of_its_pool(self, trial: Trial) -> None:
        """Unless it is configured otherwise."""
        assert trial.volume().revisions_to_keep == trial.pool.revisions_to_keep
        assert trial.volume(vm="other", revisions_to_keep=0).revisions_to_keep == 0


class ErrorTests:
    """Configurations that are not valid."""

    @feature("config_checks")
    @pytest.mark.parametrize(
        "name",
        ["..", ".hidden", "a/b", "a\nb", "a" * 300, "", "a b", "é", "/abs", "a\0b"],
    )
    def test_bad_name_is_refused(self, trial: Trial, name: str) -> None:
        """Of a VM and of a volume; the pool does not get to know it."""
        before = trial.pool.list_volumes()
        for owner, volume in (("work", name), (name, "private")):
            with pytest.raises(InvalidVolumeConfigError):
                trial.pool.init_volume(Owner(owner), {**_SAVED, "name": volume})
        with pytest.raises(InvalidVolumeConfigError):
            trial.pool.init_volume(
                None, {**_SAVED, "name": "private", "vid": f"appvms/{name}/private"}
            )
        assert trial.pool.list_volumes() == before

    @feature("size_checks")
    @pytest.mark.parametrize("size", [-1, 2**63, 1.5, "1M", True])
    def test_bad_size_of_a_new_volume_is_refused(
        self, trial: Trial, size: object
    ) -> None:
        """The error names the volume."""
        config = {**_SAVED, "name": "private", "size": size}
        with pytest.raises(InvalidSizeError) as caught:
            trial.pool.init_volume(Owner("work"), config)
        assert caught.value.vid == "appvms/work/private"

    @feature("size_checks")
    def test_empty_volume_is_refused(self, trial: Trial) -> None:
        """A disk has at least one byte."""
        volume = trial.volume(size=0)
        with pytest.raises(InvalidSizeError):
            trial.run(volume.create())

    @feature("config_checks")
    @pytest.mark.parametrize(
        "change",
        [
            {"snap_on_start": True},
            {"revisions_to_keep": -2},
            {"revisions_to_keep": "1"},
            {"colour": "red"},
            {"name": None},
            {"pool": "another"},
        ],
    )
    def test_configuration_without_sense_is_refused(
        self, trial: Trial, change: dict[str, Any]
    ) -> None:
        """With an error of storage's own."""
        config = {**_SAVED, "name": "private", **change}
        with pytest.raises(InvalidVolumeConfigError):
            trial.pool.init_volume(Owner("work"), config)

    @feature("config_checks")
    def test_source_has_to_be_of_the_same_pool(self, trial: Trial) -> None:
        """And to exist."""
        source = trial.made("source", vm="template")
        config = {"name": "root", "rw": True, "snap_on_start": True}
        with pytest.raises(InvalidVolumeConfigError):
            trial.other_pool().init_volume(Owner("work"), {**config, "source": source})
        with pytest.raises(VolumeNotFoundError):
            trial.pool.init_volume(Owner("work"), {**config, "source": "a/b/c"})

    @feature("errors")
    def test_every_error_is_of_storage_and_names_the_volume(self, trial: Trial) -> None:
        """With pool, id, operation and reason as attributes."""
        volume = trial.volume()
        with pytest.raises(StoragePoolException) as caught:
            trial.run(volume.start())
        error = caught.value
        assert isinstance(error, VolumeError)
        assert (error.pool, error.vid) == (trial.pool.name, volume.vid)
        assert error.action == "start"
        assert error.reason in str(error)
