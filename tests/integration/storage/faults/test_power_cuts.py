"""file-reflink loses nothing in a power cut, and the test would notice if it did."""

from __future__ import annotations

import os
import stat
import sys
from functools import partial

import pool_scenario
import pytest

from qubes_itests.faultdisk import CrashStateError
from qubes_storage import pool_class

#: Of each recording; there are two on each filesystem. What is planted below is found
#: within 50.
STATES = 60


@pytest.fixture
def survives(faultdisk, power_cuts):
    """Return a function that examines a recording, each state of which must be good.

    Most power cuts come after the first step, or nothing would be judged.
    """

    def examine(recording, states=STATES, **options):
        judged = []

        def check(crash):
            judged.append(pool_scenario.survives(crash, **options))

        assert faultdisk.examine(recording, check, states) == power_cuts(states)
        assert len(judged) == power_cuts(states)
        assert judged.count(True) > len(judged) / 2

    return examine


@pytest.mark.parametrize("kind", ["btrfs", "xfs"])
def test_a_power_cut_leaves_the_old_state_or_the_new_one(kind, faultdisk, survives):
    """All operations, cut anywhere, with parts of what was not flushed lost."""
    survives(faultdisk.record(kind, pool_scenario.live))


@pytest.mark.parametrize("kind", ["btrfs", "xfs"])
def test_so_it_does_while_others_flush(kind, faultdisk, survives):
    """Names then reach the disk before contents, unless somebody sees to it."""

    def busy(filesystem):
        with filesystem.neighbour():
            pool_scenario.live(filesystem)

    survives(faultdisk.record(kind, busy))


def test_the_driver_file_survives_power_cuts_too(faultdisk, survives):
    """It copies where the other shares, here on a filesystem that cannot share."""
    driver = pool_class("file")
    recording = faultdisk.record(
        "ext4", partial(pool_scenario.live, pool_class=driver), size=64 * 1024**2
    )
    survives(recording, STATES // 2, pool_class=driver)


def without_fsync_of(kind):
    """Return an fsync that the driver calls in vain for one kind of files."""
    real = os.fsync

    def fsync(descriptor):
        by_driver = sys._getframe(1).f_globals["__name__"].startswith("qubes_storage.")
        if not (by_driver and kind(os.fstat(descriptor).st_mode)):
            real(descriptor)

    return fsync


@pytest.mark.usefixtures("expected_failure")
@pytest.mark.parametrize("kind", ["btrfs", "xfs"])
@pytest.mark.parametrize("forgotten", [stat.S_ISREG, stat.S_ISDIR])
def test_a_driver_without_an_fsync_is_caught(kind, forgotten, faultdisk, monkeypatch):
    """Within 50 states: the contents, or the names, are not what was promised."""

    def sabotaged(filesystem):
        with filesystem.neighbour(), monkeypatch.context() as patch:
            patch.setattr(os, "fsync", without_fsync_of(forgotten))
            pool_scenario.live(filesystem)

    recording = faultdisk.record(kind, sabotaged)
    with pytest.raises(CrashStateError) as caught:
        faultdisk.examine(recording, pool_scenario.survives, 50)
    assert caught.value.step == "the check"
    assert "--itests-crash-replay" in caught.value.replay


@pytest.mark.usefixtures("expected_failure")
@pytest.mark.parametrize("kind", ["btrfs", "xfs"])
def test_a_disk_that_lies_about_flushes_is_caught(kind, faultdisk):
    """The driver does all it can, and what it promised is lost nevertheless."""

    def lied_to(filesystem):
        filesystem.disk.lie_about_flushes()
        pool_scenario.live(filesystem)

    recording = faultdisk.record(kind, lied_to)
    with pytest.raises(CrashStateError):
        faultdisk.examine(recording, pool_scenario.survives, 50)
