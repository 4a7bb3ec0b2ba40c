"""Files that are written as a whole, or not at all."""

from __future__ import annotations

import contextlib
import os
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["whole_file"]


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file that takes a path when the context ends; none of it if that fails.

    A link there is replaced, not followed.

    :raise OSError: it cannot be written.
    """
    new = path.with_name(f".{path.name[:200]}.{os.getpid()}")
    # what a process of that number left that was killed
    new.unlink(missing_ok=True)
    try:
        with new.open("xb") as file:
            yield file
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
