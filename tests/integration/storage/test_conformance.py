"""The bundled drivers pass the conformance suite."""

from qubes_itests.conformance.storage import StorageConformance
from qubes_storage.file import FilePool
from qubes_storage.reflink import ReflinkPool


class TestReflink(StorageConformance):
    # all are cut, and full, in the tests of faults, which look closer
    fault_filesystems = ("xfs",)
    power_cuts = 10

    def make_pool(self, name, directory):
        return ReflinkPool(name=name, dir_path=directory / "pool", setup_check="no")


class TestFile(StorageConformance):
    fault_filesystems = ("ext4",)
    lacks = frozenset({"shared_extents"})
    power_cuts = 10

    def make_pool(self, name, directory):
        return FilePool(name=name, dir_path=directory / "pool")
