"""The first content of volumes: images and filesystems, and how large those get."""

from __future__ import annotations

import asyncio
import os
import weakref
from typing import TYPE_CHECKING, Final

from qubes_itests.guest.image.private import make_private
from qubes_storage import Import, exporting
from qubes_storage.exc import InvalidSizeError, VolumeNotFoundError
from qubes_storage.ficlone import clone_or_copy, data_extents
from qubes_storage.operation import typed_errors
from qubes_storage.uninterrupted import to_its_end

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator
    from pathlib import Path

    from qubes_storage.volume import Volume

__all__ = [
    "BLOCK",
    "WITH_FILESYSTEM",
    "check_size",
    "copy_committed",
    "copy_image",
    "data_blocks",
    "fill_if_empty",
    "import_blocks",
    "import_image",
    "is_empty",
    "kept_by",
    "write_blocks",
    "write_content",
]

#: The volumes whose filesystem a guest enlarges with them.
WITH_FILESYSTEM: Final = ("root", "private")
#: To what size a guest enlarges its filesystem, bytes. An emulated one takes 20 s for
#: each TiB, at the next start if not now: larger ones would not start in time any more,
#: and beyond some PiB ext4 does not go at all.
_LARGEST_FILESYSTEM: Final = 1 << 40

#: Whose turn it is to look at a volume before a start, and to make its filesystem.
_FILLING: Final[weakref.WeakKeyDictionary[Volume, asyncio.Lock]] = (
    weakref.WeakKeyDictionary()
)

#: What of an image is looked at in one go, bytes.
BLOCK: Final = 1 << 16


def check_size(volume: Volume, action: str, size: int) -> None:
    """Raise InvalidSizeError for one to which a guest enlarges no filesystem."""
    if volume.name in WITH_FILESYSTEM and size > _LARGEST_FILESYSTEM:
        raise InvalidSizeError(
            volume.pool.name,
            volume.vid,
            action,
            f"its filesystem grows to {_LARGEST_FILESYSTEM} bytes at most (1 TiB),"
            f" not to {size}",
        )


def kept_by(volume: Volume) -> Volume:
    """Return the volume whose committed image a start of this one begins with.

    A snapshot that keeps nothing begins with what its source does.
    """
    while volume.source is not None and not volume.save_on_stop:
        volume = volume.source
    return volume


async def import_image(volume: Volume, image: Path, size: int | None = None) -> None:
    """Have a volume begin with a copy of a raw image.

    :param size: bytes that the volume has then; by default those that it has now.
    :raise OSError: as the operating system says.
    """
    size = volume.size if size is None else size
    await _import(volume, size, lambda path: copy_image(image, path))


async def copy_committed(volume: Volume, target: Path) -> bool:
    """Give an existing file the committed contents of a volume, by reflink if it can.

    :return: False where it has none: it keeps nothing, or only what a VM writes to.
    :raise OSError: as the operating system says.
    """
    if not volume.keeps_image:
        return False
    try:
        async with exporting(volume) as image:
            await to_its_end(asyncio.to_thread(copy_image, image, target))
    except VolumeNotFoundError:
        return False
    return True


async def fill_if_empty(volume: Volume) -> None:
    """Make a filesystem in a private volume that is empty, as a new one is.

    It is committed before the start: a crash meanwhile leaves the volume empty, and a
    VM that begins with the volume of another finds the same there.

    :raise CommandError: when mke2fs fails.
    :raise OSError: as the operating system says.
    """
    if not volume.save_on_stop:
        return
    # Of VMs that start at once from one and the same volume one makes it.
    async with _FILLING.setdefault(volume, asyncio.Lock()):
        if volume.is_dirty():
            return
        async with exporting(volume) as image:
            empty = await to_its_end(asyncio.to_thread(is_empty, image))
        if empty:
            size = volume.size
            await _import(volume, size, lambda path: make_private(path, size))


async def _import(volume: Volume, size: int, fill: Callable[[Path], None]) -> None:
    # Not created first: the empty image would become a revision. To its end: a thread
    # that goes on after a cancellation would write to an image that is committed or
    # removed meanwhile.
    async with Import(volume, size) as path:
        await to_its_end(asyncio.to_thread(fill, path))


async def write_content(
    volume: Volume, path: Path, content: AsyncIterator[bytes]
) -> None:
    """Write a stream of bytes to the file of an import.

    :param volume: the one that is imported into.
    :param path: of that file, which has nothing but zeroes in it.
    :raise VolumeError: for what the operating system says.
    """
    # A cancelled import closes its file and removes it, and a thread may be in the
    # middle of a call then: a file that it opens would leak, and its write could go to
    # another file, which has been given the number of the descriptor.
    with typed_errors(volume, "import"):
        file = await to_its_end(
            asyncio.to_thread(path.open, "r+b", 0),
            undo=lambda opened: asyncio.to_thread(opened.close),
        )
    with file:
        async for data in content:
            with typed_errors(volume, "import"):
                await to_its_end(asyncio.to_thread(_write, file.fileno(), data))


def _write(descriptor: int, data: bytes) -> None:
    if data.strip(b"\0"):
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
    else:
        # zeroes need no room
        os.lseek(descriptor, len(data), os.SEEK_CUR)


def is_empty(image: Path) -> bool:
    """Tell whether a file has nothing but zeroes in it; holes take no time. Blocking.

    :raise OSError: as the operating system says.
    """
    return not any(True for _ in data_blocks(image))


def data_blocks(image: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the blocks of a file that have more than zeroes in them. Blocking.

    :return: where each begins, a multiple of `BLOCK`, and its bytes.
    :raise OSError: as the operating system says.
    """
    with image.open("rb", buffering=0) as file:
        done = 0
        for start, end in data_extents(file.fileno()):
            for place in range(max(done, start - start % BLOCK), end, BLOCK):
                data = os.pread(file.fileno(), BLOCK, place)
                if data.strip(b"\0"):
                    yield place, data
                done = place + BLOCK


def write_blocks(path: Path, size: int, blocks: Iterable[tuple[int, bytes]]) -> None:
    """Have an existing file be of that size and have these blocks, else zeroes.

    :param size: bytes; of a block beyond it only what is within counts.
    :param blocks: as `data_blocks` yields them.
    :raise OSError: as the operating system says.
    """
    with path.open("r+b", buffering=0) as file:
        file.truncate(0)
        for place, data in blocks:
            os.lseek(file.fileno(), place, os.SEEK_SET)
            _write(file.fileno(), data)
        file.truncate(size)


async def import_blocks(
    volume: Volume, size: int, blocks: Iterable[tuple[int, bytes]]
) -> None:
    """Have a volume begin with these blocks, else zeroes; as `write_blocks`."""
    await _import(volume, size, lambda path: write_blocks(path, size, blocks))


def copy_image(source: Path, target: Path) -> None:
    """Give an existing file the contents of another, by reflink where that works.

    :raise OSError: as the operating system says.
    """
    with source.open("rb") as reader, target.open("r+b") as writer:
        clone_or_copy(reader.fileno(), writer.fileno())
