"""The bundled drivers pass the conformance suite."""

from qubes_itests.conformance.storage import StorageConformance
from qubes_storage.file import FilePool
from qubes_storage.reflink import ReflinkPool


class TestReflink(StorageConformance):
    def make_pool(self, name, directory):
        return ReflinkPool(name=name, dir_path=directory / "pool", setup_check="no")


class TestFile(StorageConformance):
    lacks = frozenset({"shared_extents"})

    def make_pool(self, name, directory):
        return FilePool(name=name, dir_path=directory / "pool")
