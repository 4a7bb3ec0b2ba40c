"""What the documentation shows as an example works as it stands there."""

from __future__ import annotations

import subprocess
import sys

import pytest
from documented import PAGES, files, programs

#: What a page says about the environment of its examples, or leaves to a default.
ENVIRONMENT = {"docs/backends.md": {"QUBES_ITESTS_HYPERVISOR": "emulated"}}
OPTIONS = {"docs/faultdisk.md": ["--itests-crash-states=30"]}

SUITES = [
    name for name in PAGES if any(path.startswith("test_") for path in files(name))
]


def write_out(name, directory):
    """Write the files of a page; return those that are tests."""
    for path, text in files(name).items():
        (directory / path).parent.mkdir(exist_ok=True)
        (directory / path).write_text(text)
    return [path for path in files(name) if path.startswith("test_")]


@pytest.mark.parametrize("name", SUITES)
def test_suites_pass(site, name):
    tests = write_out(name, site.work)
    words = ("-p", "qubes_itests", *OPTIONS.get(name, []), *tests)
    variables = {"PYTHONPATH": str(site.work), **ENVIRONMENT.get(name, {})}
    done = site.run(*words, program="pytest", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_the_back_end_of_the_guide_is_the_one_that_runs(site):
    tests = write_out("docs/backends.md", site.work)
    words = ("-p", "qubes_itests", *tests)
    done = site.run(*words, program="pytest", QUBES_ITESTS_HYPERVISOR="emulate")
    assert done.returncode == 1
    assert "there are: emulated, qemu, test" in done.stdout


def test_the_plugin_of_the_guide_runs(site):
    write_out("docs/plugins.md", site.site)
    command = [sys.executable, "setup.py", "--quiet", "egg_info"]
    subprocess.run(command, cwd=site.site, check=True)
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
