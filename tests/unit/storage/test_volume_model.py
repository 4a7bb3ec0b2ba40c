"""Random operations on volumes that snapshot each other, next to a simple model."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from qubes_storage.exc import RevisionNotFoundError, VolumeStateError


@dataclass
class Saved:
    """What a saved volume holds; a content is one byte."""

    keep: int
    committed: bytes = b"\0"
    dirty: bytes | None = None
    revisions: list[bytes] = field(default_factory=list)

    def commit(self, content):
        if self.keep > 0:
            self.revisions.append(self.committed)
        self.revisions = self.revisions[-self.keep :] if self.keep > 0 else []
        self.committed = content


class Volumes(RuleBasedStateMachine):
    """A template's root, a snapshot of it, and a private volume."""

    shop_class: type

    @initialize(root_keep=st.integers(-1, 3), private_keep=st.integers(-1, 3))
    def make(self, root_keep, private_keep):
        self.directory = Path(tempfile.mkdtemp())
        self.shop = self.shop_class(self.directory / "pool")
        self.keep = {"root": root_keep, "private": private_keep}
        self.model = {name: Saved(keep) for name, keep in self.keep.items()}
        self.snapshot_content: bytes | None = None
        self.snapshot_origin: int | None = None
        self.commits = 0
        self._open()
        self.shop.run(self.volumes["private"].create())

    def _open(self):
        root = self.shop.template()
        root.revisions_to_keep = self.keep["root"]
        private = self.shop.volume(revisions_to_keep=self.keep["private"])
        self.volumes = {"root": root, "private": private}
        self.snapshot = self.shop.volume("snapshot", source=root)

    def teardown(self):
        if hasattr(self, "directory"):
            shutil.rmtree(self.directory)

    name = st.sampled_from(["root", "private"])
    byte = st.integers(1, 255).map(lambda number: bytes([number]))

    @rule(name=name)
    def start(self, name):
        volume, model = self.volumes[name], self.model[name]
        if self.shop.pool.state(volume.vid).started:
            with pytest.raises(VolumeStateError):
                self.shop.run(volume.start())
            return
        self.shop.run(volume.start())
        model.dirty = model.committed if model.dirty is None else model.dirty

    @rule(name=name, content=byte)
    def write(self, name, content):
        if self.model[name].dirty is not None:
            self.shop.write(self.volumes[name].path, content)
            self.model[name].dirty = content

    @rule(name=name)
    def stop(self, name):
        model = self.model[name]
        self.shop.run(self.volumes[name].stop())
        if model.dirty is not None:
            model.commit(model.dirty)
            model.dirty = None
            self.commits += name == "root"

    @rule(name=name, back=st.integers(1, 4))
    def revert(self, name, back):
        volume, model = self.volumes[name], self.model[name]
        ids = list(volume.revisions)
        wanted = ids[-back] if back <= len(ids) else None
        if model.dirty is not None:
            with pytest.raises(VolumeStateError):
                self.shop.run(volume.revert(wanted))
        elif not ids:
            with pytest.raises(RevisionNotFoundError):
                self.shop.run(volume.revert(wanted))
        else:
            self._revert(volume, model, wanted)

    def _revert(self, volume, model, wanted):
        index = list(volume.revisions).index(wanted) if wanted else -1
        revisions = volume.files.revisions()
        image = volume.files.revision(revisions[index])
        same = image.samefile(volume.files.clean)
        self.shop.run(volume.revert(wanted))
        if not same:
            model.commit(model.revisions[index])
            self.commits += volume is self.volumes["root"]

    @rule(name=name, content=byte, success=st.booleans())
    def import_data(self, name, content, success):
        volume, model = self.volumes[name], self.model[name]
        if model.dirty is not None:
            with pytest.raises(VolumeStateError):
                self.shop.run(volume.import_data())
            return
        path = self.shop.run(volume.import_data())
        self.shop.write(path, content)
        self.shop.run(volume.import_data_end(success))
        if success:
            model.commit(content)
            self.commits += name == "root"

    @precondition(lambda self: self.model["private"].dirty is None)
    @rule()
    def clone(self):
        root, private = self.model["root"], self.model["private"]
        if root.dirty is not None and not self.volumes["root"].files.clean.exists():
            return
        self.shop.run(self.volumes["private"].import_volume(self.volumes["root"]))
        private.commit(root.committed)

    @rule(name=name)
    def prepare(self, name):
        self.shop.run(self.volumes[name].prepare())

    @rule(name=name)
    def enlarge(self, name):
        volume = self.volumes[name]
        self.shop.run(volume.resize(volume.size + 512))
        self.commits += name == "root" and self.model[name].dirty is None

    @rule()
    def start_snapshot(self):
        if self.snapshot_content is not None:
            with pytest.raises(VolumeStateError):
                self.shop.run(self.snapshot.start())
        elif not self.volumes["root"].files.clean.exists():
            with pytest.raises(VolumeStateError, match="no snapshot"):
                self.shop.run(self.snapshot.start())
        else:
            self.shop.run(self.snapshot.start())
            self.snapshot_content = self.model["root"].committed
            self.snapshot_origin = self.commits

    @rule()
    def stop_snapshot(self):
        self.shop.run(self.snapshot.stop())
        self.snapshot_content = None

    @rule()
    def restart_process(self):
        """Forget everything but the files; what was started counts as crashed."""
        self.shop.reopen()
        self._open()
        self.shop.run(self.snapshot.stop())
        self.snapshot_content = None

    @invariant()
    def files_agree_with_the_model(self):
        if not hasattr(self, "model"):
            return
        for name, model in self.model.items():
            volume = self.volumes[name]
            assert volume.is_dirty() == (model.dirty is not None)
            if model.dirty is not None:
                assert self.shop.read(volume.path) == model.dirty
            if volume.files.clean.exists():
                assert self.shop.committed(volume) == model.committed
            assert self.shop.kept(volume) == b"".join(model.revisions)

    @invariant()
    def the_snapshot_agrees_with_the_model(self):
        if getattr(self, "snapshot_content", None) is None:
            return
        assert self.shop.read(self.snapshot.path) == self.snapshot_content
        outdated = self.snapshot_origin != self.commits
        if self.volumes["root"].files.clean.exists():
            assert self.snapshot.is_outdated() >= outdated or self._back_at_origin()

    def _back_at_origin(self):
        origin = self.snapshot.files.clean
        return origin.samefile(self.volumes["root"].files.clean)


def test_volumes_behave_like_their_model(shop_class):
    Volumes.shop_class = shop_class
    machine = Volumes.TestCase
    machine.settings = settings(
        max_examples=40,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    machine("runTest").runTest()
