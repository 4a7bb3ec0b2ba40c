"""``--core DIR``: what a developer of core-admin types; what a bad checkout is told."""

import contextlib
import json
import re
import shutil
import subprocess
import time
import uuid
from pathlib import Path

import pytest

from qubes_itests.exit_codes import ExitCode

#: A suite whose tests end the process that the core is in, while a VM starts.
DYING = """
import os
import signal
import qubes
from qubes.tests.integ.life import LifeTestCase, libvirt

class TC_00_Dying(LifeTestCase):
    def begin(self):
        self.domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
        self.program("qubesdb_daemon", str(self.domain.ID()), "work")
        self.domain.resume()

    def test_000_exits(self):
        self.begin()
        os._exit(0)

    def test_001_killed(self):
        self.begin()
        os.kill(os.getpid(), signal.SIGKILL)

    def test_002_raises(self):
        self.begin()
        raise SystemExit("enough")

    def test_003_goes_on(self):
        self.loop.run_until_complete(qubes.start(self.domain))
"""
#: A suite that leaves a VM, processes, threads, and mounts one on the other.
LITTERING = """
import os
import subprocess
import threading
import time
import qubes
from qubes.tests.integ.life import LifeTestCase

class TC_00_Littering(LifeTestCase):
    def tearDown(self):
        self.connection.close()  # the VM runs on

    def test_000_everything(self):
        self.loop.run_until_complete(qubes.start(self.domain))
        place = f"/var/lib/qubes/{os.environ['LEFT']}"
        os.mkdir(place)
        subprocess.run(
            f"truncate -s 8M {place}.img; mke2fs -q {place}.img;"
            f" mount -o loop {place}.img {place}; truncate -s 1M {place}/disk;"
            f" losetup --find {place}/disk; mount --bind {place} /mnt;"
            f" cd {place}; sleep 1000 & exec setsid sleep 1000 &",
            shell=True, check=True,
        )
        file = open(f"{place}/file", "w")
        wait = lambda: (time.sleep(1000), file.close())
        threading.Thread(target=wait, name="left").start()
"""
#: Lets a run break the core that the others share: it takes long to install one.
BREAKING = """
import os
exec(os.environ.get("BREAK_CORE", ""))
"""
#: A suite that core-admin and we pass in part.
BOTH = """
import shutil, unittest
import qubes

class TC_00_Both(unittest.TestCase):
    def test_000_everywhere(self):
        self.assertTrue(callable(qubes.Qubes))
        self.assertEqual(shutil.which("ls"), "/usr/bin/ls")

    def test_001_there(self):
        self.assertTrue(callable(qubes.start))
"""

FAKE = Path(__file__).parents[2] / "support/fake-core"


#: A core-admin-client with one tool.
CLIENT = {
    "setup.py": "from setuptools import *\n"
    "setup(name='qubesadmin', packages=find_packages(), install_requires=['xcffib'])\n",
    "qubesadmin/__init__.py": "",
    "qubesadmin/tools/__init__.py": "",
    "qubesadmin/tools/qvm_hello.py": "import sys\ndef main(): print(*sys.argv)\n",
}


@pytest.fixture
def checkout(tmp_path):
    """Return a checkout of its own, in the shape of core-admin."""
    place = tmp_path / "checkout"
    shutil.copytree(FAKE, place)
    subprocess.run(["git", "init", "--quiet", place], check=True)
    return place


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Return one for all that only run it, with suites that no core should have."""
    place = tmp_path_factory.mktemp("shared") / "checkout"
    shutil.copytree(FAKE, place)
    suites = place / "qubes/tests"
    (suites / "broken.py").write_text("raise SystemExit('imported')\n")
    (suites / "integ/both.py").write_text(BOTH)
    (suites / "integ/dying.py").write_text(DYING)
    (suites / "integ/littering.py").write_text(LITTERING)
    with (place / "qubes/__init__.py").open("a") as file:
        file.write(BREAKING)
    return place


def outcomes(done):
    found = re.findall(r"^([A-Z]{5,7}) +(core\S+)", done.stdout, re.MULTILINE)
    return {name: outcome for outcome, name in found}


def test_suites_of_a_core_run_with_guests_and_it_stays_as_it_is(checkout, site):
    for name, text in CLIENT.items():
        path = checkout.with_name("core-admin-client") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    before = sorted(checkout.rglob("*"))
    done = site.run("--core", checkout, "-rs")
    assert done.returncode == 1, done.stdout + done.stderr
    backup = "core::integ.backup::TC_00_Backup"
    basic = "core::integ.basic::TC_00_Basic"
    devices = "core::integ.devices::TC_00_Devices"
    life = "core::integ.life::TC_00_Life"
    gui = "core::integ.vm_qrexec_gui::TC_20_NonAudio"
    unit = "core::unit::TC_00_Platform"
    assert outcomes(done) == {
        "core::broken::plugin": "FAILED",
        "core::integ.audio::NotHere::test_suite": "SKIPPED",
        f"{backup}::test_000_volumes_are_small": "PASSED",
        f"{basic}::test_130_units_that_start_with_dom0": "PASSED",
        f"{basic}::test_141_a_daemon_that_is_restarted": "PASSED",
        f"{basic}::test_204_devices_of_the_driver_file": "PASSED",
        f"{basic}::test_205_tools_of_the_client": "PASSED",
        f"{basic}::test_206_linear_devices_of_device_mapper": "PASSED",
        f"{basic}::test_207_what_backups_need": "PASSED",
        f"{basic}::test_208_programs_called_by_their_paths": "PASSED",
        f"{basic}::test_209_volumes_are_as_large_as_in_qubes_os": "PASSED",
        f"{devices}::test_000_a_device_of_another_vm": "PASSED",
        f"{life}::test_000_life": "PASSED",
        f"{life}::test_001_killed_while_it_starts": "PASSED",
        f"{life}::test_002_a_disk_that_is_missing": "PASSED",
        f"{life}::test_003_leaves_something_behind": "PASSED",
        f"{life}::test_004_resumed_without_a_database": "PASSED",
        f"{life}::test_005_leaves_loop_devices_behind": "PASSED",
        f"{life}::test_006_an_agent_that_is_not_there_in_time": "PASSED",
        f"{life}::test_007_its_memory_is_balanced": "PASSED",
        f"{gui}::test_000_runs": "PASSED",
        f"{gui}::test_210_time_sync": "SKIPPED",
        f"{unit}::test_000_names_what_is_missing": "PASSED",
        f"{unit}::test_001_paths_are_those_of_qubes_os": "PASSED",
        f"{unit}::test_002_skipped": "SKIPPED",
        f"{unit}::test_003_sh_becomes_the_command": "PASSED",
        f"{unit}::test_008_a_vm_of_which_a_test_says_that_it_runs": "PASSED",
        f"{unit}::test_007_files_of_the_checkout": "PASSED",
        f"{unit}::test_004_templates_have_told_of_their_services": "PASSED",
        f"{unit}::test_005_what_comes_first_is_waited_for_in_both_ways": "PASSED",
        f"{unit}::test_006_programs_are_those_of_the_system": "PASSED",
        f"{unit}::test_009_a_copy_has_another_time_than_its_source": "PASSED",
    }
    assert "qubes.tests.broken cannot be imported: ModuleNotFoundError" in done.stdout
    assert "integ.audio cannot run here: it needs sound in dom0" in done.stdout
    why = "test_210_time_sync cannot run here: it sets the clock of this machine"
    assert why in done.stdout
    assert sorted(checkout.rglob("*")) == before
    left = Path("/var/tmp/test-left-by-a-core")  # noqa: S108
    assert not left.exists()
    listed = subprocess.run(["losetup", "--list"], capture_output=True, check=True)
    assert b"test-loop-of-a-core" not in listed.stdout


def test_words_select_among_the_suites_of_a_core(shared, site):
    """A suite that no word means is not imported."""
    done = site.run("--core", shared, "core::unit")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name.rpartition("::")[0] for name in outcomes(done)} == {
        "core::unit::TC_00_Platform"
    }
    done = site.run("list", "--core", shared, "core::integ.life")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall("^core::integ.life::TC_00", done.stdout, re.MULTILINE)) == 8


def test_a_driver_of_a_core_that_forgets_an_fsync_is_found(shared, site):
    """By power cuts, and by no other test; a volume that is not concerned passes."""
    suite = "core::conformance::TestReflink"
    power_cut = f"{suite}::test_power_cut_leaves_what_was_promised"
    done = site.run(
        *("--core", shared, "--itests-crash-states=12"),
        f"{power_cut}[xfs-others flush]",
        f"{power_cut}_without_snapshots[xfs-others flush]",
        f"{suite}::test_what_a_vm_writes_is_there_at_its_next_start[xfs]",
        f"{suite}::test_volume_that_was_not_created_does_not_start[xfs]",
        BREAK_CORE="from qubes.storage import copying; copying.flush = len",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    table = re.findall("^(\\w+) +(yes|FAILED.*)$", done.stdout, re.MULTILINE)
    assert table == [
        ("life", "yes"),
        ("power_cuts", "FAILED 1 of 1"),
        ("no_snapshot_power_cuts", "yes"),
    ], done.stdout + done.stderr
    assert "its images are neither those before nor those after" in done.stdout
    kept = f"--itests-crash-replay={site.work}/itests-artifacts/"
    again = f"--core {shared} '{power_cut}[xfs-others flush]' {kept}"
    assert again in done.stdout


@pytest.mark.parametrize(
    ("broken", "words", "told"),
    [
        ("Qubes.setup_pools = lambda self: 1 // 0", [], "make its store:\n.*| ZeroDiv"),
        ("import asyncio; asyncio.coroutine", [], "be imported:\n.*'coroutine'"),
        ("import asyncio; asyncio.coroutine", ["-n1"], "be imported:\n.*'coroutine'"),
        ("import asyncio; asyncio.coroutine", ["list"], "be imported:\n.*'coroutine'"),
        ("os._exit(0)", [], "exit status 0 before the first test"),
    ],
)
def test_a_core_that_is_of_no_use_ends_the_run(shared, site, broken, words, told):
    """With the first that it raised, and not as an error of ours."""
    done = site.run(*words, "--core", shared, "core::unit", BREAK_CORE=broken)
    said = done.stdout + done.stderr
    assert done.returncode == 3, said
    assert re.search(told, said, re.DOTALL), said
    assert "INTERNALERROR" not in said


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("qubes/config.py", "x = = 1\n", r"qubes/config\.py:1: invalid syntax"),
        ("setup.py", None, r"expected a checkout of core-admin, with setup\.py"),
        ("version", None, r"pip cannot install"),
        ("qubes/config.py", "import qrexec\n", r"it imports qrexec.*--qrexec"),
    ],
)
def test_a_bad_checkout_is_told_so(checkout, site, file, text, told):
    if text is None:
        (checkout / file).unlink()
    else:
        (checkout / file).write_text(text)
    done = site.run("--core", checkout, "core::unit")
    assert done.returncode not in (0, 1)
    assert re.search(told, done.stderr, re.DOTALL), done.stdout + done.stderr
    assert f"{checkout} cannot be installed: " in done.stderr


@pytest.fixture
def app(tmp_path):
    """Return a small app, with a template and a policy of its own."""
    return shutil.copytree(FAKE.with_name("fake-app"), tmp_path / "my-app")


def test_an_app_is_tested_on_a_core_in_place_of_ours(checkout, app, site):
    """Suites of the core itself run where a word means them."""
    given = ("--core", checkout, "--app", app)
    done = site.run(*given, "my-app", "core::unit")
    assert done.returncode == ExitCode.GUEST_PANIC, done.stdout + done.stderr
    found = re.findall(r"^([A-Z]{6,7}) +(my-app\S+)", done.stdout, re.MULTILINE)
    assert sorted(found) == [
        ("FAILED", "my-app::TC_00_Guest_mine::test_001_panic"),
        ("PASSED", "my-app::TC_00_Guest_mine::test_000_service"),
        ("PASSED", "my-app@once::TC_10_Dom0::test_000_base"),
        ("PASSED", "my-app@once::TC_10_Dom0::test_001_policy"),
    ]
    assert "core::unit::TC_00_Platform::test_002_skipped" in outcomes(done)
    # as of a VM of our own core
    assert "a guest's kernel panicked: VM test-inst-mad" in done.stdout
    (left,) = site.work.glob("itests-artifacts/*test_001_panic*")
    assert "sysrq" in (left / "test-inst-mad.console.log").read_text()
    assert (left / "test-inst-mad.agent.log").is_file()
    records = map(json.loads, (left / "timeline.jsonl").read_text().splitlines()[1:])
    told = [r for r in records if r.get("vm") == "test-inst-mad"]
    states = [record["state"] for record in told if record["kind"] == "state"]
    assert states == ["Transient", "Running", "Halted"]
    (start,) = (record for record in told if record["kind"] == "start")
    assert start["ok"] is True
    assert start["steps"]
    done = site.run("list", *given)
    listed = re.findall("^[a-z].*", done.stdout, re.MULTILINE)
    assert sorted(listed) == sorted(name for _, name in found)


def seen_of_others():
    """Return the loop devices and the mounts of this machine, and its processes."""
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            yield path.read_text()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            yield (process / "mountinfo").read_text()
            yield str((process / "cwd").readlink())


def left_of(site):
    """Return what is left of runs: their directories."""
    runs = Path(site.environment["QUBES_ITESTS_CACHE"]) / "runs"
    return [path for path in runs.iterdir() if path.name != ".lock"]


def test_a_core_that_dies_while_a_vm_starts_is_told_so(shared, site):
    """Whatever its exit status is; with a worker the other tests run all the same."""
    begin = "core::integ.dying::TC_00_Dying"
    done = site.run("--core", shared, f"{begin}::test_000", f"{begin}::test_003")
    assert done.returncode == 3, done.stdout + done.stderr
    assert f"exit status 0 in {begin}::test_000_exits: it ended the pro" in done.stderr
    done = site.run("--core", shared, "-n1", begin)
    assert done.returncode == 1, done.stdout + done.stderr
    assert outcomes(done) == {
        f"{begin}::test_000_exits": "ERROR",
        f"{begin}::test_001_killed": "ERROR",
        f"{begin}::test_002_raises": "FAILED",
        f"{begin}::test_003_goes_on": "PASSED",
    }
    for name in ("000_exits", "001_killed"):
        assert f"crashed while running '{begin}::test_{name}'" in done.stdout
    assert left_of(site) == []


def test_what_a_core_leaves_ends_with_the_run(shared, site):
    name = f"left-{uuid.uuid4().hex}"
    done = site.run("--core", shared, "core::integ.littering", LEFT=name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left hangs, and is not waited for" in done.stderr
    assert left_of(site) == []
    deadline = time.monotonic() + 300
    while any(name in text for text in seen_of_others()):
        assert time.monotonic() < deadline, "loop devices, mounts or processes are left"
        time.sleep(0.1)


def test_our_core_is_compared_with_another(shared, site):
    done = site.run("compare", "--core", shared, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {(row["kind"], row["name"]): row for row in json.loads(done.stdout)}
    memory = found["default", "AppVM.memory"]
    assert (memory["here"], memory["there"]) == ("400", "200")
    assert memory["verdict"] == "differs"
    assert found["name", "qubes.Qubes"]["verdict"] == "same"
    assert found["set", "AppVM.memory = 1"]["verdict"] == "same"
    assert found["error", "qubes.exc.QubesException"]["verdict"] == "only here"
    broken = "Qubes.add_pool = None"
    done = site.run("compare", "--core", shared, BREAK_CORE=broken)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "the core cannot be described:\n| Traceback" in done.stderr
    given = ("compare", "--core", shared)
    for words in (["compare"], [*given, "my-app"], [*given, "core::unit"]):
        done = site.run(*words)
        assert done.returncode == 4
        assert "expected " in done.stderr


def test_tests_of_apps_are_compared_on_both_cores(shared, app, site):
    tests = "my-app@once"
    done = site.run("compare", "--core", shared, "--app", app, tests)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert re.sub(" [0-9]+ s ", " ", lines[1]).split() == [
        *("apps", "0/2/0", "2/0/0", "0", "2", "0", "0"),
    ]
    assert [re.sub("(?<=failed): .*(?=; )", "", line) for line in lines[4:]] == [
        "  test     my-app@once::TC_10_Dom0::test_000_base: failed; there passed",
        "  test     my-app@once::TC_10_Dom0::test_001_policy: failed; there passed",
    ]
    # ours ran on templates without what those of the other core have
    assert "run again" in done.stderr
    assert "--core-suites" not in done.stderr


def test_suites_of_a_core_are_compared_on_both(shared, site, tmp_path):
    """With the system's programs, whatever a user has before them."""
    before = sorted(shared.rglob("*"))
    (tmp_path / "ls").symlink_to("/bin/true")
    path = f"{tmp_path}:{site.environment['PATH']}"
    selected = ("-k", "everywhere or there", "core::integ.both")
    words = ("--core", shared, "--timeout", "100", *selected)
    done = site.run("compare", *words, PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    suite = "core::integ.both::TC_00_Both"
    why = "AttributeError: qubes_itests does not provide qubes.start"
    row, *listed = done.stdout.splitlines()[1:]
    assert re.sub(" [0-9]+ s ", " ", row).split() == [
        *("core::integ.both", "1/1/0", "2/0/0", "1", "1", "0", "0"),
    ]
    assert listed == [
        "",
        "differs",
        f"  test     {suite}::test_001_there: failed: {why}; there passed",
    ]
    # the command that runs it again
    assert f"--core-suites {shared} --timeout 100" in done.stderr
    assert sorted(shared.rglob("*")) == before
    # again: the results on ours are there, and what came of theirs is told, not lost
    (site.work / "itests-artifacts/theirs/integ.both/run.json").unlink()
    broken = "Qubes.setup_pools = lambda self: 1 // 0"
    done = site.run("compare", "--resume", *words, BREAK_CORE=broken)
    assert done.returncode == 3, done.stdout + done.stderr
    (row,) = done.stdout.splitlines()[1:]
    assert row.endswith(
        "the run on theirs ended with status 3, and none of its results"
    )
    assert "its store:" in done.stderr
    assert "run.json" not in done.stderr
    assert "--core-suites" not in done.stderr


def test_its_qmemman_is_compared_with_ours(shared, site, tmp_path):
    """On a machine without VMs; the picture has both."""
    picture = tmp_path / "both.svg"
    twice = 2 * ["growing_dom0"]
    words = ["--core", shared, "-o", picture]
    done = site.run("memory", "compare", *words, "pressure")
    assert done.returncode == 0, done.stdout + done.stderr
    done = site.run("memory", "compare", *words, *twice)
    # this core's dom0 gets nothing of an idle VM
    assert done.returncode == 1, done.stdout + done.stderr
    assert "core-admin: expected: the idle VM gives" in done.stdout
    assert re.search("^growing_dom0 +ours +core-admin$", done.stdout, re.MULTILINE)
    assert re.search("^  idle +[0-9]+ MiB +400 MiB$", done.stdout, re.MULTILINE)
    for side in ("ours", "core-admin"):
        assert f"growing_dom0: {side}" in picture.read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["growing"], "expected some of fourth_vm, .*; got 'growing'"),
        ([], "--core: expected the checkout of core-admin whose qmemman it is"),
    ],
)
def test_a_comparison_that_cannot_be_is_refused(site, words, told):
    done = site.run("memory", "compare", *words)
    assert done.returncode == 4
    assert re.search(told, done.stderr)
