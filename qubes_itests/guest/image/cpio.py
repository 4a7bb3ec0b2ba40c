"""Archives in the format that the kernel takes for an initramfs (cpio, `newc`).

The same entries give the same bytes: no times, no inode numbers of the host.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from typing import Final

__all__ = ["Archive"]

_MAGIC: Final = b"070701"
_TRAILER: Final = "TRAILER!!!"


@dataclass(slots=True)
class Archive:
    """An archive that grows by entries; all belong to root, all times are 0."""

    _data: bytearray = field(default_factory=bytearray)
    _inode: int = 0

    def directory(self, path: str, permissions: int = 0o755) -> None:
        """Add a directory, `path` without a leading slash."""
        self._entry(path, stat.S_IFDIR | permissions, b"", links=2)

    def file(self, path: str, data: bytes, permissions: int = 0o644) -> None:
        """Add a regular file."""
        self._entry(path, stat.S_IFREG | permissions, data)

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._entry(path, stat.S_IFLNK | 0o777, target.encode())

    def device(
        self, path: str, major: int, minor: int, permissions: int = 0o600
    ) -> None:
        """Add a character device."""
        mode = stat.S_IFCHR | permissions
        self._entry(path, mode, b"", device=(major, minor))

    def to_bytes(self) -> bytes:
        """Return the whole archive; more may be added afterwards."""
        finished = Archive(bytearray(self._data), -1)
        finished._entry(_TRAILER, 0, b"")
        return bytes(finished._data)

    def _entry(
        self,
        path: str,
        mode: int,
        data: bytes,
        *,
        links: int = 1,
        device: tuple[int, int] = (0, 0),
    ) -> None:
        name = path.encode() + b"\0"
        self._inode += 1
        #        ino, mode, uid, gid, nlink, mtime, size, device, rdevice, name, check
        numbers = [self._inode, mode, 0, 0, links, 0, len(data)]
        numbers += [0, 0, *device, len(name), 0]
        header = _MAGIC + b"".join(b"%08X" % number for number in numbers)
        self._append(header + name)
        self._append(data)

    def _append(self, data: bytes) -> None:
        self._data += data
        self._data += bytes(-len(self._data) % 4)
