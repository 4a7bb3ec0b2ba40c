"""The jobs that test this project."""

from __future__ import annotations

import configparser
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from documented import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
(JOBS,) = (
    yaml.safe_load(path.read_text())["jobs"]
    for path in WORKFLOWS
    if path.name == "project-tests.yml"
)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_named_by_commit(path):
    uses = re.findall(r"uses: (\S+)( # v[\d.]+)?$", path.read_text(), re.MULTILINE)
    assert len(uses) >= 3
    for name, version in uses:
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", name)
        assert version


def test_each_job_is_a_step_of_the_script():
    steps = re.findall(
        r"^    (\w+)\)", (ROOT / "ci/project-tests").read_text(), re.MULTILINE
    )
    runs = [
        step["run"] for job in JOBS.values() for step in job["steps"] if "run" in step
    ]
    assert sorted(runs) == sorted(f"ci/project-tests {step}" for step in steps)


def test_each_version_of_python_that_is_promised_is_tested():
    text = (ROOT / "setup.cfg").read_text()
    promised = re.findall(r"Python :: (3\.\d+)", text)
    assert JOBS["fast"]["strategy"]["matrix"]["python"] == promised


def test_each_package_is_in_the_wheel_with_all_its_files():
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "setup.cfg")
    packages = settings["options"]["packages"].split()
    data = settings["options.package_data"]
    wanted = [Path(*package.split("."), "*.py") for package in packages]
    for package in packages:
        globs = re.split(r"[,\s]+", f"{data['*']} {data.get(package, '')}".strip())
        wanted += [Path(*package.split("."), glob) for glob in globs]
    taken = {path for pattern in wanted for path in ROOT.glob(str(pattern))}
    known = ["git", "ls-files", "-z", "qubes_itests"]
    files = subprocess.check_output(known, cwd=ROOT, text=True).split("\0")[:-1]
    left = {ROOT / name for name in files} - taken
    assert {path for path in left if path.is_file()} == set()
