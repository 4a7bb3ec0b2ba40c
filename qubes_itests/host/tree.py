"""The files of a source tree that count: neither its history nor what was built."""

from __future__ import annotations

import fnmatch
import os
import stat
from pathlib import Path
from typing import Final

from qubes_itests.host.cache import digest

__all__ = ["IGNORED", "files_of", "tree_digest"]

#: Names that are passed over, with all that is below them.
IGNORED: Final = (
    *(".git", ".hg", ".svn", ".tox", ".nox", ".venv", "__pycache__", "*.egg-info"),
    *(".*_cache", "*.py[co]", "itests-artifacts"),
)


def files_of(path: Path) -> list[Path]:
    """Return what a file or a directory consists of, relative to it, in a fixed order.

    Links are not followed; devices, sockets and FIFOs are passed over. A directory
    comes before what is in it. Blocking.

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
    """
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


def _collect(root: Path, below: Path, found: list[Path]) -> None:
    with os.scandir(root / below) as scanned:
        entries = sorted(scanned, key=lambda entry: entry.name)
    for entry in entries:
        if any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in IGNORED):
            continue
        if entry.is_dir(follow_symlinks=False):
            found.append(below / entry.name)
            _collect(root, below / entry.name, found)
        elif entry.is_symlink() or entry.is_file(follow_symlinks=False):
            found.append(below / entry.name)
