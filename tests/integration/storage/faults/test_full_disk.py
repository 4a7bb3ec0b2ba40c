"""No space at each step of each operation: the old state or the new one, and a reason.

The step is a system call of the driver that changes something in the pool; it fails as
on a full filesystem.  Afterwards there is space again.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass

import pool_scenario
import pytest
from pool_scenario import SIZE, Scenario

from qubes_itests.faultdisk import failing_call
from qubes_storage import pool_class
from qubes_storage.exc import VolumeError, VolumeStateError

MOST_CALLS = 60

#: What has to happen before, and the operation.
CASES = {
    "create": (("work", []), "create"),
    "start": (("work", ["create"]), "start"),
    "start a snapshot": (("snapshot", []), "start"),
    "start a snapshot that is saved": (("both", []), "start"),
    "start without a snapshot": (("bare", ["create"]), "start"),
    "stop": (("work", ["create", "start", "write_all"]), "stop"),
    "stop without a revision": (("none", ["create", "start", "write_all"]), "stop"),
    "stop without a snapshot": (("bare", ["create", "start", "write_all"]), "stop"),
    "stop a snapshot": (("snapshot", ["start", "write_some"]), "stop"),
    "stop a snapshot that is saved": (("both", ["start", "write_some"]), "stop"),
    "revert": (("template", []), "revert"),
    "enlarge": (("work", ["create"]), "resize"),
    "enlarge while it runs": (("work", ["create", "start"]), "resize"),
    "begin an import": (("work", ["create"]), "import_data"),
    "end an import": (("work", ["create", "begin_import"]), "import_data_end"),
    "drop an import": (("work", ["create", "begin_import"]), "drop"),
    "clone": (("clone", []), "import_template"),
    "clone into what there is": (("work", ["create"]), "import_template"),
}


class Operations(Scenario):
    """The scenario's volumes, and operations without a VM's own writes."""

    def begin_import(self, vm, version):
        path = self.run(vm, "import_data", SIZE)
        pool_scenario.write(path, version)

    def import_data(self, vm, _version):
        self.run(vm, "import_data", SIZE)

    def import_data_end(self, vm, _version):
        self.run(vm, "import_data_end", True)

    def drop(self, vm, _version):
        self.run(vm, "import_data_end", False)

    def stop(self, vm, _version):
        self.run(vm, "stop")

    def resize(self, vm, _version):
        self.run(vm, "resize", 2 * SIZE)


@dataclass
class Case:
    """One operation on a volume that was prepared for it."""

    vm: str
    preparation: list[str]
    operation: str

    def prepare(self, directory, pool):
        directory.mkdir()
        scenario = Operations(directory, pool)
        for version, step in enumerate(
            ["create", "start", "write_all", "stop", "start", "write_some", "stop"], 1
        ):
            getattr(scenario, step)("template", version)
        for version, step in enumerate(self.preparation, 50):
            getattr(scenario, step)(self.vm, version)
        return scenario

    def act(self, scenario):
        getattr(scenario, self.operation)(self.vm, 99)


DRIVERS = {"btrfs": "file-reflink", "xfs": "file-reflink", "ext4": "file"}


@pytest.fixture(params=DRIVERS)
def place(request):
    """Return a directory, and the pools of a driver that is to work there."""
    return request.getfixturevalue(request.param), pool_class(DRIVERS[request.param])


@pytest.mark.parametrize("name", CASES)
def test_no_space_at_each_step(name, place):
    directory, pool = place
    (vm, preparation), operation = CASES[name]
    case = Case(vm, preparation, operation)
    scenario = case.prepare(directory / "whole", pool)
    before = scenario.observe()
    case.act(scenario)
    after = scenario.observe()
    scenario.close()
    for nth in itertools.count(1):
        assert nth < MOST_CALLS
        scenario = case.prepare(directory / str(nth), pool)
        with failing_call(scenario.pool.dir_path, nth) as fault:
            error = failure(case, scenario)
        found = scenario.observe()
        assert found in (before, after), fault
        if fault.hit is None:
            assert error is None
            assert found == after
            scenario.close()
            break
        if error is not None:
            vids = {scenario.volumes[name].vid for name in (vm, "template")}
            assert error.vid in vids  # it may be the source that could not be read
            assert "No space left on device" in str(error)
        if found == before != after:
            assert error is not None, f"it claims success in spite of {fault}"
            repeat(case, scenario)
            assert scenario.observe() == after, fault
        scenario.close()
        reopened = Scenario(scenario.pool.dir_path.parent, pool)
        pool_scenario.must_work(reopened, reopened.observe(), only=[vm])
        reopened.close()
    assert nth > 1, "nothing was tried"


def failure(case, scenario):
    try:
        case.act(scenario)
    except VolumeError as error:
        return error
    return None


def repeat(case, scenario):
    """Do it again; an import that was dropped since begins anew."""
    if case.operation in {"import_data_end", "drop"}:
        with contextlib.suppress(VolumeStateError):
            scenario.begin_import(case.vm, 51)
    case.act(scenario)
