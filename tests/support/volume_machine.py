"""Random operations on volumes of all kinds, next to a model of each.

`machine_class` makes a hypothesis state machine for pools in a directory.  Each of its
examples has a pool of its own, with two templates' roots, private volumes, snapshots,
a saved snapshot, a volatile and a read-only volume.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from volume_model import BASE, Image, VolumeModel

from qubes_itests.conformance.trial import Trial
from qubes_storage import pool_class
from qubes_storage.exc import (
    InvalidSizeError,
    VolumeExistsError,
    VolumeNotFoundError,
    VolumeStateError,
)

KINDS = {
    "root0": "saved",
    "root1": "saved",
    "private0": "saved",
    "private1": "saved",
    "snapshot0": "snapshot",
    "snapshot1": "snapshot",
    "both": "both",
    "volatile": "volatile",
    "kernel": "read_only",
}
FLAGS = {
    "saved": {"rw": True, "save_on_stop": True},
    "snapshot": {"rw": True, "snap_on_start": True},
    "both": {"rw": True, "snap_on_start": True, "save_on_stop": True},
    "volatile": {"rw": True},
    "read_only": {},
}
PLACES = (0, BASE // 2, BASE - 1)

# What one operation does to a volume shows in the next ones on it and its snapshots.
_OFTEN = ["root0"] * 4 + ["snapshot0"] * 3 + ["private0"] * 3
names = st.sampled_from(_OFTEN + sorted(KINDS))
contents = st.integers(1, 255)
keeps = st.sampled_from([-1, -1, 0, 1, 2, 3])
growths = st.integers(1, 64).map(lambda number: number * 512)


def machine_class(home: Path, make_pool):
    """Return a state machine class.

    :param home: where each example makes a directory for its pool.
    :param make_pool: makes a pool object of a directory.
    """
    members = {"home": home, "make_pool": staticmethod(make_pool)}
    return type("Volumes", (VolumeMachine,), members)


class VolumeMachine(RuleBasedStateMachine):
    home: Path

    @staticmethod
    def make_pool(directory):
        raise NotImplementedError

    # an example's beginning and end

    @initialize(keep=st.lists(keeps, min_size=9, max_size=9), shared=st.booleans())
    def open(self, keep, shared):
        self.directory = Path(tempfile.mkdtemp(dir=self.home))
        self.runner = asyncio.Runner()
        self.trial = Trial(
            lambda: self.make_pool(self.directory / "pool"), pool_class, self.runner
        )
        sources = {"snapshot0": "root0", "both": "root1"}
        sources["snapshot1"] = "root0" if shared else "root1"
        self.model = {
            name: VolumeModel(kind, number, sources.get(name))
            for (name, kind), number in zip(KINDS.items(), keep, strict=True)
        }
        self.imports = {}
        self.inodes = {}
        configs = {name: self.config(name, BASE) for name in KINDS}
        self.volumes = self.objects(self.trial.pool, configs)
        for name in ("root0", "root1"):
            self.create(name)

    def config(self, name, size):
        model = self.model[name]
        return {
            "vid": f"appvms/work/{name}",
            "name": name,
            "size": size,
            "revisions_to_keep": model.keep,
            **FLAGS[model.kind],
        }

    def current_configs(self):
        return {name: self.config(name, v.size) for name, v in self.volumes.items()}

    def objects(self, pool, configs):
        """Return the objects of all volumes in an object of the pool."""
        made = {}
        for name, config in configs.items():
            source = self.model[name].source
            extra = {"source": made[source]} if source else {}
            made[name] = pool.init_volume(None, {**config, **extra})
        return made

    def teardown(self):
        """Remove all volumes; nothing must be left of them."""
        if not hasattr(self, "trial"):
            return
        try:
            for name in reversed(KINDS):
                if self.model[name].started:
                    self.do(name, "stop")
                self.do(name, "remove")
            self.run(self.trial.pool.settled())
            left = self.trial.pool.dir_path.rglob("*")
            assert [path.name for path in left if path.is_file()] == [".lock"]
        finally:
            self.run(self.trial.pool.destroy())
            self.runner.close()
            shutil.rmtree(self.directory)

    def run(self, coroutine):
        return self.runner.run(coroutine)

    def do(self, name, action, *arguments):
        return self.run(getattr(self.volumes[name], action)(*arguments))

    def refused(self, error, name, action, *arguments):
        with pytest.raises(error):
            self.do(name, action, *arguments)

    def lack_of_image(self, name):
        """Return the error of whoever needs a committed image; None if there is one."""
        model = self.model[name]
        if model.committed is not None:
            return None
        return VolumeStateError if model.is_dirty else VolumeNotFoundError

    # life

    @rule(name=names)
    def create(self, name):
        model = self.model[name]
        files = self.volumes[name].files
        if not model.keeps_image:
            # a crash has left it; what a start would replace may be another's
            if files.clean.exists() or files.dirty.exists():
                self.refused(VolumeExistsError, name, "create")
            else:
                self.do(name, "create")
        elif model.committed or model.is_dirty:
            self.refused(VolumeExistsError, name, "create")
        elif model.importing:
            self.refused(VolumeStateError, name, "create")
        else:
            self.do(name, "create")
            model.committed = Image(0, model.configured)

    @rule(name=names)
    def remove(self, name):
        if self.model[name].started:
            self.refused(VolumeStateError, name, "remove")
            return
        self.do(name, "remove")
        self.model[name].forget()
        config = self.config(name, self.model[name].configured)
        if source := self.model[name].source:
            config["source"] = self.volumes[source]
        self.volumes[name] = self.trial.pool.init_volume(None, config)

    def why_not_start(self, name):
        model = self.model[name]
        if model.started or model.importing:
            return VolumeStateError
        if model.is_dirty or model.kind == "volatile":
            return None
        return self.lack_of_image(model.source if model.is_snapshot else name)

    @rule(name=names)
    def start(self, name):
        if error := self.why_not_start(name):
            self.refused(error, name, "start")
            return
        self.do(name, "start")
        self.started(name)

    def started(self, name):
        model = self.model[name]
        model.started = True
        if model.is_dirty or model.kind == "read_only":
            return
        if model.kind == "volatile":
            model.dirty = [0, model.configured]
            return
        image = self.model[model.source or name].committed
        model.dirty = [image.content, image.size]
        if model.is_snapshot:
            model.origin = image
        elif model.keep < 0 and not self.volumes[name].files.clean.exists():
            model.committed = None  # it is what the VM writes

    @rule(name=names, content=contents)
    def write(self, name, content):
        model = self.model[name]
        if model.started and model.dirty is not None:
            write(self.volumes[name].path, content)
            model.dirty[0] = content

    @rule(name=names)
    def stop(self, name):
        self.do(name, "stop")
        self.stopped(name)

    def stopped(self, name):
        model = self.model[name]
        if model.is_dirty:
            model.commit(Image(*model.dirty), former=model.committed)
        if not model.importing:
            model.started, model.dirty, model.origin = False, None, None

    @rule(name=names, content=contents, times=st.integers(1, 3))
    def use(self, name, content, times):
        """Use a volume from start to stop; single steps seldom get there."""
        if self.model[name].committed is None:
            self.create(name)
        for time in range(times):
            self.start(name)
            self.write(name, content ^ time)
            self.stop(name)
            # now, for the number of an inode may come back with the next commit
            self.volumes_agree_with_their_models()

    # contents

    @rule(name=names, keep=keeps)
    def keep(self, name, keep):
        self.volumes[name].revisions_to_keep = self.model[name].keep = keep

    @rule(name=names, back=st.integers(1, 4))
    def revert(self, name, back):
        model, ids = self.model[name], list(self.volumes[name].revisions)
        wanted = ids[-back] if back <= len(ids) else None
        if not model.is_idle:
            self.refused(VolumeStateError, name, "revert", wanted)
        elif not ids:
            self.refused(VolumeNotFoundError, name, "revert", wanted)
        else:
            self.do(name, "revert", wanted)
            image = model.revisions[ids.index(wanted) if wanted else -1]
            if image != model.committed:
                model.commit(image, former=model.committed)

    @rule(name=names, growth=growths)
    def enlarge(self, name, growth):
        model = self.model[name]
        size = self.volumes[name].size + growth
        if error := self.why_not_resize(name):
            self.refused(error, name, "resize", size)
            return
        self.do(name, "resize", size)
        model.configured = size
        if model.dirty is not None:
            model.dirty[1] = size
        elif model.committed is not None:
            model.committed = Image(model.committed.content, size)

    def why_not_resize(self, name):
        model = self.model[name]
        if model.importing or model.kind == "read_only":
            return VolumeStateError
        if model.kind == "volatile" or model.dirty is not None:
            return None
        return (
            VolumeStateError if model.kind == "snapshot" else self.lack_of_image(name)
        )

    @rule(name=names, loss=growths)
    def shrink(self, name, loss):
        """Down to what the places of contents need, if it is stopped."""
        model = self.model[name]
        now = self.volumes[name].size
        size = max(BASE, now - loss)
        if model.dirty is not None and not model.importing:
            self.refused(InvalidSizeError, name, "resize", now - 1)
            return
        if size == now:
            return
        if error := self.why_not_resize(name):
            self.refused(error, name, "resize", size)
            return
        self.do(name, "resize", size)
        model.configured = size
        if model.committed is not None:
            model.committed = Image(model.committed.content, size)

    @rule(name=names, growth=growths)
    def begin_import(self, name, growth):
        model = self.model[name]
        if not (model.keeps_image and model.is_idle):
            self.refused(VolumeStateError, name, "import_data")
        else:
            self.imports[name] = self.do(name, "import_data", BASE + growth)
            model.importing = BASE + growth

    @rule(name=names, content=contents, how=st.sampled_from(["well", "badly", "short"]))
    def end_import(self, name, content, how):
        model = self.model[name]
        if not model.importing:
            self.refused(VolumeStateError, name, "import_data_end", True)
            return
        write(self.imports[name], content)
        size, model.importing = model.importing, None
        if how == "short":
            os.truncate(self.imports[name], size - 1)
            self.refused(InvalidSizeError, name, "import_data_end", True)
            return
        self.do(name, "import_data_end", how == "well")
        if how == "well":
            model.commit(Image(content, size), former=model.committed)

    @rule(name=names, source=names)
    def clone(self, name, source):
        model, other = self.model[name], self.model[source]
        error = None if other.keeps_image else VolumeStateError
        error = error or self.lack_of_image(source)
        if not model.keeps_image:
            error = None
        elif error is None and not model.is_idle:
            error = VolumeStateError
        if error:
            self.refused(error, name, "import_volume", self.volumes[source])
            return
        self.do(name, "import_volume", self.volumes[source])
        if model.keeps_image:
            image = Image(other.committed.content, other.committed.size)
            model.commit(image, former=model.committed)

    @rule(name=names)
    def export(self, name):
        error = self.lack_of_image(name)
        if not self.model[name].keeps_image:
            error = VolumeStateError
        if error:
            self.refused(error, name, "export")
            return
        path = self.do(name, "export")
        assert read(path) == self.model[name].committed.content
        self.do(name, "export_end", path)

    # other objects, other processes

    @rule(name=names)
    def prepare(self, name):
        if hasattr(self.volumes[name], "prepare"):
            self.do(name, "prepare")

    @rule()
    def settle(self):
        self.run(self.trial.pool.settled())

    @rule()
    def crash(self):
        """Forget everything but the files, and open them anew."""
        configs = self.current_configs()
        self.run(self.trial.pool.destroy())
        self.trial.pool = self.trial.other_pool()
        for name, model in self.model.items():
            model.forget_process()
            model.configured = configs[name]["size"]
        self.volumes = self.objects(self.trial.pool, configs)

    @rule(name=names, content=contents, stops=st.booleans(), forks=st.booleans())
    def use_elsewhere(self, name, content, stops, forks):
        """Start a volume in another pool object, perhaps of another process."""
        configs = self.current_configs()

        async def use(pool):
            volume = self.objects(pool, configs)[name]
            await volume.start()
            if self.model[name].kind != "read_only":
                write(volume.path, content)
            if stops:
                await volume.stop()

        error = self.why_not_start(name)
        if error or not forks:
            pool = self.trial.other_pool()
            try:
                self.use_in(pool, use, error)
            finally:
                self.run(pool.destroy())
        else:
            self.run(self.trial.pool.settled())  # no thread may hold a lock in a fork
            with self.trial.process(use):
                if not stops:
                    self.refused(VolumeStateError, name, "start")
        if not error:
            self.used_elsewhere(name, content, stops=stops)

    def use_in(self, pool, use, error):
        if error:
            with pytest.raises(error):
                self.run(use(pool))
        else:
            self.run(use(pool))

    def used_elsewhere(self, name, content, *, stops):
        model = self.model[name]
        self.started(name)
        if model.dirty is not None:
            model.dirty[0] = content
        if stops:
            self.stopped(name)
        else:
            configured = model.configured
            model.forget_process()
            model.configured = configured

    # what must hold at any time

    @invariant()
    def volumes_agree_with_their_models(self):
        for name, model in getattr(self, "model", {}).items():
            volume = self.volumes[name]
            assert volume.is_dirty() == model.is_dirty, name
            if model.dirty is not None:
                assert read(volume.path) == model.dirty[0], name
            if model.keeps_image:
                self.check_committed(volume, model)
                self.check_inode(name, volume.files.clean)
            if model.started or model.kind in {"saved", "volatile", "read_only"}:
                assert volume.size == model.size, name
            if model.started or not model.is_snapshot:
                assert volume.is_outdated() == self.is_outdated(name), name

    @staticmethod
    def check_committed(volume, model):
        assert volume.files.clean.exists() == (model.committed is not None)
        if model.committed:
            assert read(volume.files.clean) == model.committed.content
            assert volume.files.clean.stat().st_size == model.committed.size
        known = volume.revisions
        kept = [r for r in volume.files.revisions() if r.id in known]
        found = [read(volume.files.revision(revision)) for revision in kept]
        assert found == [image.content for image in model.revisions]

    def check_inode(self, name, clean):
        """Check that a committed image is never written, but replaced by another."""
        model = self.model[name]
        before, number = self.inodes.pop(name, (None, None))
        if model.committed is None:
            return
        inode = clean.stat().st_ino
        if model.keep >= 0 and before is not None:
            assert (inode == before) == (model.committed.number == number), name
        self.inodes[name] = inode, model.committed.number

    def is_outdated(self, name):
        model = self.model[name]
        if model.origin is None:
            return False
        return model.origin != self.model[model.source].committed


def write(path, content):
    with path.open("r+b") as file:
        for place in PLACES:
            file.seek(place)
            file.write(bytes([content]))


def read(path):
    with path.open("rb") as file:
        found = set()
        for place in PLACES:
            file.seek(place)
            found.add(file.read(1))
    assert len(found) == 1, f"{path} has parts of several writes: {found}"
    return found.pop()[0]


def run_machine(home, make_pool, *, examples, steps):
    """Run examples; under the profile ``long`` many more, and shrink what fails."""
    case = machine_class(home, make_pool).TestCase
    if settings.get_current_profile_name() == "long":
        examples, steps = settings().max_examples, settings().stateful_step_count
        phases = (Phase.generate, Phase.shrink)
    else:
        phases = (Phase.generate,)  # shrinking takes minutes on a real filesystem
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        phases=phases,
        deadline=None,
        database=None,
        print_blob=True,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    case("runTest").runTest()
