"""Storage of VM images: pools, volumes and their drivers."""

from __future__ import annotations

from qubes_storage.drivers import driver_names, pool_class
from qubes_storage.exc import StoragePoolException
from qubes_storage.pool import Pool, VolumeOwner
from qubes_storage.volume import BlockDevice, Import, Volume, exporting

__all__ = [
    "BlockDevice",
    "Import",
    "Pool",
    "StoragePoolException",
    "Volume",
    "VolumeOwner",
    "driver_names",
    "exporting",
    "pool_class",
]
