"""Image files with holes, copied and patched cheaply."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from qubes_itests.host.command import run
from qubes_storage import ficlone

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from qubes_itests.faultdisk.crash import Patch
    from qubes_itests.faultdisk.operations import Operation

__all__ = ["apply", "copy_sparse", "dig_holes", "extents", "patch"]

_CHUNK = 1 << 20


def dig_holes(image: Path) -> None:
    """Replace zeros in a file by holes: mkfs writes megabytes of them.

    :raise CommandError: when its filesystem cannot have holes.
    """
    run(["fallocate", "--dig-holes", image])


def copy_sparse(source: Path, target: Path) -> None:
    """Copy what is not a hole to a new file; replaces what is there."""
    with source.open("rb") as old, target.open("wb") as new:
        ficlone.copy_sparse(old.fileno(), new.fileno())


def extents(fd: int) -> Iterator[Patch]:
    """Yield offset and content of what is not a hole, in pieces of at most 1 MiB."""
    for begin, end in ficlone.data_extents(fd):
        for start in range(begin, end, _CHUNK):
            yield start, os.pread(fd, min(_CHUNK, end - start), start)


def apply(image: Path, operations: Iterable[Operation]) -> None:
    """Do to an image what was done to a disk."""
    patch(image, ((op.offset, op.content) for op in operations if op.changes))


def patch(image: Path, patches: Iterable[Patch]) -> None:
    """Write pieces of content to an image, in order."""
    with image.open("r+b", buffering=0) as file:
        for offset, content in patches:
            os.pwrite(file.fileno(), content, offset)
