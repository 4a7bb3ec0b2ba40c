"""Replacing and reading what a volume holds, begun and ended together.

What begins an import or an export makes a claim that only its end drops.  So nobody but
drivers calls `Volume.import_data` and `Volume.export` by themselves: who is cancelled
while they run would not know whether there is something to be ended.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from qubes_storage.uninterrupted import to_its_end

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from qubes_storage.volume import Volume

__all__ = ["Import", "exporting"]


class Import:
    """An async context manager that replaces the content of a volume.

    Entered, it gives the file to be written to.  What was written is committed if the
    body ends well; if it raises, or is cancelled at whatever point, all of it is
    dropped.  A thread that writes to the file has to end before the body does.

    :param volume: of any driver.
    :param size: bytes; None for the present size.
    """

    def __init__(self, volume: Volume, size: int | None = None) -> None:
        self.volume = volume
        self.size = size
        #: Whether the volume has the new content.
        self.committed = False

    async def __aenter__(self) -> Path:
        """Begin.

        :raise VolumeError: as `Volume.import_data`.
        """
        return await to_its_end(
            self.volume.import_data(self.size),
            undo=lambda _path: self.volume.import_data_end(success=False),
        )

    async def __aexit__(
        self, kind: type[BaseException] | None, *_error: object
    ) -> None:
        """Commit what was written, or drop it.

        :raise VolumeError: as `Volume.import_data_end`.
        """
        await to_its_end(self._end(success=kind is None))

    async def _end(self, *, success: bool) -> None:
        await self.volume.import_data_end(success)
        self.committed = success


@contextlib.asynccontextmanager
async def exporting(volume: Volume) -> AsyncIterator[Path]:
    """Give the committed image of a volume, to be read only, as long as it is entered.

    :param volume: of any driver.
    :raise VolumeError: as `Volume.export`.
    """
    path = await to_its_end(volume.export(), undo=volume.export_end)
    try:
        yield path
    finally:
        await to_its_end(volume.export_end(path))
