"""Random operations on volumes of all kinds, next to a model, in a plain directory."""

import os

import pytest
from volume_machine import run_machine

from qubes_storage import StoragePoolException
from qubes_storage.file import FilePool
from qubes_storage.layout import VolumeFiles
from qubes_storage.reflink import ReflinkPool, ReflinkVolume


@pytest.mark.parametrize(
    ("driver", "options"), [(ReflinkPool, {"setup_check": "no"}), (FilePool, {})]
)
def test_volumes_behave_like_their_model(tmp_path, driver, options):
    """Real filesystems with many more steps are an integration test."""

    def make_pool(directory):
        return driver(name="plain", dir_path=directory, **options)

    run_machine(tmp_path, make_pool, examples=8, steps=40)


def _resize_in_place(monkeypatch):
    copy = ReflinkVolume._copy

    def copy_or_resize(volume, source, target, *, size=None, **options):
        if size is None:
            copy(volume, source, target, **options)
        else:
            os.truncate(target, size)

    monkeypatch.setattr(ReflinkVolume, "_copy", copy_or_resize)


def _keep_one_too_few(monkeypatch):
    prune = VolumeFiles._prune
    monkeypatch.setattr(VolumeFiles, "_prune", lambda self, keep: prune(self, keep - 1))


@pytest.mark.parametrize("sabotage", [_resize_in_place, _keep_one_too_few])
def test_a_driver_with_a_fault_does_not(tmp_path, monkeypatch, sabotage):
    """The machine finds what a slip in one line of a driver does."""
    sabotage(monkeypatch)

    def make_pool(directory):
        return ReflinkPool(name="plain", dir_path=directory, setup_check="no")

    failures = (AssertionError, StoragePoolException, pytest.fail.Exception)
    with pytest.raises(failures):
        run_machine(tmp_path, make_pool, examples=100, steps=60)
