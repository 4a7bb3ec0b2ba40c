"""The package needs nothing but Python's standard library, and says what it offers."""

from __future__ import annotations

import configparser
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[3]

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
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("1\n1\n", "")


def test_both_distributions_offer_the_same_drivers():
    """The harness brings the package along; it can be installed by itself as well."""
    group = "qubes.storage"
    alone = tomllib.loads((ROOT / "storage" / "pyproject.toml").read_text())
    whole = configparser.ConfigParser()
    whole.read(ROOT / "setup.cfg")
    lines = whole["options.entry_points"][group].strip().splitlines()
    drivers = dict(line.split(" = ") for line in lines)
    assert drivers == alone["project"]["entry-points"][group]
