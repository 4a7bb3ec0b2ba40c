"""What operations on a fragmented image cost, beside one FICLONE of that image.

Run as root: ``.venv/bin/python tests/benchmarks/storage.py [ROUNDS]``

The image has 2 GiB and 20,000 random writes of 4 KiB, on btrfs and on XFS.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

from qubes_itests.host import sandbox
from qubes_itests.host.filesystem import FilesystemType, LoopFilesystem
from qubes_storage.ficlone import FICLONE
from qubes_storage.reflink import ReflinkPool

GIB = 1024**3
SIZE = 2 * GIB
WRITES = 20_000
BLOCK = 4096
VM = SimpleNamespace(name="work", dir_path_prefix="appvms")

Times = defaultdict[str, list[float]]


class Timer:
    """Collects milliseconds under names."""

    def __init__(self) -> None:
        self.times: Times = defaultdict(list)

    async def operation(self, name, coroutine):
        began = time.perf_counter()
        await coroutine
        self.times[name].append((time.perf_counter() - began) * 1000)

    def call(self, name, function, *arguments):
        began = time.perf_counter()
        function(*arguments)
        self.times[name].append((time.perf_counter() - began) * 1000)


def fragment(image: Path) -> None:
    """Write to random places."""
    places = random.Random(1)  # noqa: S311 - the same in every run
    with image.open("r+b", buffering=0) as file:
        for _ in range(WRITES):
            os.pwrite(
                file.fileno(), b"x" * BLOCK, places.randrange(SIZE // BLOCK) * BLOCK
            )
        os.fsync(file.fileno())


def clone_bare(timer: Timer, image: Path) -> None:
    """Clone the image without the driver."""
    target = image.with_name("yardstick")
    with image.open("rb") as source, target.open("wb") as copy:
        timer.call("FICLONE", fcntl.ioctl, copy, FICLONE, source.fileno())
        timer.call("fsync of the clone", os.fsync, copy.fileno())
    target.unlink()


async def measure(directory: Path, rounds: int) -> Times:
    """Return the times of all rounds on one filesystem."""
    timer = Timer()
    pool = ReflinkPool(name="bench", dir_path=directory / "pool")
    await pool.setup()
    config = {"name": "private", "size": SIZE, "rw": True, "save_on_stop": True}
    volume = pool.init_volume(VM, config)
    await volume.create()
    await volume.start()
    fragment(volume.path)
    await volume.stop()
    for _ in range(rounds):
        clone_bare(timer, volume.files.clean)
        await timer.operation("start", volume.start())
        with volume.path.open("r+b") as image:
            image.write(b"y" * BLOCK)
        await timer.operation("stop", volume.stop())
        await timer.operation("revert", volume.revert())
        await timer.operation("prepare", volume.prepare())
        await timer.operation("start, prepared", volume.start())
        await volume.stop()
    return timer.times


def table(title: str, times: Times) -> str:
    """Return the medians, for people."""
    lines = [
        f"  {name:20} {statistics.median(values):8.1f} ms"
        for name, values in times.items()
    ]
    return "\n".join([title, *lines, ""])


def main() -> None:
    """Measure and print a table."""
    sandbox.reexec()
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as scratch:
        for kind in (FilesystemType.BTRFS, FilesystemType.XFS):
            image, mount_point = Path(scratch, "image"), Path(scratch, "mount")
            with LoopFilesystem(image, mount_point, kind=kind, size=16 * GIB):
                times = asyncio.run(measure(mount_point, rounds))
            sys.stdout.write(table(f"{kind.value}, {rounds} rounds", times))


if __name__ == "__main__":
    main()
