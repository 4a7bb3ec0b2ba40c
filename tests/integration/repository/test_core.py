"""``--core DIR``: what a developer of core-admin types; what a bad checkout is told."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qubes_itests.exit_codes import ExitCode

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
    basic = "core::integ.basic::TC_00_Basic"
    life = "core::integ.life::TC_00_Life"
    gui = "core::integ.vm_qrexec_gui::TC_20_NonAudio"
    unit = "core::unit::TC_00_Platform"
    assert outcomes(done) == {
        "core::broken::plugin": "FAILED",
        "core::integ.audio::NotHere::test_suite": "SKIPPED",
        f"{basic}::test_130_units_that_start_with_dom0": "PASSED",
        f"{basic}::test_141_a_daemon_that_is_restarted": "PASSED",
        f"{basic}::test_204_devices_of_the_driver_file": "PASSED",
        f"{basic}::test_205_tools_of_the_client": "PASSED",
        f"{life}::test_000_life": "PASSED",
        f"{life}::test_001_killed_while_it_starts": "PASSED",
        f"{life}::test_002_a_disk_that_is_missing": "PASSED",
        f"{life}::test_003_leaves_something_behind": "PASSED",
        f"{life}::test_004_resumed_without_a_database": "PASSED",
        f"{life}::test_005_leaves_loop_devices_behind": "PASSED",
        f"{life}::test_006_an_agent_that_is_not_there_in_time": "PASSED",
        f"{gui}::test_000_runs": "PASSED",
        f"{gui}::test_210_time_sync": "SKIPPED",
        f"{unit}::test_000_names_what_is_missing": "PASSED",
        f"{unit}::test_001_paths_are_those_of_qubes_os": "PASSED",
        f"{unit}::test_002_skipped": "SKIPPED",
        f"{unit}::test_003_sh_becomes_the_command": "PASSED",
    }
    assert "qubes.tests.broken cannot be imported: ModuleNotFoundError" in done.stdout
    assert "integ.audio cannot run here: it needs a display" in done.stdout
    why = "test_210_time_sync cannot run here: it sets the clock of this machine"
    assert why in done.stdout
    assert sorted(checkout.rglob("*")) == before
    left = Path("/var/tmp/test-left-by-a-core")  # noqa: S108
    assert not left.exists()
    listed = subprocess.run(["losetup", "--list"], capture_output=True, check=True)
    assert b"test-loop-of-a-core" not in listed.stdout


def test_words_select_among_the_suites_of_a_core(checkout, site):
    """A suite that no word means is not imported."""
    (checkout / "qubes/tests/broken.py").write_text("raise SystemExit('imported')\n")
    done = site.run("--core", checkout, "core::unit")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name.rpartition("::")[0] for name in outcomes(done)} == {
        "core::unit::TC_00_Platform"
    }
    done = site.run("list", "--core", checkout, "core::integ.life")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall("^core::integ.life::TC_00", done.stdout, re.MULTILINE)) == 7


def test_a_core_that_cannot_make_its_store_ends_the_run(checkout, site):
    """With what it raised, and not as an error of ours."""
    with (checkout / "qubes/__init__.py").open("a") as file:
        file.write("\nQubes.setup_pools = lambda self: 1 // 0\n")
    done = site.run("--core", checkout, "core::unit")
    assert done.returncode == 3, done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert "the core cannot make its store" in said
    assert "| ZeroDivisionError" in said
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
    done = site.run("list", *given)
    listed = re.findall("^[a-z].*", done.stdout, re.MULTILINE)
    assert sorted(listed) == sorted(name for _, name in found)
