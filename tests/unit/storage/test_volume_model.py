"""Random operations on volumes of all kinds, next to a model, in a plain directory."""

import pytest
from volume_machine import run_machine

from qubes_storage.file import FilePool
from qubes_storage.reflink import ReflinkPool


@pytest.mark.parametrize(
    ("driver", "options"), [(ReflinkPool, {"setup_check": "no"}), (FilePool, {})]
)
def test_volumes_behave_like_their_model(tmp_path, driver, options):
    """Real filesystems with many more steps are an integration test."""

    def make_pool(directory):
        return driver(name="plain", dir_path=directory, **options)

    run_machine(tmp_path, make_pool, examples=15, steps=40)
