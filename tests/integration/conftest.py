"""A cache of its own for the runs that tests make, kept from one to the next."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
import tiny_cache
from plugin_site import PluginSite

from qubes_itests.host.cache import Cache
from qubes_itests.host.kernel import find_kernel


@pytest.fixture(scope="session")
def shared_cache(sandbox):  # noqa: ARG001 - first
    root = Path(tempfile.mkdtemp(prefix="qi-"))
    tiny_cache.fill(root)
    yield root
    shutil.rmtree(root)


@pytest.fixture(scope="session")
def make_site(shared_cache):
    """Return a function that makes a `PluginSite` in an empty directory."""

    def make(root):
        environment = {
            "QUBES_ITESTS_CACHE": str(shared_cache),
            "OUTSIDE": str(Path("/proc/self/ns/pid").readlink()),
            "QUBES_ITESTS_KERNEL": str(find_kernel(Cache()).image),
        }
        return PluginSite(root, environment)

    return make


@pytest.fixture
def power_cuts(pytestconfig):
    """Return a function: how many `examine` looks at if a test says that number.

    The command line may say another one.
    """

    def looked_at(states):
        if pytestconfig.getoption("--itests-crash-replay"):
            return 1
        return pytestconfig.getoption("--itests-crash-states") or states

    return looked_at


@pytest.fixture
def site(tmp_path, make_site):
    return make_site(tmp_path)
