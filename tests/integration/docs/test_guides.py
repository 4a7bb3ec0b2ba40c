"""The examples of the guides run as they stand, in a folder outside of the project."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[3] / "docs"
_FILE = re.compile(r"^```python\n# (\w+\.py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _install(folder):
    """Register the driver of the guide, as pip does for who installs its package."""
    place = folder / "my_driver-1.dist-info"
    place.mkdir()
    (place / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: my-driver\nVersion: 1\n"
    )
    registered = "[qubes.storage]\nmy-driver = my_package:MyPool\n"
    (place / "entry_points.txt").write_text(registered)


@pytest.mark.parametrize("guide", ["fixtures.md", "backends.md", "drivers.md"])
def test_the_files_of_a_guide(guide, tmp_path):
    """Blocks that begin with the name of a file are that file."""
    found = dict(_FILE.findall((DOCS / guide).read_text()))
    for name, text in found.items():
        (tmp_path / name).write_text(text)
    _install(tmp_path)
    tests = [name for name in found if name.startswith("test_")]
    assert tests
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    environment.pop("QUBES_ITESTS_SANDBOX", None)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "qubes_itests", "-q", *tests],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
