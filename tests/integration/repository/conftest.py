"""What the tests of layers have in common: a bench to build some over `tiny`."""

import pytest

from qubes_itests.guest.exc import LayerError
from qubes_itests.guest.image.layer import Layers, Step, build_layers
from qubes_itests.guest.image.tiny import build_tiny
from qubes_itests.host.cache import Cache
from qubes_itests.host.kernel import find_kernel


class Workbench:
    """Builds layers over `tiny`, in a cache of the test's own."""

    def __init__(self, directory, base):
        self.app = directory / "app"
        self.app.mkdir()
        self.base = base
        self.cache = Cache(directory / "cache")
        self.log = directory / "logs/template.log"
        self.said = []

    def build(self, script="", *, copies=(), timeout=600, more=()):
        steps = (Step("my-app", tuple(copies), script, timeout), *more)
        layers = Layers("mine", self.base, steps=steps)
        return build_layers(self.cache, layers, self.log, self.said.append)

    def fails(self, script, **values):
        with pytest.raises(LayerError) as caught:
            self.build(script, **values)
        assert caught.value.log == self.log
        assert self.cache.entries("layer") == []
        return caught.value


@pytest.fixture(scope="session")
def make_bench(sandbox):  # noqa: ARG001 - first
    """Return a function that makes a `Workbench` in an empty directory."""
    cache = Cache()
    base = build_tiny(cache, find_kernel(cache)).root_image
    return lambda directory: Workbench(directory, base)


@pytest.fixture
def bench(tmp_path, make_bench):
    return make_bench(tmp_path)
