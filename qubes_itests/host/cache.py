"""The one directory whose contents outlive a run.

An entry is a directory that is either absent or complete. It is built beside its
place under a lock of its key, flushed to the disk, and renamed; so neither a crash
nor a second run can show a half-made one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from qubes_itests.host.exc import CacheError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Cache", "digest"]

#: Beside the entries, but not of them: see rundir.
_RESERVED = "runs"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~-]{0,199}")
_CHUNK = 1 << 20


def digest(*parts: str | bytes | Path) -> str:
    """Return a key for what an entry is made from.

    :param parts: texts, bytes, and files, which count by their contents.
    :return: 40 hexadecimal digits; parts that differ in order, in kind or in where
        they are cut give another key.
    """
    total = hashlib.blake2b(digest_size=20)
    for part in parts:
        total.update(type(part).__name__[:1].encode() + _fingerprint(part))
    return total.hexdigest()


def _fingerprint(part: str | bytes | Path) -> bytes:
    if not isinstance(part, Path):
        # names of files need not be UTF-8
        encoded = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        return hashlib.blake2b(encoded).digest()
    with part.open("rb") as file:
        return hashlib.file_digest(file, hashlib.blake2b).digest()


class Cache:
    """What runs keep for later runs: images, saved states, verdicts.

    :param root: its directory; by default QUBES_ITESTS_CACHE or, without that,
        ``~/.cache/qubes_itests``.
    :raises CacheError: the directory cannot be made or written.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or _default_root()).absolute()
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(self.root, error.strerror or str(error)) from error
        if not os.access(self.root, os.W_OK | os.X_OK):
            raise CacheError(self.root, "it is not writable")

    def entry(self, kind: str, key: str, build: Callable[[Path], None]) -> Path:
        """Return an entry's directory, built first if it is absent. Blocking.

        :param kind: the family of the entry, as in "kernel".
        :param key: what it was made from; see `digest`.
        :param build: fills the empty directory that it is given. It runs in at most
            one process at a time; what it raises leaves nothing behind.
        """
        place = self._place(kind, key)
        if place.is_dir():
            return place
        with self._locked(place):
            if not place.is_dir():
                self._build(place, build)
        return place

    def lookup(self, kind: str, key: str) -> Path | None:
        """Return an entry's directory, or None if there is none."""
        place = self._place(kind, key)
        return place if place.is_dir() else None

    def entries(self, kind: str) -> list[Path]:
        """Return the complete entries of one kind, in the order of their keys."""
        directory = self._place(kind, "x").parent
        if not directory.is_dir():
            return []
        return sorted(p for p in directory.iterdir() if not p.name.startswith("."))

    def discard(self, kind: str, key: str) -> None:
        """Drop an entry; nothing happens if there is none. Blocking.

        Who has its files open keeps reading them.
        """
        place = self._place(kind, key)
        with self._locked(place):
            if place.is_dir():
                place.rename(self._temporary(place) / "discarded")
            _sweep(place)

    def _place(self, kind: str, key: str) -> Path:
        for name in (kind, key):
            if not _NAME.fullmatch(name) or kind == _RESERVED:
                raise ValueError(f"{name!r} cannot name a cache entry")
        return self.root / kind / key

    @contextlib.contextmanager
    def _locked(self, place: Path) -> Iterator[None]:
        locks = self.root / ".locks"
        locks.mkdir(exist_ok=True)
        place.parent.mkdir(exist_ok=True)
        # Lock files stay: removing one would let two processes lock two inodes.
        with (locks / f"{place.parent.name}.{place.name}").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _build(self, place: Path, build: Callable[[Path], None]) -> None:
        _sweep(place)
        temporary = self._temporary(place)
        try:
            build(temporary)
            _flush_tree(temporary)
            temporary.rename(place)
            _flush(place.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _temporary(self, place: Path) -> Path:
        return Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}@"))


def _default_root() -> Path:
    named = os.environ.get("QUBES_ITESTS_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "qubes_itests"


def _sweep(place: Path) -> None:
    # Builders hold the key's lock, and so does the caller: what lies here is dead.
    for leftover in place.parent.glob(f".{place.name}@*"):
        shutil.rmtree(leftover)


def _flush_tree(root: Path) -> None:
    for directory, _, files in os.walk(root):
        for path in (Path(directory, name) for name in files):
            if path.is_file() and not path.is_symlink():
                _flush(path)
        _flush(Path(directory))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
