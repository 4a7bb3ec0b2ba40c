"""An app without guests: its hypervisor is never asked for anything."""

import asyncio

import pytest

from qubes_itests.core.app import Qubes
from qubes_storage.reflink import ReflinkPool


class NoHypervisor:
    """Fails the test that reaches it."""

    slowness = 1.0

    def __getattr__(self, name):
        raise AssertionError(f"the hypervisor was asked for {name}")


@pytest.fixture
def app(tmp_path):
    app = Qubes(hypervisor=NoHypervisor(), directory=tmp_path)
    pool = ReflinkPool(name="default", dir_path=tmp_path / "pool", setup_check=False)
    asyncio.run(app.add_pool(pool))
    return app


@pytest.fixture
def stored(tmp_path):
    """Make an app that is saved to the file `qubes.xml`, with nothing in it."""
    return Qubes(tmp_path / "qubes.xml", load=False, hypervisor=NoHypervisor())


@pytest.fixture
def load(tmp_path):
    """Load what an app has saved, or what a file of the test's own says."""

    def load(text=None, **options):
        path = tmp_path / "qubes.xml"
        if text is not None:
            path.write_text(text.replace("{directory}", str(tmp_path / "pool")))
        options = {"hypervisor": NoHypervisor(), "directory": tmp_path} | options
        return asyncio.run(Qubes.open(path, **options))

    return load


@pytest.fixture
def template(app):
    return app.add_new_vm("TemplateVM", name="tiny", label="black")
