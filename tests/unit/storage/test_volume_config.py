from __future__ import annotations

import pytest

from qubes_storage import driver_names, pool_class
from qubes_storage.exc import (
    DriverNotFoundError,
    InvalidSizeError,
    InvalidVolumeConfigError,
    StoragePoolException,
    VolumeNotFoundError,
)
from qubes_storage.reflink import ReflinkPool


def test_the_driver_is_found_by_its_name():
    assert "file-reflink" in driver_names()
    assert pool_class("file-reflink") is ReflinkPool


def test_an_unknown_driver_is_an_error_that_lists_the_known():
    with pytest.raises(DriverNotFoundError, match="file-reflink") as caught:
        pool_class("carrier-pigeon")
    assert caught.value.driver == "carrier-pigeon"


@pytest.mark.parametrize(
    "config",
    [
        {"colour": "red"},
        {"name": None},
        {"name": 3},
        {"pool": "elsewhere"},
        {"snap_on_start": True},
        {"source": "vm-templates/tiny/root"},
        {"revisions_to_keep": -2},
        {"revisions_to_keep": "1"},
        {"revisions_to_keep": True},
    ],
)
def test_a_configuration_without_sense_is_refused(shop, config):
    shop.template()
    with pytest.raises(InvalidVolumeConfigError):
        shop.volume("read_only", **config)


@pytest.mark.parametrize("size", [-1, 2**63, 10**30, 1.5, "4096", None, True])
def test_a_size_that_is_none_is_refused(shop, size):
    with pytest.raises(InvalidSizeError):
        shop.volume(size=size)


def test_an_unknown_source_is_refused(shop):
    with pytest.raises(VolumeNotFoundError):
        shop.volume("snapshot", source="vm-templates/absent/root")


def test_a_source_of_another_pool_is_refused(shop, tmp_path):
    template = shop.template()
    shop.directory = tmp_path / "other"
    shop.reopen()
    with pytest.raises(InvalidVolumeConfigError, match="another pool"):
        shop.volume("snapshot", source=template)


def test_a_configuration_makes_the_same_volume_again(shop):
    shop.template()
    volume = shop.volume("snapshot", source="vm-templates/tiny/root")
    again = shop.pool.init_volume(None, volume.config)
    assert again == volume
    assert again is not volume
    assert again.config == volume.config
    assert shop.pool.get_volume(volume.vid) is again


def test_a_pool_is_made_again_from_its_configuration(shop):
    config = dict(shop.pool.config)
    again = pool_class(config.pop("driver"))(**config)
    assert again.config == shop.pool.config


@pytest.mark.parametrize("value", ["maybe", "", None, 1])
def test_setup_check_is_yes_or_no(tmp_path, value):
    with pytest.raises(StoragePoolException, match="yes or no"):
        ReflinkPool(name="p", dir_path=tmp_path, setup_check=value)


def test_a_pool_below_another_is_included_in_it(tmp_path):
    outer = ReflinkPool(name="outer", dir_path=tmp_path)
    middle = ReflinkPool(name="middle", dir_path=tmp_path / "a")
    inner = ReflinkPool(name="inner", dir_path=tmp_path / "a" / "b")
    assert inner.included_in([outer, middle, inner]) is middle
    assert outer.included_in([outer, middle, inner]) is None
