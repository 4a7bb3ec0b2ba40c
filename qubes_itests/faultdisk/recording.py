"""Recording of all that happened to a disk, kept to be examined."""

from __future__ import annotations

import gzip
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from qubes_itests.faultdisk import sparse
from qubes_itests.faultdisk.crash import CrashState, flushed_before, survivors
from qubes_itests.faultdisk.operations import Kind, Operation, read_journal
from qubes_itests.host.filesystem import FilesystemType

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Recording"]

_KIB, _MIB = 1024, 1024**2

#: Superblocks that the filesystem needs written whole: offset and length, bytes.
_WHOLE = {
    FilesystemType.BTRFS: ((64 * _KIB, 4 * _KIB), (64 * _MIB, 4 * _KIB)),
    FilesystemType.XFS: (),
    FilesystemType.EXT4: ((0, 4 * _KIB),),
}


@dataclass(frozen=True)
class Recording:
    """What happened to a disk with a filesystem.

    :param kind: the filesystem.
    :param base: an image of the disk from before the first operation.
    :param operations: what happened since.
    """

    kind: FilesystemType
    base: Path
    operations: tuple[Operation, ...]

    def notes(self, start: int = 0, end: int | None = None) -> tuple[str, ...]:
        """Return the notes among some operations.

        :param start: number of the first of them.
        :param end: number of the first after them; None for all that follow.
        """
        return tuple(
            operation.data.decode()
            for operation in self.operations[start:end]
            if operation.kind is Kind.NOTE
        )

    def advance(self, image: Path, done: int, state: CrashState) -> int:
        """Bring an image to what is certainly on the disk in a state.

        :param image: holds the first `done` operations.
        :return: how many it holds now.
        """
        flushed = max(done, flushed_before(self.operations, state.cut))
        sparse.apply(image, self.operations[done:flushed])
        return flushed

    def lose(self, image: Path, state: CrashState) -> None:
        """Write to an image what else survives in a state.

        :param image: as `advance` left it.
        """
        sparse.patch(image, survivors(self.operations, state, _WHOLE[self.kind]))

    def save(self, path: Path, state: CrashState) -> None:
        """Keep it in a file, with the state that is to be looked at."""
        with self.base.open("rb") as base:
            start = [Operation.write(*piece) for piece in sparse.extents(base.fileno())]
        head = {
            "kind": self.kind.value,
            "size": self.base.stat().st_size,
            "start": len(start),
            "state": asdict(state),
        }
        with gzip.open(path, "wb", compresslevel=3) as file:
            file.write(json.dumps(head).encode() + b"\n")
            file.writelines(operation.encode() for operation in start)
            file.writelines(operation.encode() for operation in self.operations)

    @classmethod
    def load(cls, path: Path, base: Path) -> tuple[Recording, CrashState]:
        """Return what was kept in a file.

        :param base: where to put the image of the beginning.
        :raise OSError: when it is no such file.
        :raise ValueError: when it is damaged.
        """
        with gzip.open(path, "rb") as file:
            head = json.loads(file.readline())
            operations = list(read_journal(file))
        with base.open("wb") as image:
            image.truncate(head["size"])
        sparse.apply(base, operations[: head["start"]])
        rest = tuple(operations[head["start"] :])
        return cls(FilesystemType(head["kind"]), base, rest), CrashState(
            **head["state"]
        )
