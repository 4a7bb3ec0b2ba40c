"""The jobs that test this project."""

from __future__ import annotations

import configparser
import re

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


def test_each_package_is_in_the_wheel():
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "setup.cfg")
    files = (ROOT / "qubes_itests").rglob("__init__.py")
    there = [".".join(path.relative_to(ROOT).parent.parts) for path in files]
    assert settings["options"]["packages"].split() == sorted(there)
