"""Devices of the storage driver `file`, without device mapper.

In dom0 two scripts make them. An origin is a volume that is written to, and what is
overwritten goes to the copy-on-write file beside it; a snapshot shows the volume as it
was when that file was new, and writes into a file of its own. Device mapper belongs to
the machine: containers have none, and what a run left of it would stay. So a device is
a link to a file here, and a copy-on-write file holds the whole of what a snapshot
shows. It shares its data with the volume where the filesystem can do that.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from qubes_storage.ficlone import clone_or_copy

__all__ = ["MAPPER", "create_snapshot", "destroy_snapshot"]

#: Where a core expects the devices.
MAPPER: Final = Path("/dev/mapper")


def create_snapshot(
    name: str, volume: Path, changes: Path, own: Path | None = None
) -> None:
    """Make a device, as ``create-snapshot`` of core-admin does. Blocking.

    :param name: of the device.
    :param volume: the image.
    :param changes: the copy-on-write file beside it, which exists.
    :param own: that of a snapshot, which is new; None for an origin.
    :raise ValueError: it is no name.
    :raise OSError: as the operating system says.
    """
    device = _device(MAPPER / name)
    # one that an earlier start has filled, and no stop has put away, stays as it is
    kept = changes.stat().st_blocks > 0
    if own is not None:
        # that beside an origin which is not there stays new: filled, it would have the
        # volume pass for one that was not stopped
        _take(changes if kept else volume, own)
    elif not kept:
        _take(volume, changes)
    device.unlink(missing_ok=True)
    device.symlink_to(volume if own is None else own)


def destroy_snapshot(device: Path) -> None:
    """Remove a device, as ``destroy-snapshot`` does; its files stay.

    :raise ValueError: it is a file of another directory.
    :raise OSError: there is none.
    """
    _device(device).unlink()


def _device(path: Path) -> Path:
    if path.parent != MAPPER:
        raise ValueError(f"expected a device in {MAPPER}, got {os.fspath(path)!r}")
    return path


def _take(source: Path, target: Path) -> None:
    with source.open("rb") as reader, target.open("r+b") as writer:
        size = os.fstat(writer.fileno()).st_size
        try:
            clone_or_copy(reader.fileno(), writer.fileno())
        except OSError:
            # by its data a part would pass for the whole
            os.truncate(writer.fileno(), 0)
            os.truncate(writer.fileno(), size)
            raise
        if not os.fstat(writer.fileno()).st_blocks:
            # of a source that is one hole: by its data it is told from a new one
            os.pwrite(writer.fileno(), b"\0", 0)
