"""The example of the guide works, and what it says happens when it does not."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest
from documented import files

FSYNC = "        os.fsync(file.fileno())\n"


@pytest.fixture
def example(tmp_path):
    """Return the path of the guide's test."""
    path = tmp_path / "test_save.py"
    path.write_text(files("docs/faultdisk.md")[path.name])
    return path


def run_pytest(directory, arguments):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=directory,
        env={**os.environ, "QUBES_ITESTS_ARTIFACTS": str(directory / "kept")},
        capture_output=True,
        check=False,
        text=True,
    )


def test_a_bad_state_is_replayed_by_the_command_that_is_printed(example):
    """Also after the workload has changed: the state is in a file."""
    assert FSYNC in example.read_text()
    example.write_text(example.read_text().replace(FSYNC, ""))
    arguments = ["-p", "qubes_itests", example.name, "-k", "xfs"]
    result = run_pytest(example.parent, arguments)
    assert result.returncode == 1, result.stdout
    command = re.search(r"again with: pytest (.*)", result.stdout)[1]
    failed = re.search(r"seed \d+, index \d+, cut \d+", result.stdout)[0]

    example.write_text(example.read_text().replace("range(20)", "range(0)"))
    again = run_pytest(example.parent, shlex.split(command))
    assert again.returncode == 1, again.stdout
    assert failed in again.stdout
    assert "state 1 of those examined" in again.stdout


def test_the_fixture_is_documented(example):
    result = run_pytest(example.parent, ["-p", "qubes_itests", "--fixtures"])
    assert re.search(
        r"^faultdisk -- .*\n    Return disks that", result.stdout, re.MULTILINE
    )
