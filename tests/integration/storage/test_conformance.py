"""The bundled drivers pass the conformance suite."""

from qubes_itests.conformance.storage import StorageConformance
from qubes_storage.reflink import ReflinkPool


class TestReflink(StorageConformance):
    def make_pool(self, name, directory):
        return ReflinkPool(name=name, dir_path=directory / "pool", setup_check="no")
