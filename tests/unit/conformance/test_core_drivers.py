"""Drivers of core-admin behind our contract: plain methods, coroutines, errors."""

import asyncio
import errno
from pathlib import Path
from types import SimpleNamespace

import pytest

from qubes_itests.conformance.core_drivers import CorePool
from qubes_storage.exc import (
    InvalidSizeError,
    InvalidVolumeConfigError,
    StoragePoolException,
    VolumeError,
    VolumeNotFoundError,
    VolumeStateError,
)


class CoreError(Exception):
    """What the name says is all that is known of such a class."""


CoreError.__name__ = "StoragePoolException"


class TheirVolume:
    def __init__(self, name, vid, source=None, **config):
        self.name, self.vid, self.source = name, vid, source
        self.rw = self.save_on_stop = True
        self.snap_on_start = source is not None
        self.config = {"name": name, "vid": vid, **config}
        self.calls = []
        self.size = 7
        self.error = None

    async def start(self):
        self.calls.append("start")
        if self.error is not None:
            raise self.error

    def stop(self):
        self.calls.append("stop")

    def export(self):
        return "/image"

    def import_data(self, size):
        self.calls.append(size)
        return "/import"

    def import_volume(self, source):
        self.calls.append(source)


class TheirPool:
    name, revisions_to_keep, ephemeral_volatile = "pool", 1, False

    def __init__(self):
        self.volumes = []

    def init_volume(self, vm, config):
        if config["name"] == "bad":
            raise CoreError("no such name")
        config.setdefault("vid", f"{vm.dir_path_prefix}/{vm.name}/{config['name']}")
        self.volumes.append(TheirVolume(**config))
        return self.volumes[-1]

    def list_volumes(self):
        return self.volumes


@pytest.fixture
def pool():
    return CorePool(TheirPool())


@pytest.fixture
def volume(pool):
    owner = SimpleNamespace(name="work", dir_path_prefix="appvms")
    return pool.init_volume(owner, {"name": "private"})


def test_plain_methods_and_coroutines_are_called_alike(volume):
    assert asyncio.run(volume.start()) is volume
    assert asyncio.run(volume.stop()) is volume
    assert asyncio.run(volume.export()) == Path("/image")
    assert asyncio.run(volume.import_data()) == Path("/import")
    assert volume.theirs.calls == ["start", "stop", volume.theirs.size]


def test_a_volume_is_one_object_and_the_driver_gets_its_own(pool, volume):
    assert pool.get_volume("appvms/work/private") is volume
    assert pool.list_volumes() == [volume]
    other = pool.init_volume(None, {"name": "root", "vid": "appvms/work/root"})
    snapshot = pool.init_volume(
        None, {"name": "root", "vid": "appvms/a/root", "source": volume.vid}
    )
    assert snapshot.theirs.source is volume.theirs
    asyncio.run(other.import_volume(volume))
    assert other.theirs.calls == [volume.theirs]
    with pytest.raises(VolumeNotFoundError):
        pool.get_volume("appvms/none/private")


@pytest.mark.parametrize(
    "error",
    [CoreError("not now"), NotImplementedError("no"), KeyError("5"), AssertionError()],
)
def test_a_refusal_is_each_of_the_refusals_that_we_tell_apart(volume, error):
    volume.theirs.error = error
    with pytest.raises(VolumeError) as caught:
        asyncio.run(volume.start())
    for kind in (VolumeStateError, VolumeNotFoundError, InvalidSizeError):
        assert isinstance(caught.value, kind)
    told = caught.value
    assert (told.vid, told.action) == (volume.vid, "start")
    assert told.__cause__ is error


def test_an_error_of_the_system_is_one_of_storage_and_no_refusal(volume):
    volume.theirs.error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(StoragePoolException, match="No space") as caught:
        asyncio.run(volume.start())
    assert not isinstance(caught.value, VolumeStateError)


def test_what_is_not_there_is_not_found(volume):
    volume.theirs.error = FileNotFoundError(errno.ENOENT, "none", "/image")
    with pytest.raises(VolumeNotFoundError, match="/image"):
        asyncio.run(volume.start())


def test_a_fault_of_the_driver_is_no_refusal(volume):
    volume.theirs.error = TypeError("a bug")
    with pytest.raises(TypeError):
        asyncio.run(volume.start())


def test_a_volume_that_is_refused_is_a_bad_configuration(pool):
    with pytest.raises(InvalidVolumeConfigError):
        pool.init_volume(None, {"name": "bad", "vid": "appvms/work/bad"})
