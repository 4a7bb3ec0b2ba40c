"""What the documentation shows as an example works as it stands there."""

from __future__ import annotations

import subprocess
import sys

import pytest
from documented import PAGES, blocks, files, programs

DRIVERS = "docs/drivers.md"
#: What a page says about the environment of its examples, or leaves to a default.
ENVIRONMENT = {"docs/backends.md": {"QUBES_ITESTS_HYPERVISOR": "emulated"}}
OPTIONS = {
    "docs/faultdisk.md": ["--itests-crash-states=30"],
    DRIVERS: ["--itests-crash-states=20"],
}

SUITES = [
    name for name in PAGES if any(path.startswith("test_") for path in files(name))
]


def write_out(name, directory):
    """Write the files of a page; return those that are tests."""
    for path, text in files(name).items():
        (directory / path).parent.mkdir(exist_ok=True)
        (directory / path).write_text(text)
    return [path for path in files(name) if path.startswith("test_")]


def install(directory):
    """Have the entry points of a setup.py or setup.cfg found in a directory."""
    code = "from setuptools import setup; setup()"
    script = ["setup.py"] if (directory / "setup.py").exists() else ["-c", code]
    command = [sys.executable, *script, "--quiet", "egg_info"]
    subprocess.run(command, cwd=directory, check=True)


@pytest.mark.parametrize("name", [name for name in SUITES if name != DRIVERS])
def test_suites_pass(site, name):
    tests = write_out(name, site.work)
    words = ("-p", "qubes_itests", *OPTIONS.get(name, []), *tests)
    done = site.run(*words, program="pytest", **ENVIRONMENT.get(name, {}))
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_the_driver_of_the_guide_conforms(site):
    """Both ways of running the suite that the guide shows, the driver installed."""
    (entry_points,) = blocks(DRIVERS, "ini")
    tests = write_out(DRIVERS, site.site)
    (site.site / "setup.cfg").write_text(
        f"[metadata]\nname = my-package\n[options]\npy_modules = my_package\n"
        f"{entry_points}"
    )
    install(site.site)
    words = ["-p", "qubes_itests", *OPTIONS[DRIVERS]]
    words += [str(site.site / test) for test in tests]
    done = site.run(*words, program="pytest")
    assert done.returncode == 0, done.stdout + done.stderr
    suite = ("--pyargs", "qubes_itests.conformance.storage")
    driver = ("--qubes-storage-driver=my-driver", "-k", "same_pool and ext4")
    done = site.run("-p", "qubes_itests", *suite, *driver, program="pytest")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_back_end_of_the_guide_is_the_one_that_runs(site):
    tests = write_out("docs/backends.md", site.work)
    words = ("-p", "qubes_itests", *tests)
    done = site.run(*words, program="pytest", QUBES_ITESTS_HYPERVISOR="emulate")
    assert done.returncode == 1
    assert "there are: emulated, qemu, test" in done.stdout


def test_the_plugin_of_the_tutorial_runs(site):
    write_out("docs/tutorial.md", site.site)
    install(site.site)
    done = site.run("my-app")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


@pytest.mark.parametrize("name", [name for name in PAGES if programs(name)])
def test_programs_end_well(name, btrfs):
    for program in programs(name):
        text = program.replace("/srv/", f"{btrfs}/")
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", text],
            cwd=btrfs,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
