"""Operations of a disk, and the journal in which they are written down.

A journal is a sequence of operations: a header (kind, offset, length) and, for writes
and notes, as many bytes.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import BufferedIOBase

__all__ = ["SECTOR", "Kind", "Operation", "read_journal"]

#: Bytes that a disk writes whole or not at all.
SECTOR = 512

_HEADER = struct.Struct("<cQQ")


class Kind(enum.Enum):
    """The operations of a disk, and notes between them."""

    WRITE = b"W"
    #: A discard, or zeros written without sending them.
    ZERO = b"Z"
    #: What was written before it survives a power cut.
    FLUSH = b"F"
    #: A flush that was confirmed and not done.
    LIE = b"L"
    NOTE = b"N"


_WITH_DATA = {Kind.WRITE, Kind.NOTE}


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of a disk.

    :param kind: which.
    :param offset: where on the disk, bytes.
    :param length: of how many bytes.
    :param data: what is written, or the text of a note; empty for others.
    """

    kind: Kind
    offset: int = 0
    length: int = 0
    data: bytes = b""

    @classmethod
    def write(cls, offset: int, data: bytes) -> Operation:
        """Return a write of `data` at `offset`."""
        return cls(Kind.WRITE, offset, len(data), data)

    @classmethod
    def note(cls, text: bytes) -> Operation:
        """Return a note."""
        return cls(Kind.NOTE, 0, len(text), text)

    @property
    def content(self) -> bytes:
        """What the disk has between `offset` and `offset + length` afterwards."""
        return bytes(self.length) if self.kind is Kind.ZERO else self.data

    @property
    def changes(self) -> bool:
        """Whether it changes what is on the disk."""
        return self.kind in {Kind.WRITE, Kind.ZERO}

    def encode(self) -> bytes:
        """Return it as written in a journal."""
        return _HEADER.pack(self.kind.value, self.offset, self.length) + self.data


def read_journal(file: BufferedIOBase) -> Iterator[Operation]:
    """Yield the operations of a journal, from where the file stands to its end.

    :raise ValueError: when it ends within an operation, or is no journal.
    """
    while header := file.read(_HEADER.size):
        if len(header) < _HEADER.size:
            raise ValueError("the journal ends within an operation")
        code, offset, length = _HEADER.unpack(header)
        kind = Kind(code)
        data = file.read(length) if kind in _WITH_DATA else b""
        if kind in _WITH_DATA and len(data) < length:
            raise ValueError("the journal ends within an operation")
        yield Operation(kind, offset, length, data)
