"""A disk that fails under a pool: what was claimed holds, the rest is as it was."""

from __future__ import annotations

import errno

import pytest
from pool_scenario import SIZE, Scenario, must_work

from qubes_storage.exc import StoragePoolException

pytestmark = pytest.mark.parametrize("kind", ["btrfs", "xfs"])


class Machine:
    """A filesystem on a disk that can fail, and a pool with a volume on it."""

    def __init__(self, filesystem):
        self.disk = filesystem.disk
        self._filesystem = filesystem
        self.scenario = Scenario(filesystem.mount_point)
        self.scenario.create("work", 0)

    def clean(self):
        return self.scenario.observe()["work"]["clean"]

    def attempt(self, operation, *arguments):
        """Return the error of an operation on the volume, None if there is none."""
        try:
            self.scenario.run("work", operation, *arguments)
        except StoragePoolException as error:
            return error
        return None

    def close(self):
        self.scenario.close()

    def restart(self):
        """Start over with the disk mended."""
        self.close()
        self._filesystem.unmount()
        self.disk.mend()
        self._filesystem.mount()
        self.scenario = Scenario(self._filesystem.mount_point)


@pytest.fixture
def machine(kind, faultdisk):
    machine = Machine(faultdisk.filesystem(kind))
    yield machine
    machine.close()


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("operation", ["write", "flush"])
def test_a_disk_that_fails_during_a_stop(machine, error, operation):
    """Each of the first writes or flushes of a commit fails, and all that follow."""
    refused = []
    for nth in range(1, 9):
        machine.scenario.start("work", nth)
        machine.scenario.write("work", nth)
        before, after = machine.clean(), [[100 + nth, 256]]
        machine.scenario.write("work", 100 + nth, sync=False)
        machine.disk.fail(operation, nth=nth, times=None, error=error)
        failure = machine.attempt("stop")
        machine.restart()
        assert machine.clean() in ((before, after) if failure else (after,))
        must_work(machine.scenario, machine.scenario.observe(), only=["work"])
        refused += [nth] if failure else []
    # how many there are is the filesystem's affair, but not whether there is a first
    assert refused == list(range(1, len(refused) + 1))
    assert refused


def test_one_flush_that_fails_is_told(machine):
    """A commit whose fsync failed is no commit, though the next one would work."""
    machine.scenario.start("work", 1)
    machine.scenario.write("work", 1, sync=False)
    machine.disk.fail("flush")
    failure = machine.attempt("stop")
    assert failure.vid == machine.scenario.volumes["work"].vid
    assert "Input/output error" in str(failure)
    machine.restart()
    assert machine.clean() == [[0, 256]]


def test_power_that_fails_for_good(machine):
    """Nothing is claimed that has not reached the disk."""
    recorded = len(machine.disk.operations())
    machine.disk.cut_power()
    assert machine.attempt("resize", 2 * SIZE)
    assert len(machine.disk.operations()) == recorded
