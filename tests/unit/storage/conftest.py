"""A pool in a plain directory: images are copied where they cannot be shared."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from qubes_storage.reflink import ReflinkPool, ReflinkVolume

SIZE = 64 * 1024


@dataclass(frozen=True)
class Owner:
    name: str
    dir_path_prefix: str = "appvms"


class Shop:
    """Makes pools and volumes, and runs their operations for synchronous tests."""

    SIZE = SIZE

    def __init__(self, directory):
        self.directory = directory
        self.pool = None
        self.pool = self.reopen()

    def reopen(self, **options):
        """Open the pool anew, as a process does that knows nothing but the files."""
        if self.pool is not None:
            self.run(self.pool.destroy())
        settings = {"name": "plain", "dir_path": self.directory, "setup_check": "no"}
        self.pool = ReflinkPool(**{**settings, **options})
        self.run(self.pool.setup())
        return self.pool

    @staticmethod
    def run(coroutine):
        return asyncio.run(coroutine)

    def volume(self, kind="saved", *, vm="work", **config) -> ReflinkVolume:
        flags = {
            "saved": {"name": "private", "rw": True, "save_on_stop": True},
            "snapshot": {"name": "root", "rw": True, "snap_on_start": True},
            "volatile": {"name": "volatile", "rw": True},
            "read_only": {"name": "kernel"},
            "both": {
                "name": "root",
                "rw": True,
                "snap_on_start": True,
                "save_on_stop": True,
            },
        }[kind]
        if "source" not in config:
            config = {"size": SIZE, **config}
        return self.pool.init_volume(Owner(vm), {**flags, **config})

    def template(self, content=b"") -> ReflinkVolume:
        volume = self.pool.init_volume(
            Owner("tiny", "vm-templates"),
            {"name": "root", "rw": True, "save_on_stop": True, "size": SIZE},
        )
        if not (volume.files.clean.exists() or volume.is_dirty()):
            self.run(volume.create())
        if content:
            self.session(volume, content)
        return volume

    def session(self, volume, content):
        """Start a volume, write to it, stop it."""
        self.run(volume.start())
        self.write(volume.path, content)
        self.run(volume.stop())

    @staticmethod
    def write(path, content, offset=0):
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(content)

    @staticmethod
    def read(path, length=1):
        with path.open("rb") as file:
            return file.read(length)

    def committed(self, volume):
        return self.read(volume.files.clean)

    def kept(self, volume):
        """Return the first byte of each revision, oldest first."""
        files = volume.files
        return b"".join(self.read(files.revision(each)) for each in files.revisions())

    def tree(self):
        """Return the files there are once nothing goes on in the background."""
        self.run(self.pool.settled())
        return {
            str(path.relative_to(self.directory))
            for path in self.directory.rglob("*")
            if path.is_file() and path.name != ".lock"
        }


@pytest.fixture
def shop(tmp_path):
    return Shop(tmp_path / "pool")


@pytest.fixture
def shop_class():
    return Shop
