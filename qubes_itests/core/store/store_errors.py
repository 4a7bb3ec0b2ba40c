"""What can be wrong with a store.

::

    QubesException
     +-- StoreError               has `path`
          +-- StoreMissingError     there is no such file
          +-- StoreFormatError      it holds what cannot be; has `line` and `column`
          +-- StoreChangedError     another writer has changed it since it was read
          +-- StoreLockedError      another writer keeps it for itself
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qubes_itests.core.exc import QubesException

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "StoreChangedError",
    "StoreError",
    "StoreFormatError",
    "StoreLockedError",
    "StoreMissingError",
]


class StoreError(QubesException):
    """Something is wrong with a store.

    :param path: the file.
    :param message: what is wrong, and what to do.
    """

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(message)
        self.path = path


class StoreMissingError(StoreError):
    """There is no such file."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            path,
            f"there is no {path}: the first save of Qubes(store, load=False) makes one",
        )


class StoreFormatError(StoreError):
    """The file holds what cannot be; nothing of it was loaded.

    :param path: the file.
    :param line: where, from 1 on.
    :param column: where in the line, from 1 on.
    :param reason: what is wrong there.
    """

    def __init__(self, path: Path, line: int, column: int, reason: str) -> None:
        super().__init__(path, f"{path}:{line}:{column}: {reason}")
        self.line = line
        self.column = column
        self.reason = reason


class StoreChangedError(StoreError):
    """The file is not what this app has read or written; it was left as it is."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            path,
            f"{path} was changed by somebody else since this app loaded it:"
            " load it again, and repeat what you changed",
        )


class StoreLockedError(StoreError):
    """Another writer keeps the file for itself.

    :param path: the file.
    :param holder: number of the process that does; 0 when that is not known.
    """

    def __init__(self, path: Path, holder: int) -> None:
        who = f"process {holder}" if holder else "another process"
        super().__init__(path, f"{path} is in use by {who}: end that one first")
        self.holder = holder
