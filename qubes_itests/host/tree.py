"""The files of a source tree that count: neither its history nor what was built."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import stat
from pathlib import Path
from typing import Final

from qubes_itests.host.cache import digest

__all__ = ["IGNORED", "Originals", "files_of", "tree_digest"]

#: Names that are passed over, with all that is below them.
IGNORED: Final = (
    *(".git", ".hg", ".svn", ".tox", ".nox", ".venv", "__pycache__", "*.egg-info"),
    *(".*_cache", "*.py[co]", "itests-artifacts"),
)

#: Of a module that somebody has written.
_MOST_BYTES: Final = 1 << 20
#: Of reading a tree in which files vanish, as an editor's do while it saves.
_TRIES: Final = 9


def files_of(path: Path) -> list[Path]:
    """Return what a file or a directory consists of, relative to it, in a fixed order.

    Links are not followed; devices, sockets and FIFOs are passed over, and what
    somebody removes meanwhile. A directory comes before what is in it. Blocking.

    :param path: for a file the answer is the file itself, as ``Path()``.
    """
    if not stat.S_ISDIR(path.stat().st_mode):
        return [Path()]
    found: list[Path] = []
    _collect(path, Path(), found)
    return found


def tree_digest(path: Path) -> str:
    """Return a key for the contents of a file or a directory. Blocking.

    Modes count as far as git knows them: who may execute a file.

    :raise FileNotFoundError: there is none, or files vanish again and again.
    """
    for _ in range(_TRIES):
        with contextlib.suppress(FileNotFoundError):
            return _digest(path)
    return _digest(path)


def _digest(path: Path) -> str:
    parts: list[str | Path] = []
    for name in files_of(path):
        place = path / name
        status = place.lstat()
        parts += [str(name), oct(stat.S_IFMT(status.st_mode) | status.st_mode & 0o100)]
        if place.is_symlink():
            parts.append(str(place.readlink()))
        elif place.is_file():
            parts.append(place)
    return digest(*parts)


class Originals:
    """The files of an app, to be found by copies of them. Blocking.

    :param app: its directory, which is walked once, when the first is looked for.
    """

    def __init__(self, app: Path) -> None:
        self._app = app
        self._by_name: dict[str, list[Path]] | None = None

    def find(self, copy: Path) -> Path | None:
        """Return the file that another is a copy of, byte for byte; None for none.

        Of several that are the same it is that whose folder has the same name.
        """
        if self._by_name is None:
            self._by_name = {}
            with contextlib.suppress(FileNotFoundError):
                for name in files_of(self._app):
                    self._by_name.setdefault(name.name, []).append(self._app / name)
        named = self._by_name.get(copy.name, [])
        same = [original for original in named if _is_copy(copy, original)]
        same.sort(key=lambda original: original.parent.name != copy.parent.name)
        return same[0] if same else None


def _is_copy(copy: Path, original: Path) -> bool:
    try:
        # not a FIFO, and no device, which one could wait for
        return (
            original.is_file()
            and original.stat().st_size == copy.stat().st_size <= _MOST_BYTES
            and original.read_bytes() == copy.read_bytes()
        )
    except OSError:
        return False  # somebody has removed or closed it meanwhile


def _collect(root: Path, below: Path, found: list[Path]) -> None:
    try:
        with os.scandir(root / below) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
    except FileNotFoundError:
        if below == Path():
            raise
        return
    for entry in entries:
        if any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in IGNORED):
            continue
        if entry.is_dir(follow_symlinks=False):
            found.append(below / entry.name)
            _collect(root, below / entry.name, found)
        elif entry.is_symlink() or entry.is_file(follow_symlinks=False):
            found.append(below / entry.name)
