"""The package needs nothing but Python's standard library, and says what it offers."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGE = "storage/qubes_storage"

PROGRAM = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from qubes_storage.file import FilePool
from qubes_storage.reflink import ReflinkPool

async def main():
    for kind, options in ((FilePool, {}), (ReflinkPool, {"setup_check": "no"})):
        pool = kind(name="p", dir_path=f"{sys.argv[2]}/{kind.__name__}", **options)
        await pool.setup()
        config = {"vid": "a/b/c", "name": "c", "size": 512, "rw": True}
        volume = pool.init_volume(None, {**config, "save_on_stop": True})
        await volume.create()
        await volume.start()
        await volume.stop()
        print(len(volume.revisions))
        await pool.destroy()

asyncio.run(main())
"""


def test_it_runs_without_any_installed_package(tmp_path):
    """-I and -S: no environment, no site-packages."""
    arguments = ["-I", "-S", "-c", PROGRAM, ROOT / "storage", tmp_path]
    done = subprocess.run(  # noqa: PLW1510 - the output says more
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300
    )
    assert (done.stdout, done.stderr) == ("1\n1\n", "")


BUILD = """
import sys
from setuptools import build_meta
print(build_meta.build_wheel(sys.argv[1]))
"""


@pytest.fixture
def wheels(tmp_path):
    """Return the files of the wheels of the project and of the package, by names."""
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("qubes_itests", "storage"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for project in (source, source / "storage"):
        subprocess.run(
            [sys.executable, "-c", BUILD, tmp_path],
            cwd=project,
            check=True,
            capture_output=True,
            timeout=300,
        )
    return [
        {name: archive.read(name).decode() for name in archive.namelist()}
        for archive in map(
            zipfile.ZipFile,
            (next(tmp_path.glob(f"qubes_{n}-*.whl")) for n in ("itests", "storage")),
        )
    ]


def only(files, ending):
    (name,) = (name for name in files if name.endswith(ending))
    return files[name]


def test_one_distribution_has_the_package_and_registers_its_drivers(wheels):
    """So either can be removed without loss to the other, which says what it needs."""
    whole, alone = wheels
    assert not set(whole) & set(alone)
    names = ("py.typed", *(path.name for path in (ROOT / PACKAGE).glob("*.py")))
    assert {f"qubes_storage/{name}" for name in names} <= set(alone)
    assert "[qubes.storage]" in only(alone, "/entry_points.txt")
    assert "[qubes.storage]" not in only(whole, "/entry_points.txt")
    assert "Requires-Dist: qubes-storage" in only(whole, "/METADATA")
    assert "Requires-Dist" not in only(alone, "/METADATA")
