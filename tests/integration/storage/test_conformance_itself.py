"""The conformance suite: it finds what is wrong, and proves what is lacking."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap

import pytest

SUITE = "qubes_itests.conformance.storage"
CONFIG = ["--pool-config", "dir_path={directory}/pool", "setup_check=no"]


@pytest.fixture
def run_suite(tmp_path, run_directory):
    """Run pytest; return exit status and output, blanks squeezed."""
    cache = run_directory / "inner-cache"
    cache.mkdir(mode=0o700, exist_ok=True)

    def run_suite(*arguments, module=""):
        if module:
            path = tmp_path / "test_driver.py"
            path.write_text(HEADER + textwrap.dedent(module))
            arguments = (path, *arguments)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-pqubes_itests", "-q", *arguments],
            cwd=tmp_path,
            env={"PATH": "/usr/sbin:/usr/bin", "QUBES_ITESTS_CACHE": str(cache)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        output = re.sub(" +", " ", done.stdout + done.stderr)
        return done.returncode, output

    return run_suite


HEADER = """
from qubes_itests.conformance.storage import StorageConformance
from qubes_storage import StoragePoolException
from qubes_storage.reflink import ReflinkPool, ReflinkVolume


class Volume(ReflinkVolume):
    pass


class Pool(ReflinkPool):
    def _make_volume(self, **config):
        return Volume(pool=self, **config)


class TestDriver(StorageConformance):
    filesystems = ("tmpfs",)

    def make_pool(self, name, directory):
        return Pool(name=name, dir_path=directory / "pool", setup_check="no")

"""

KEEPS_ONE = """
def refuse(pool, **config):
    if (config.get("revisions_to_keep") or 0) > 1:
        raise StoragePoolException("it keeps one revision at most")
    return Volume(pool=pool, **config)

Pool._make_volume = refuse
"""

FORGETS_REVISIONS = """
Volume.revisions = property(lambda self: {})
"""

SWALLOWS_WRITES = """
async def stop(self):
    self.path.unlink(missing_ok=True)
    return await ReflinkVolume.stop(self)

Volume.stop = stop
"""

NEVER_OUTDATED = """
Volume.is_outdated = lambda self: False
"""

BACKWARDS = """
Volume.revisions = property(
    lambda self: dict(reversed(ReflinkVolume.revisions.fget(self).items()))
)
"""


def test_a_declared_lack_that_is_refused_is_told_in_the_table(run_suite):
    lacks = "Pool.lacks = frozenset({'many_revisions'})\n"
    status, output = run_suite(
        "-k", "revision or former or fewer", module=KEEPS_ONE + lacks
    )
    assert status == 0, output
    assert "many_revisions no, declared" in output
    assert "\nrevisions yes" in output
    assert "\naccounting yes" in output


def test_what_faults_leave_is_found_without_more_revisions(run_suite):
    """The suite itself asks for no more than the driver is said to keep."""
    module = """
    def keep(volume, value):
        if value > 1:
            raise StoragePoolException("it keeps one revision at most")
        ReflinkVolume.revisions_to_keep.fset(volume, value)

    Volume.revisions_to_keep = ReflinkVolume.revisions_to_keep.setter(keep)
    Pool.lacks = frozenset({"many_revisions"})
    TestDriver.fault_filesystems = ("tmpfs",)
    """
    words = "without_space and (tmpfs-revert or tmpfs-stop)"
    status, output = run_suite("-k", words, module=module)
    assert status == 0, output
    assert "\nfull_disk yes\n" in output


def test_a_lack_that_is_not_declared_fails(run_suite):
    status, output = run_suite("-k", "revision or former or fewer", module=KEEPS_ONE)
    assert status == 1
    assert "many_revisions FAILED 3 of 3" in output


def test_a_lack_that_is_none_fails(run_suite):
    """A declaration must not hide what the driver can do, or does wrongly."""
    lacks = "TestDriver.lacks = frozenset({'online_resize'})\n"
    status, output = run_suite("-k", "grow", module=lacks)
    assert status == 1
    assert "the driver is said to lack 'online_resize', and no error says so" in output
    assert "online_resize FAILED 1 of 1" in output


IGNORES_SIZES = """
class Volume(ReflinkVolume):
    async def resize(self, size):
        return await super().resize(size) if size == "1M" else self
"""


@pytest.mark.parametrize(
    ("lacks", "told"),
    [
        ("", "size_checks FAILED 8 of 9"),
        ("Pool.lacks = frozenset({'size_checks'})", "size_checks in part, declared"),
    ],
)
def test_what_a_driver_need_not_promise_may_fail_if_it_is_declared(
    lacks, told, run_suite
):
    """Also by what is no error of storage: nothing is refused there."""
    module = f"{IGNORES_SIZES}\n{lacks}\n"
    status, output = run_suite("-k", "bad_size_is_refused", module=module)
    assert status == (not lacks), output
    assert told in output


def test_power_cuts_need_a_filesystem_of_their_own(run_suite):
    """What cannot be cut is skipped, and not said to survive."""
    status, output = run_suite("-k", "promised", module="\n")
    assert status == 0, output
    assert "\npower_cuts skipped 2\n" in output


def test_what_every_driver_must_do_cannot_be_lacking(run_suite):
    lacks = "TestDriver.lacks = frozenset({'life'})\n"
    status, output = run_suite("-k", "wrong_state", module=lacks)
    assert status == 1
    assert "a driver cannot lack life" in output


@pytest.mark.parametrize(
    ("fault", "feature"),
    [
        (FORGETS_REVISIONS, "revisions"),
        (SWALLOWS_WRITES, "life"),
        (NEVER_OUTDATED, "outdated"),
        (BACKWARDS, "many_revisions"),
    ],
)
def test_a_faulty_driver_is_found(fault, feature, run_suite):
    words = {"revisions": "revert", "life": "writes", "outdated": "outdated"}
    status, output = run_suite("-k", words.get(feature, feature[5:]), module=fault)
    assert status == 1
    rows = [line.split() for line in output.splitlines() if "FAILED" in line]
    assert feature in [row[0] for row in rows]


def test_the_command_line_names_driver_and_pool(run_suite):
    status, output = run_suite(
        *("--pyargs", SUITE, "--qubes-storage-driver=file-reflink", *CONFIG),
        *("-k", "forgets_what"),
    )
    assert status == 0, output
    assert "storage: file-reflink" in output
    assert "\n btrfs xfs xfs_no_reflink ext4\n" in output
    assert "snapshots yes yes yes yes" in output


def test_the_command_line_names_what_is_lacking(run_suite):
    """A copying driver has no shared extents, and needs no word about it on ext4."""
    arguments = ("--pyargs", SUITE, "--qubes-storage-driver=file", "-k", "no_room")
    lacks = ("--qubes-storage-lacks", "shared_extents")
    status, output = run_suite(*arguments, *lacks)
    assert status == 0, output
    assert output.count("no, declared") == 4


def test_a_pool_of_its_own_is_emptied_after_every_test(run_suite, tmp_path):
    status, output = run_suite(
        *("--pyargs", SUITE, "--qubes-storage-driver=file-reflink", "--pool-config"),
        *(f"dir_path={tmp_path}/own", "setup_check=no", "revisions_to_keep=2"),
        *("-k", "writes"),
    )
    assert status == 0, output
    assert "life yes" in output
    assert list((tmp_path / "own").rglob("*.img*")) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a storage driver"),
        (["--qubes-storage-driver=none"], "no storage driver 'none'; installed: "),
        (["--qubes-storage-driver=file-reflink", "--pool-config", "x"], "KEY=VALUE"),
    ],
)
def test_what_it_cannot_do_without_is_a_usage_error(arguments, message, run_suite):
    status, output = run_suite("--pyargs", SUITE, *arguments)
    assert status in {2, 4}
    assert message in output
