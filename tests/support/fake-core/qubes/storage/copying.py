"""A driver that copies images; some of its methods are coroutines, and some are not."""

import os
import shutil

import qubes.storage


def fsync(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def flush(path):
    """Bring the image of a commit to the disk."""
    fsync(path)


def rename(source, target):
    os.rename(source, target)
    fsync(os.path.dirname(target))


def copy(source, target, size=None):
    shutil.copyfile(source, target + "~")
    if size is not None:
        os.truncate(target + "~", size)
    fsync(target + "~")
    rename(target + "~", target)


class CopyingPool(qubes.storage.Pool):
    driver = "file-reflink"

    def __init__(self, *, dir_path, setup_check=True, **kwargs):
        super().__init__(**kwargs)
        self.dir_path = dir_path
        self.volumes = {}

    async def setup(self):
        os.makedirs(self.dir_path, exist_ok=True)
        fsync(os.path.dirname(self.dir_path))

    def destroy(self):
        pass

    def init_volume(self, vm, config):
        config["vid"] = f"{vm.name}-{config['name']}"
        volume = CopyingVolume(pool=self, **config)
        self.volumes[volume.vid] = volume
        return volume

    def list_volumes(self):
        return list(self.volumes.values())


class CopyingVolume(qubes.storage.Volume):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.clean = os.path.join(self.pool.dir_path, self.vid + ".img")
        self.dirty = os.path.join(self.pool.dir_path, self.vid + "-dirty.img")

    @property
    def size(self):
        return os.path.getsize(self.dirty if self.is_dirty() else self.clean)

    @property
    def revisions(self):
        names = [n for n in os.listdir(self.pool.dir_path) if "~" not in n]
        own = [n.split("@")[1] for n in names if n.startswith(self.vid + "@")]
        return dict.fromkeys(sorted(own, key=int), "2026-01-01T00:00:00")

    def path_of(self, revision):
        return os.path.join(self.pool.dir_path, f"{self.vid}@{revision}")

    def block_device(self):
        return self

    @property
    def path(self):
        return self.dirty

    def is_dirty(self):
        return os.path.exists(self.dirty)

    def create(self):
        with open(self.clean + "~", "wb") as file:
            file.truncate(self._size)
        fsync(self.clean + "~")
        rename(self.clean + "~", self.clean)

    def remove(self):
        for revision in self.revisions:
            os.unlink(self.path_of(revision))
        for path in (self.dirty, self.clean):
            if os.path.exists(path):
                os.unlink(path)
        fsync(self.pool.dir_path)

    def verify(self):
        if not os.path.exists(self.clean):
            raise qubes.storage.StoragePoolException("no image")

    async def start(self):
        if self.snap_on_start:
            copy(self.source.clean, self.dirty)
        elif not self.is_dirty() and self.revisions_to_keep == -1:
            rename(self.clean, self.dirty)
        elif not self.is_dirty():
            copy(self.clean, self.dirty)

    async def stop(self):
        if self.snap_on_start:
            os.unlink(self.dirty)
        elif self.is_dirty():
            self.commit(self.dirty)

    def commit(self, image):
        if self.revisions_to_keep > 0:
            numbers = list(map(int, self.revisions))
            copy(self.clean, self.path_of(max(numbers, default=0) + 1))
            for number in numbers[: len(numbers) + 1 - self.revisions_to_keep]:
                os.unlink(self.path_of(number))
            flush(image)
        else:
            fsync(image)
        rename(image, self.clean)

    def revert(self, revision):
        numbers = list(map(int, self.revisions))
        copy(self.clean, self.path_of(max(numbers) + 1))
        rename(self.path_of(revision or max(numbers)), self.clean)

    def resize(self, size):
        path = self.dirty if self.is_dirty() else self.clean
        os.truncate(path, size)
        fsync(path)

    def export(self):
        return self.clean

    def import_data(self, size):
        with open(self.clean + "-import~", "wb") as file:
            file.truncate(size)
        return self.clean + "-import~"

    def import_data_end(self, success):
        if success:
            self.commit(self.clean + "-import~")

    async def import_volume(self, source):
        copy(source.export(), self.clean + "-import~")
        self.commit(self.clean + "-import~")
