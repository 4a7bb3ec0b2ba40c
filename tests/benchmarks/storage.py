"""What storage costs, beside one FICLONE of the same image; on btrfs and on XFS.

Run as root: ``.venv/bin/python tests/benchmarks/storage.py [ROUNDS]``; with
``--core DIR`` the driver of a checkout of core-admin and ours do the same in turn.

The image has 2 GiB and 20,000 random writes of 4 KiB.  An operation's own fsync is
measured apart, just before it, as it depends on what the VM wrote and nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import functools
import importlib
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

from bench import heading, row

from qubes_itests.conformance.core_drivers import CorePool
from qubes_itests.dom0 import modules
from qubes_itests.host import sandbox
from qubes_itests.host.filesystem import FilesystemType, LoopFilesystem
from qubes_itests.run.preparation import prepare_listing
from qubes_itests.run.settings import Settings
from qubes_storage.ficlone import FICLONE
from qubes_storage.file import FilePool
from qubes_storage.reflink import ReflinkPool

GIB = 1024**3
SIZE = 2 * GIB
WRITES = 20_000
BLOCK = 4096
MANY = 10_000
REVISIONS = 5
SAVED = {"name": "private", "rw": True, "save_on_stop": True}


class Timer:
    """Collects milliseconds under names."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = defaultdict(list)

    async def operation(self, name, coroutine):
        began = time.perf_counter()
        await coroutine
        self.times[name].append((time.perf_counter() - began) * 1000)

    def call(self, name, function, *arguments):
        began = time.perf_counter()
        function(*arguments)
        self.times[name].append((time.perf_counter() - began) * 1000)

    def median(self, name):
        return statistics.median(self.times[name])

    def row(self, name, bound=""):
        row(name, self.times[name], "ms", bound)

    def share(self, name, of, most):
        """Print a row that is to be at most a certain share of another."""
        share = self.median(name) / self.median(of)
        self.row(name, f"{share:.3f} of {of}, at most {most}")


def owner(name):
    return SimpleNamespace(name=name, dir_path_prefix="appvms")


def fragment(image: Path) -> None:
    """Write to random places."""
    places = random.Random(1)  # noqa: S311 - the same in every run
    with image.open("r+b", buffering=0) as file:
        for _ in range(WRITES):
            place = places.randrange(SIZE // BLOCK) * BLOCK
            os.pwrite(file.fileno(), b"x" * BLOCK, place)
        os.fsync(file.fileno())


def write_block(image: Path) -> None:
    """Write and flush as little as a VM can."""
    with image.open("r+b", buffering=0) as file:
        file.write(os.urandom(BLOCK))
        os.fsync(file.fileno())


def fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def clone_bare(timer: Timer, image: Path) -> None:
    """Clone the image without the driver."""
    target = image.with_name("yardstick")
    with image.open("rb") as source, target.open("wb") as copy:
        timer.call("FICLONE", fcntl.ioctl, copy, FICLONE, source.fileno())
        timer.call("fsync of that clone", os.fsync, copy.fileno())
    timer.call("unlink of that clone", target.unlink)


async def fragmented(pool):
    """Return a volume with the image that all is about."""
    volume = pool.init_volume(owner("work"), {**SAVED, "size": SIZE})
    await volume.create()
    await volume.start()
    await asyncio.to_thread(fragment, volume.path)
    await volume.stop()
    return volume


async def at_rest(volume, *, prepared):
    """Wait until neither the pool nor the filesystem does anything."""
    await volume.pool.settled()
    if not prepared:
        volume.files.precache.unlink(missing_ok=True)
    os.sync()
    await asyncio.sleep(0.5)  # XFS frees the extents of an unlinked file behind us


async def cold_session(timer, volume):
    """Measure a start without a prepared clone, and the stop after it."""
    await at_rest(volume, prepared=False)
    await timer.operation("start", volume.start())
    write_block(volume.path)
    timer.call("fsync before stop", fsync, volume.path)
    await timer.operation("stop", volume.stop())


async def one_round(timer, volume, number):
    """Measure each operation once, everything else at rest."""
    # In turns: whatever comes second finds the caches as the first left them.
    if number % 2:
        await cold_session(timer, volume)
    await at_rest(volume, prepared=False)
    clone_bare(timer, volume.files.clean)
    if not number % 2:
        await cold_session(timer, volume)
    await at_rest(volume, prepared=True)
    await timer.operation("revert", volume.revert())
    await at_rest(volume, prepared=True)
    await timer.operation("start, prepared", volume.start())
    write_block(volume.path)
    await timer.operation("stop, fsync included", volume.stop())
    await at_rest(volume, prepared=False)
    await timer.operation("prepare", volume.prepare())


async def operations(directory, rounds):
    """Measure the operations on the fragmented image."""
    timer = Timer()
    pool = ReflinkPool(name="bench", dir_path=directory / "pool")
    await pool.setup()
    volume = await fragmented(pool)
    await pool.settled()
    for number in range(rounds):
        await one_round(timer, volume, number)
    baseline = FilePool(name="file", dir_path=directory / "file")
    await baseline.setup()
    copied = baseline.init_volume(owner("work"), {**SAVED, "size": SIZE})
    await copied.import_volume(volume)
    await timer.operation("start by the driver file", copied.start())
    for name in ("FICLONE", "fsync of that clone", "unlink of that clone"):
        timer.row(name)
    timer.share("start", "FICLONE", 1.1)
    timer.row("start, prepared", "at most 5 ms")
    timer.share("stop", "FICLONE", 0.05)
    timer.share("revert", "FICLONE", 0.05)
    for name in ("stop, fsync included", "prepare", "start by the driver file"):
        timer.row(name)
    return pool, volume


async def others(pool, volume, rounds):
    """Measure sessions of a small volume, alone and beside work on the large one."""
    small = pool.init_volume(owner("small"), {**SAVED, "size": 64 * BLOCK})
    await small.create()
    timer = Timer()

    async def sessions(name, until):
        while not until():
            await timer.operation(f"{name}: start", small.start())
            timer.call(f"{name}: write, fsync", write_block, small.path)
            await timer.operation(f"{name}: stop", small.stop())

    async def beside(name, coroutine):
        task = asyncio.ensure_future(coroutine)
        await sessions(name, task.done)
        await task

    async def bare():
        await asyncio.to_thread(clone_bare, Timer(), volume.files.clean)

    async def session():
        volume.files.precache.unlink(missing_ok=True)
        await volume.start()
        write_block(volume.path)
        await volume.stop()

    async def background():
        volume.files.precache.unlink(missing_ok=True)
        volume.clean_up()
        await pool.settled()

    for _ in range(rounds):
        await beside("alone", asyncio.sleep(0.3))
        await beside("beside a bare FICLONE, fsync, unlink", bare())
        await beside("beside start and stop", session())
        await beside("beside the background", background())
    for name in timer.times:
        timer.row(name)


def make_tree(directory, count):
    """Make volumes with revisions, as years of use would."""
    for number in range(count):
        vm = directory / "appvms" / f"vm{number}"
        vm.mkdir(parents=True)
        for revision in range(REVISIONS):
            name = f"private.img.{revision + 1}@2026-01-01T00:00:0{revision}Z"
            (vm / name).touch(0o600)
        with (vm / "private.img").open("wb") as image:
            image.truncate(64 * BLOCK)


async def crowd(directory, count, timer, rounds):
    """Measure a pool of many volumes, and one of them."""
    path = directory / f"crowd{count}"
    await asyncio.to_thread(make_tree, path, count)
    name = f"{count:,} volumes"
    pool = ReflinkPool(name="crowd", dir_path=path)
    await timer.operation(f"{name}: setup", pool.setup())
    timer.call(f"{name}: list_volumes", pool.list_volumes)
    assert len(pool.list_volumes()) == count
    config = {**SAVED, "revisions_to_keep": REVISIONS}
    volume = pool.init_volume(owner("vm7"), config)
    for _ in range(rounds):
        await at_rest(volume, prepared=False)
        await timer.operation(f"{name}: start", volume.start())
        write_block(volume.path)
        await timer.operation(f"{name}: stop", volume.stop())
    await pool.destroy()


async def crowds(directory, rounds):
    """Measure few and many volumes side by side."""
    timer = Timer()
    for count in (10, MANY):
        await crowd(directory, count, timer, rounds)
    for name in timer.times:
        few = name.replace(f"{MANY:,}", "10")
        if name == few:
            timer.row(name)
        elif "start" in name or "stop" in name:
            share = timer.median(name) / timer.median(few)
            timer.row(name, f"{share:.2f} of that of 10, at most 1.2")
        else:
            timer.row(name, "at most 2000 ms together")


async def compare(core_pool, kind, directory, rounds):
    """Print a table of the same operations of two drivers, in turn."""
    heading(f"{kind}: two drivers, a fragmented image each")
    timer = Timer()
    ours = ReflinkPool(name="ours", dir_path=directory / "ours")
    pools = {"ours": ours, "core-admin": core_pool(directory / "theirs")}
    volumes = {}
    for name, pool in pools.items():
        await pool.setup()
        volumes[name] = await fragmented(pool)
    for number in range(rounds):
        for name in sorted(volumes, reverse=bool(number % 2)):
            volume = volumes[name]
            await ours.settled()
            os.sync()
            await asyncio.sleep(0.5)
            await timer.operation(f"{name}: start", volume.start())
            write_block(volume.path)
            fsync(volume.path)
            await timer.operation(f"{name}: stop", volume.stop())
            await ours.settled()
            os.sync()
            await asyncio.sleep(0.5)
            await timer.operation(f"{name}: revert", volume.revert())
    for operation in ("start", "stop", "revert"):
        for name in pools:
            timer.row(f"{name}: {operation}")


async def measure(kind, directory, rounds):
    """Print the tables of one filesystem."""
    heading(f"{kind}: a fragmented image")
    pool, volume = await operations(directory, rounds)
    heading(f"{kind}: another, small volume")
    await others(pool, volume, max(1, rounds // 2))
    await pool.destroy()
    heading(f"{kind}: many volumes with {REVISIONS} revisions each")
    await crowds(directory, rounds * 3)


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rounds", nargs="?", type=int, default=6)
    parser.add_argument("--core", type=Path, help="a checkout of core-admin")
    parser.add_argument("--qrexec", type=Path, help="one of core-qrexec")
    options = parser.parse_args()
    if options.core and not sandbox.active():
        prepare_listing(Settings(core=options.core, qrexec=options.qrexec))
    sandbox.reexec()
    what = measure
    if options.core:
        modules.install()
        found = importlib.import_module("qubes.storage.reflink").ReflinkPool

        def core_pool(path):
            return CorePool(found(name="theirs", dir_path=str(path)))

        what = functools.partial(compare, core_pool)
    with tempfile.TemporaryDirectory() as scratch:
        for kind in (FilesystemType.BTRFS, FilesystemType.XFS):
            image, mount_point = Path(scratch, "image"), Path(scratch, "mount")
            with LoopFilesystem(image, mount_point, kind=kind, size=16 * GIB):
                asyncio.run(what(kind.value, mount_point, options.rounds))


if __name__ == "__main__":
    main()
