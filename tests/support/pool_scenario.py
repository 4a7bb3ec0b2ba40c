"""A life of a pool in steps, what each leaves, and what a power cut may leave of it.

Every sector of an image that was written holds a version and its own number.  After
each step a note says what all volumes hold, so the same notes that tell how far the
workload came tell what must be found.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import os
import re
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qubes_storage.reflink import ReflinkPool

SECTOR = 512
SECTORS = 256
SIZE = SECTOR * SECTORS

_TAG = struct.Struct("<II")
_SAVED = {"rw": True, "save_on_stop": True, "size": SIZE}
_LEFT = re.compile(r"~|-import\.img$|-origin\.img$")
GARBAGE = -1
LAST = 9999


def sector(version, number):
    return _TAG.pack(version, number) * (SECTOR // _TAG.size)


def write(path, version, start=0, end=SECTORS, *, step=1, sync=True):
    """Write one version to some sectors, as a VM does."""
    fd = os.open(path, os.O_RDWR)
    try:
        for number in range(start, end, step):
            os.pwrite(fd, sector(version, number), number * SECTOR)
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)


@functools.lru_cache(maxsize=512)
def versions(content):
    """Return the version of each sector; 0 for zeros, GARBAGE for what nobody wrote."""
    found = []
    for number in range(len(content) // SECTOR):
        data = content[number * SECTOR : (number + 1) * SECTOR]
        version = _TAG.unpack_from(data)[0]
        expected = sector(version, number) if version else bytes(SECTOR)
        found.append(version if data == expected else GARBAGE)
    return tuple(found)


def read(path):
    """Return an image as pairs of a version and of how many sectors have it."""
    if not path.exists():
        return None
    grouped = itertools.groupby(versions(path.read_bytes()))
    return [[version, len(list(group))] for version, group in grouped]


def flat(image):
    return [version for version, count in image for _ in range(count)]


class Scenario:
    """A pool and its volumes, in a directory.

    :param directory: root of the filesystem.
    :param pool_class: of the driver.
    """

    def __init__(self, directory, pool_class=ReflinkPool):
        # One loop for all operations: to make one takes longer than most of them.
        self._runner = asyncio.Runner()
        self.pool = pool_class(name="crash", dir_path=directory / "pool")
        self.wait_for(self.pool.setup())
        self.volumes: dict[str, Any] = {}
        #: Those whose VM has flushed nothing since its start.
        self.fresh = set()
        self._add("template", "vm-templates", "root", revisions_to_keep=2, **_SAVED)
        self._add("work", "appvms", "private", revisions_to_keep=1, **_SAVED)
        self._add("bare", "appvms", "private", revisions_to_keep=-1, **_SAVED)
        self._add("none", "appvms", "private", revisions_to_keep=0, **_SAVED)
        self._add("clone", "appvms", "private", revisions_to_keep=3, **_SAVED)
        source = self.volumes["template"]
        flags = {"rw": True, "snap_on_start": True, "source": source}
        self._add("snapshot", "appvms", "root", **flags)
        self._add("both", "appvms", "root", save_on_stop=True, **flags)

    def close(self):
        """Forget what was started, as the end of the process does."""
        self.wait_for(self.pool.destroy())
        self._runner.close()

    def wait_for(self, coroutine):
        return self._runner.run(coroutine)

    def _add(self, vm, prefix, name, **config):
        owner = SimpleNamespace(name=vm, dir_path_prefix=prefix)
        volume = self.pool.init_volume(owner, {"name": name, **config})
        self.volumes[vm] = volume

    def image(self, vm, suffix=""):
        path = self.pool.dir_path / self.volumes[vm].vid
        return path.with_name(f"{path.name}{suffix}.img")

    def revisions(self, vm):
        """Return the images of the revisions, oldest first."""
        clean = self.image(vm)
        ids = self.volumes[vm].revisions
        names = (f".{i}" if re.match(r"\d+@", i) else f"@{i}" for i in ids)
        return [read(clean.with_name(f"{clean.name}{name}")) for name in names]

    def observe(self):
        """Return the images of each volume that keeps one, revisions oldest first."""
        found = {}
        for vm, volume in self.volumes.items():
            if volume.save_on_stop:
                found[vm] = {
                    "clean": read(self.image(vm)),
                    "dirty": read(self.image(vm, "-dirty"))
                    if volume.is_dirty()
                    else None,
                    "former": self.revisions(vm)[-max(0, volume.revisions_to_keep) :]
                    if volume.revisions_to_keep > 0
                    else [],
                }
        return found

    def leftovers(self):
        names = (str(path) for path in self.pool.dir_path.rglob("*"))
        return sorted(name for name in names if _LEFT.search(name))

    def run(self, vm, operation, *arguments):
        return self.wait_for(getattr(self.volumes[vm], operation)(*arguments))

    def write(self, vm, version, *arguments, **options):
        write(Path(self.volumes[vm].path), version, *arguments, **options)
        if options.get("sync", True):
            self.fresh.discard(vm)

    # The steps.  What a VM writes in them has the version that `steps` names.

    def create(self, vm, _version):
        self.run(vm, "create")

    def start(self, vm, _version):
        self.run(vm, "start")
        self.fresh.add(vm)

    def write_all(self, vm, version):
        self.write(vm, version)

    def write_some(self, vm, version):
        self.write(vm, version, 3, SECTORS, step=5)

    def stop(self, vm, version):
        # Nobody has flushed this: the commit has to.
        self.write(vm, version, 8, 90, sync=False)
        self.run(vm, "stop")

    def write_part(self, vm, version):
        self.write(vm, version, 64, 128)

    def prepare(self, vm, _version):
        if hasattr(self.volumes[vm], "prepare"):  # not all drivers have a use for it
            self.run(vm, "prepare")

    def revert(self, vm, _version):
        self.run(vm, "revert")

    def revert_to_oldest(self, vm, _version):
        self.run(vm, "revert", next(iter(self.volumes[vm].revisions)))

    def enlarge(self, vm, _version):
        self.run(vm, "resize", self.volumes[vm].size + SIZE // 2)
        self.fresh.discard(vm)

    def import_data(self, vm, version):
        path = self.run(vm, "import_data", SIZE)
        write(path, version, sync=False)
        self.run(vm, "import_data_end", True)

    def drop_import(self, vm, version):
        path = self.run(vm, "import_data", SIZE)
        write(path, version, sync=False)
        self.run(vm, "import_data_end", False)

    def import_template(self, vm, _version):
        volumes = self.volumes
        self.wait_for(volumes[vm].import_volume(volumes["template"]))

    def remove(self, vm, _version):
        self.run(vm, "remove")
        self.pool._volumes[self.volumes[vm].vid] = self.volumes[vm]


_SESSION = ("start", "write_part", "stop")
_STEPS = [
    ("template", "create"),
    ("template", "start"),
    ("template", "write_all"),
    ("template", "stop"),
    ("work", "create"),
    ("work", "session"),
    ("work", "start"),
    ("snapshot", "start"),
    ("snapshot", "write_some"),
    ("work", "write_all"),
    ("template", "session"),
    ("work", "write_some"),
    ("work", "enlarge"),
    ("snapshot", "stop"),
    ("work", "stop"),
    ("template", "prepare"),
    ("template", "start"),
    ("template", "write_some"),
    ("bare", "create"),
    ("bare", "session"),
    ("bare", "start"),
    ("template", "stop"),
    ("template", "revert"),
    ("bare", "write_some"),
    ("bare", "stop"),
    ("work", "revert"),
    ("work", "enlarge"),
    ("none", "import_data"),
    ("none", "session"),
    ("none", "start"),
    ("none", "stop"),
    ("clone", "import_template"),
    ("clone", "session"),
    ("clone", "drop_import"),
    ("clone", "import_data"),
    ("clone", "revert_to_oldest"),
    ("both", "start"),
    ("both", "write_some"),
    ("template", "session"),
    ("both", "stop"),
    ("both", "session"),
    ("work", "remove"),
    ("work", "create"),
    ("none", "import_template"),
    ("work", "import_data"),
    ("clone", "remove"),
    ("bare", "session"),
    ("template", "revert_to_oldest"),
    ("template", "session"),
]
STEPS = [
    (vm, one)
    for vm, step in _STEPS
    for one in (_SESSION if step == "session" else (step,))
]


def live(filesystem, pool_class=ReflinkPool):
    """Go through the steps in a `FaultFilesystem`, and note what each leaves."""
    scenario = Scenario(filesystem.mount_point, pool_class)
    note(filesystem, {"volumes": scenario.observe()})
    for version, (vm, step) in enumerate(STEPS, 1):
        note(filesystem, {"vm": vm, "step": step, "version": version})
        getattr(scenario, step)(vm, version)
        fresh = sorted(scenario.fresh)
        note(filesystem, {"volumes": scenario.observe(), "fresh": fresh})
    scenario.close()


def note(filesystem, text):
    filesystem.disk.note(json.dumps(text))


class Verdict:
    """Judges what a power cut left.

    :param crash: from `faultdisk.examine`.
    """

    def __init__(self, crash):
        reached = [json.loads(text) for text in crash.reached]
        ahead = [json.loads(text) for text in crash.ahead]
        done = [text["volumes"] for text in reached if "volumes" in text]
        coming = [text["volumes"] for text in ahead if "volumes" in text]
        self.begun = bool(done)
        self.before = done[-1] if done else {}
        notes = [text for text in reached if "fresh" in text]
        self.fresh = notes[-1]["fresh"] if notes else []
        running = bool(reached) and "step" in reached[-1]
        self.step = reached[-1] if running else {"vm": None, "version": 0}
        self.after = coming[0] if running else self.before

    def check(self, found):
        """Each volume is as before or after the step that the power cut ended."""
        for vm, state in found.items():
            before, after = self.before[vm], self.after[vm]
            if state != after and not self._is_before(vm, state, before, after):
                raise AssertionError(
                    f"{vm} in {self.step}:\n found {state}\n before {before}\n"
                    f" after {after}"
                )

    def _is_before(self, vm, state, before, after):
        committed = ("clean", "former")
        if any(state[name] != before[name] for name in committed):
            return False
        writing = self.step["version"] if vm == self.step["vm"] else 0
        steps = (before["dirty"], after["dirty"])
        if state["dirty"] is None:
            # A start is on the disk only when its VM has brought something there.
            return None in steps or vm in self.fresh
        return is_mixture(state["dirty"], steps, writing)


def is_mixture(image, images, version):
    """Each sector is of one of the images, or of the version that is being written."""
    image = flat(image)
    known = [flat(one) for one in images if one is not None] or [[]]
    if not version:
        return image in known
    return all(
        found in {0, version}
        or any(number < len(one) and one[number] == found for one in known)
        for number, found in enumerate(image)
    )


def must_work(scenario, found, only=None):
    """Whatever was left, each volume can be used, and no leftovers stay."""
    wanted = set(scenario.volumes) if only is None else set(only)
    scenario.wait_for(_use(scenario, found, wanted))
    scenario.wait_for(scenario.pool.settled())
    assert scenario.leftovers() == []


async def _use(scenario, found, wanted):
    snapshots = wanted & {"snapshot", "both"}
    await asyncio.gather(
        *(_use_saved(scenario, vm, found[vm]) for vm in wanted - snapshots)
    )
    source = read(scenario.image("template"))
    expected = {vm: found.get(vm, {}).get("dirty") or source for vm in snapshots}
    await asyncio.gather(*(_session(scenario, vm, expected[vm]) for vm in snapshots))


async def _use_saved(scenario, vm, state):
    if state["clean"] is None and state["dirty"] is None:
        await scenario.volumes[vm].create()
    expected = state["dirty"] or state["clean"] or [[0, SECTORS]]
    await _session(scenario, vm, expected)


async def _session(scenario, vm, expected):
    volume = scenario.volumes[vm]
    await volume.start()
    assert read(Path(volume.path)) == expected
    former = read(scenario.image(vm))
    scenario.write(vm, LAST, 0, 16)
    await volume.stop()
    if not volume.save_on_stop:
        return
    assert flat(read(scenario.image(vm)))[:16] == [LAST] * 16
    assert len(volume.revisions) <= max(0, volume.revisions_to_keep)
    if volume.revisions_to_keep > 0 and former:
        await volume.revert()
        assert read(scenario.image(vm)) == former


def survives(crash, pool_class=ReflinkPool):
    """Check a filesystem after a power cut: `faultdisk.examine` calls this.

    :return: whether there was anything to judge; before the first note there is not.
    """
    verdict = Verdict(crash)
    scenario = Scenario(crash.directory, pool_class)
    try:
        if verdict.begun:
            found = scenario.observe()
            verdict.check(found)
            must_work(scenario, found)
    finally:
        scenario.close()
    return verdict.begun
