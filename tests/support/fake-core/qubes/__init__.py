"""The little of a core that is asked for when its store is made."""

import os
import pathlib


class Storage:
    """Images of one VM."""

    def __init__(self, directory):
        self.directory = directory

    async def import_data(self, volume, size):
        path = self.directory / f"{volume}.img"
        path.touch()
        os.truncate(path, size)
        return str(path)

    async def import_data_end(self, volume, success):
        assert success, volume


class VM:
    """A VM: properties, and a folder for images."""

    def __init__(self, app, **properties):
        vars(self).update(properties)
        self.features = {}
        self.storage = Storage(app.path.parent / "vm-templates" / self.name)

    async def create_on_disk(self):
        self.storage.directory.mkdir()


class Qubes:
    """A store: names of VMs, one a line."""

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.domains = []

    @classmethod
    def create_empty_store(cls, path, **properties):
        app = cls(path)
        vars(app).update(properties)
        return app

    async def setup_pools(self):
        pass

    def add_new_vm(self, cls, **properties):
        self.domains.append(VM(self, klass=cls, **properties))
        return self.domains[-1]

    def save(self):
        self.path.write_text("".join(f"{vm.name}\n" for vm in self.domains))

    def close(self):
        self.domains.clear()
