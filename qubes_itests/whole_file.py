"""Files that are written as a whole, or not at all."""

from __future__ import annotations

import contextlib
import secrets
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["whole_file", "write_output"]


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file that takes a path when the context ends; none of it if that fails.

    A link there is replaced, not followed.

    :raise OSError: it cannot be written.
    """
    # drawn, and no number of a process: those of two sandboxes are the same ones
    new = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}")
    try:
        with new.open("xb") as file:
            yield file
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def write_output(path: Path, data: bytes) -> None:
    """Write what a user wants at a path: as a whole if that is a file, or nothing yet.

    :raise OSError: it cannot be written.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        # as /dev/stdout: what takes its place would be read by nobody
        path.write_bytes(data)
        return
    with whole_file(path) as file:
        file.write(data)
