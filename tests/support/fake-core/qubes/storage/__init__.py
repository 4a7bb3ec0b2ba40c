"""What a driver of storage is made of."""


class StoragePoolException(Exception):
    """A driver refuses something."""


class Pool:
    """A place for volumes."""

    def __init__(self, *, name, revisions_to_keep=1):
        self.name = name
        self.revisions_to_keep = revisions_to_keep
        self.ephemeral_volatile = False


class Volume:
    """One disk of a VM."""

    save_on_stop = snap_on_start = rw = False
    source = None

    def __init__(self, *, revisions_to_keep=0, size=0, **config):
        vars(self).update(config)
        self.revisions_to_keep = revisions_to_keep
        self._size = size

    def export_end(self, path):
        pass
