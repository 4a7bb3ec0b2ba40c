"""Random operations on volumes of all kinds, next to a model, on real filesystems.

A failure prints its steps.  To try many more, and have what fails shrunk to the fewest
steps::

    ./run-tests --hypothesis-profile=long --itests-timeout=0 \
        tests/integration/storage/test_volume_machine.py
"""

import pytest
from volume_machine import run_machine

from qubes_storage.reflink import ReflinkPool


@pytest.mark.parametrize("filesystem", ["btrfs", "xfs"])
def test_volumes_behave_like_their_model(filesystem, request):
    def make_pool(directory):
        return ReflinkPool(name="real", dir_path=directory)

    home = request.getfixturevalue(filesystem)
    run_machine(home, make_pool, examples=30, steps=50)
