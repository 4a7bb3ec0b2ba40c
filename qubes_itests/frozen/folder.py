"""The folder of a frozen test: its files, and ``manifest.json``, which tells of them.

It holds all that it needs, and chooses no path: files have names of ours, images and
memory become those of VMs of the same names.  It may come from anybody, as a CI's
artefact does: what is read is bounded, and checked before any of it is used.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

from qubes_itests.core.volume_content import BLOCK
from qubes_itests.exc import HarnessError
from qubes_itests.exit_codes import ExitCode
from qubes_itests.frozen.manifest import (
    BLOCKS,
    MOST_BYTES,
    File,
    Image,
    Manifest,
    dump,
    load,
)
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import BufferedReader
    from pathlib import Path

__all__ = [
    "MANIFEST",
    "NAME",
    "BlockFile",
    "Folder",
    "FrozenError",
    "write_manifest",
]

#: Of the folder among the artefacts of a test.
NAME: Final = "frozen"
MANIFEST: Final = "manifest.json"
_APP: Final = "app.xml"
#: Bytes of files that are read as a whole.
_MOST_READ: Final = {MANIFEST: 1 << 20, _APP: 16 << 20}
#: Bytes of what all images hold.
_MOST_DATA: Final = 64 << 30
_TOO_MUCH: Final = (
    f"the disks are more than {MOST_BYTES >> 30} GiB, {_MOST_DATA >> 30} GiB unpacked"
)
#: A block of an image, and the one of the file `blocks` that it is.
_ENTRY: Final = struct.Struct("<QI")


class FrozenError(HarnessError):
    """A folder cannot be thawed, or nothing be frozen into it."""

    exit_code = ExitCode.USAGE_ERROR


@dataclass(slots=True)
class Folder:
    """A folder that was checked; get it from `read`.

    :param path: of the folder.
    :param manifest: what it has.
    """

    path: Path
    manifest: Manifest
    _files: dict[str, File] = field(default_factory=dict)

    def __str__(self) -> str:
        vms, spread = self.manifest.vms, ""
        if len(vms) > 1:
            spread = f", stopped within {self.manifest.spread:.1f} ms"
        size = sum(file.size for file in self._files.values())
        number = {0: "disks alone", 1: "1 VM"}.get(len(vms), f"{len(vms)} VMs")
        return f"{number}{spread}, {size >> 20} MiB"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return what a folder says that it has; nothing of that is looked at yet.

        :raise FrozenError: it is no such folder, or one that cannot be trusted.
        """
        try:
            return cls(path, *load(_read(path, MANIFEST)))
        except (ValueError, RecursionError) as error:
            reason = safe_text(str(error))
            raise FrozenError(f"{path / MANIFEST}: {reason}") from error

    def require_whole(self) -> None:
        """Check that all files are what they were when they were written; blocking.

        :raise FrozenError: one of them is not, or there is one more.
        """
        # what reads a file may look for others beside it
        for each in self.path.iterdir():
            if each.name not in (MANIFEST, *self._files):
                raise FrozenError(f"{self.path}: {each.name!r} does not belong there")
        for name, expected in self._files.items():
            with self._open(name) as file:
                digest = _digest(file)
            if digest != expected.digest:
                raise FrozenError(f"{self.path / name}: its contents have changed")
        unpacked = 0
        for image in self._images():
            for _ in self._entries(image):
                unpacked += BLOCK
                # a few bytes can name one block, and one file, again and again
                if unpacked > _MOST_DATA:
                    raise FrozenError(f"{self.path}: {_TOO_MUCH}")

    @property
    def memory(self) -> int:
        """Bytes of what the VMs have in their memory, all together."""
        names = {vm.state for vm in self.manifest.vms}
        return sum(self._files[name].size for name in names & self._files.keys())

    def file(self, name: str) -> Path:
        """Return the path of a file of the folder.

        :raise FrozenError: it has no regular file of that name and its size.
        """
        self._open(name).close()
        return self.path / name

    def app(self) -> bytes:
        """Return the document of the app."""
        self._open(_APP).close()
        return _read(self.path, _APP)

    def blocks(self, image: Image) -> Iterator[tuple[int, bytes]]:
        """Yield where the data of an image are, in bytes, and the data; blocking."""
        with self._open(BLOCKS) as file:
            for place, number in self._entries(image):
                yield place, os.pread(file.fileno(), BLOCK, number * BLOCK)

    def _images(self) -> Iterator[Image]:
        for vm in self.manifest.vms:
            yield from (disk.image for disk in vm.disks)
        yield from (link.image for link in self.manifest.volumes)

    def _entries(self, image: Image) -> Iterator[tuple[int, int]]:
        there = self._files[BLOCKS].size // BLOCK
        with self._open(image.file) as file:
            while data := file.read(_ENTRY.size):
                place, number = _ENTRY.unpack(data)
                if not (place * BLOCK < image.size and number < there):
                    raise FrozenError(
                        f"{self.path / image.file}: block {place} cannot be"
                    )
                yield place * BLOCK, number

    def _open(self, name: str) -> BufferedReader:
        expected = self._files.get(name)
        if expected is None:
            raise FrozenError(f"{self.path}: the manifest lists no file {name}")
        file = _opened(self.path, name)
        if os.fstat(file.fileno()).st_size != expected.size:
            file.close()
            raise FrozenError(f"{self.path / name}: expected {expected.size} bytes")
        return file


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Make a folder with all other files in it a frozen one; blocking.

    :raise FrozenError: there is more in it than is read when it is thawed.
    :raise OSError: as the operating system says.
    """
    files = {}
    for each in sorted(path.iterdir()):
        with each.open("rb") as file:
            files[each.name] = File(os.fstat(file.fileno()).st_size, _digest(file))
    (path / MANIFEST).write_text(dump(manifest, files), encoding="utf-8")
    Folder.read(path)


class BlockFile:
    """The contents of images, in which what several have is written once.

    :param path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = (path / BLOCKS).open("xb")
        self._known: dict[bytes, int] = {}
        self._images = 0
        self._data = 0

    def add(self, size: int, blocks: Iterator[tuple[int, bytes]]) -> Image:
        """Add an image; blocking.

        :param size: bytes.
        :param blocks: where in it data are, in bytes, and the data.
        :raise FrozenError: there is too much in all of them.
        :raise OSError: as the operating system says.
        """
        self._images += 1
        name = f"image-{self._images}"
        with (self._path / name).open("xb") as file:
            for place, some in blocks:
                self._data += BLOCK
                if self._data > _MOST_DATA or self._file.tell() > MOST_BYTES:
                    raise FrozenError(_TOO_MUCH)
                data = some.ljust(BLOCK, b"\0")
                key = hashlib.blake2b(data, digest_size=20).digest()
                number = self._known.setdefault(key, len(self._known))
                if number * BLOCK == self._file.tell():
                    self._file.write(data)
                file.write(_ENTRY.pack(place // BLOCK, number))
        return Image(name, size)

    def close(self) -> None:
        """Write what is not written yet."""
        self._file.close()


def _digest(file: BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _opened(folder: Path, name: str) -> BufferedReader:
    try:
        fd = os.open(
            folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        )
    except OSError as error:
        raise FrozenError(f"{folder / name}: {error.strerror}") from error
    file = os.fdopen(fd, "rb")
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        file.close()
        raise FrozenError(f"{folder / name}: it is no regular file")
    return file


def _read(folder: Path, name: str) -> bytes:
    most = _MOST_READ[name]
    with _opened(folder, name) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise FrozenError(f"{folder / name}: it has more than {most} bytes")
    return data
