"""The one directory whose contents outlive a run.

An entry is a directory that is either absent or complete. It is built beside its
place under a lock of its key, flushed to the disk, and renamed; so neither a crash
nor a second run can show a half-made one. What a killed builder leaves is removed by
the next build or run. An entry whose files have changed since counts as absent.

Together the entries have a bound. Beyond it those go that were not used longest; not
those that a process has used which is alive, or that were used within the hour.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import itertools
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qubes_itests.exc import EnvironmentNotReadyError
from qubes_itests.host.contents import damage, last_use, note_use, record
from qubes_itests.program import typed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Cache", "Entry", "descriptors_in_use", "digest", "disk_usage"]

log = logging.getLogger("qubes_itests.host")

#: Beside the entries, but not of them: see rundir.
_RESERVED = "runs"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~-]{0,199}")
_SIZE: Final = re.compile(r"(\d+)([KMGT]?)", re.IGNORECASE)
_DEFAULT_LIMIT: Final = 20 << 30
#: Seconds. A run lets go of what it uses when it enters its sandbox, for a moment.
_RECENT: Final = 3600.0
#: For each entry that this process uses, a descriptor with a shared lock, and the
#: inode: another process may have put another one in its place. They last as long as
#: the process, for so do the paths that it was given.
_used: dict[Path, tuple[int, int]] = {}
_using: Final = threading.Lock()


@dataclass(frozen=True, slots=True)
class Entry:
    """What a cache holds, complete or left by a builder that was killed.

    :param place: its directory.
    :param size: bytes on the disk; what it shares with others by reflinks counts too.
    :param used: when it was used last, seconds since the epoch.
    """

    place: Path
    size: int
    used: float

    @property
    def kind(self) -> str:
        """The family that it belongs to, as in "layer"."""
        return self.place.parent.name


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
    :raises EnvironmentNotReadyError: the directory cannot be made or written.
    """

    def __init__(self, root: Path | None = None) -> None:
        named = os.environ.get("QUBES_ITESTS_CACHE")
        default = Path(named) if named else Path.home() / ".cache" / "qubes_itests"
        self.root = (root or default).absolute()
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error.strerror or str(error)) from error
        if not os.access(self.root, os.W_OK | os.X_OK):
            raise self._unusable("it is not writable")

    def _unusable(self, reason: str) -> EnvironmentNotReadyError:
        return EnvironmentNotReadyError(
            f"The cache directory {self.root} cannot be used ({reason}).",
            "Name another in QUBES_ITESTS_CACHE.",
        )

    def entry(self, kind: str, key: str, build: Callable[[Path], None]) -> Path:
        """Return an entry's directory, built first if it is absent. Blocking.

        :param kind: the family of the entry, as in "kernel".
        :param key: what it was made from; see `digest`.
        :param build: fills the empty directory that it is given. It runs in at most
            one process at a time; what it raises leaves nothing behind.
        :raise EnvironmentNotReadyError: the disk is full.
        """
        place = self._place(kind, key)
        if _use(place):
            return place
        with self._locked(place):
            if not _use(place):
                try:
                    self._build(place, build)
                except OSError as error:
                    if error.errno in (errno.ENOSPC, errno.EDQUOT):
                        raise EnvironmentNotReadyError(
                            f"The disk of the cache {self.root} is full.",
                            f"Make room there: {typed('clean', '--cache')}",
                        ) from error
                    raise
        return place

    def lookup(self, kind: str, key: str) -> Path | None:
        """Return an entry's directory, or None if there is none that is whole."""
        place = self._place(kind, key)
        return place if self._whole(place) else None

    def entries(self, kind: str) -> list[Path]:
        """Return the whole entries of one kind, in the order of their keys."""
        directory = self._place(kind, "x").parent
        if not directory.is_dir():
            return []
        places = sorted(p for p in directory.iterdir() if not p.name.startswith("."))
        return [place for place in places if self._whole(place)]

    def discard(self, kind: str, key: str) -> None:
        """Drop an entry; nothing happens if there is none. Blocking.

        Who has its files open keeps reading them.
        """
        place = self._place(kind, key)
        with self._locked(place):
            self._drop(place)

    def content(self) -> list[Entry]:
        """Return what the cache holds, what was not used longest first. Blocking."""
        found = [
            _entry(self.root / kind / key)
            for kind, _, key in (path.name.partition(".") for path in self._locks())
            if (self.root / kind / key).is_dir()
        ]
        return sorted(found, key=lambda entry: entry.used)

    def sweep(self) -> list[Entry]:
        """Remove what builders left that were killed, and return it. Blocking.

        What cannot go stays, and is no error.
        """
        swept = []
        # One look into each family, not one for each entry that ever was: all runs
        # begin with this.
        left = sorted(self.root.glob("*/.*@*"))
        for place, paths in itertools.groupby(
            # back from what `_temporary` called it to the entry
            left,
            lambda path: path.with_name(path.name[1:].rpartition("@")[0]),
        ):
            lock = self.root / ".locks" / f"{place.parent.name}.{place.name}"
            if not lock.exists():
                continue
            with _locked_at_once(lock) as free:
                if free:
                    swept += [_entry(path) for path in paths]
                    _sweep(place)
        return swept

    @property
    def limit(self) -> int:
        """How many bytes the entries may take: QUBES_ITESTS_CACHE_LIMIT, else 20 GiB.

        :raise EnvironmentNotReadyError: the variable is no size.
        """
        text = os.environ.get("QUBES_ITESTS_CACHE_LIMIT") or str(_DEFAULT_LIMIT)
        if not (found := _SIZE.fullmatch(text)):
            raise EnvironmentNotReadyError(
                f"QUBES_ITESTS_CACHE_LIMIT: expected a size such as 20G, got {text!r}.",
                "Set it to one, or not at all.",
            )
        return int(found[1]) << 10 * " KMGT".index(found[2].upper() or " ")

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
        self._drop(place)
        self.sweep()
        temporary = self._temporary(place)
        try:
            build(temporary)
            record(temporary)
            # Files, then their directories, then the name: after a power cut a name
            # must not stand for data that never came to the disk. The last one has the
            # name itself survive, so that an hour's work is not done twice.
            _flush_tree(temporary)
            temporary.rename(place)
            _flush(place.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _use(place)
        self._shrink()

    def _whole(self, place: Path) -> bool:
        if not _use(place) and place.is_dir():
            with self._locked(place):
                # another process may have made it again meanwhile
                if not _use(place) and place.is_dir():
                    # what others use they have found whole, and need by its name
                    with _locked_at_once(place) as unused:
                        if unused:
                            self._drop(place)
        return place in _used

    def _drop(self, place: Path) -> None:
        """Remove an entry, if there is one; who calls has its lock."""
        if place.is_dir():
            # In one step: to remove it takes a while, and half an entry must not be
            # found under its name.
            place.rename(self._temporary(place) / "discarded")
        # `_use` lets go of it. Here nobody may wait for that: callers have locked it,
        # and a thread that wants to use it waits for that lock in there.
        _sweep(place)

    def _shrink(self) -> None:
        content = self.content()
        total = sum(entry.size for entry in content)
        limit = self.limit
        for entry in content:
            if total <= limit or time.time() - entry.used < _RECENT:
                return
            # Neither lock is waited for: who has the key's may wait for ours, and who
            # has the entry's keeps it for as long as it lives.
            lock = self.root / ".locks" / f"{entry.kind}.{entry.place.name}"
            with (
                contextlib.suppress(FileNotFoundError),  # another process drops it
                _locked_at_once(lock) as free,
                _locked_at_once(entry.place) as unused,
            ):
                # a process may have used it since we looked, and be on its way into its
                # sandbox, where it will use it again
                if free and unused and last_use(entry.place) == entry.used:
                    log.info("the cache is full: %s goes", entry.place)
                    self._drop(entry.place)
                    total -= entry.size

    @property
    def kinds(self) -> set[str]:
        """The families of entries that there are, or have been."""
        return {path.name.partition(".")[0] for path in self._locks()}

    def _locks(self) -> list[Path]:
        # What has none is not ours: somebody may name a directory by mistake.
        return sorted((self.root / ".locks").glob("*.*"))

    def _temporary(self, place: Path) -> Path:
        return Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}@"))


def _sweep(place: Path) -> None:
    # Builders hold the key's lock, and so does the caller: what lies here is dead.
    for leftover in place.parent.glob(f".{glob.escape(place.name)}@*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _use(place: Path) -> bool:
    """Return whether an entry is there and whole; it is in use from then on."""
    with _using:
        while True:
            try:
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
                descriptor = os.open(place, flags)
            except (FileNotFoundError, NotADirectoryError):
                _let_go(place)
                return False
            with contextlib.ExitStack() as stack:
                stack.callback(os.close, descriptor)
                inode = os.fstat(descriptor).st_ino
                if place in _used and _used[place][1] == inode:
                    return True
                _let_go(place)
                # the process that makes room has it exclusively, until it is gone
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                problem = damage(place)
                # Replaced while its lock was waited for, or while it was looked at by
                # who has no need of this lock: then what was seen is of neither.
                if not (place.is_dir() and place.stat().st_ino == inode):
                    continue
                if problem:
                    log.warning("%s is damaged and of no use: %s", place, problem)
                    return False
                note_use(place)
                # Shared, and kept open until the process ends: `_shrink` of others
                # passes by what it cannot lock.
                _used[place] = (descriptor, inode)
                stack.pop_all()
                return True


def descriptors_in_use() -> set[str]:
    """Return the file descriptors by which this process keeps the entries it uses."""
    return {str(descriptor) for descriptor, _ in _used.values()}


def _let_go(place: Path) -> None:
    if place in _used:
        os.close(_used.pop(place)[0])


@contextlib.contextmanager
def _locked_at_once(path: Path) -> Iterator[bool]:
    """Lock a file or a directory, unless another has it; tell whether it is locked."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        free = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        yield free
    finally:
        os.close(descriptor)


def disk_usage(directory: Path) -> int:
    """Return how many bytes a directory takes on its disk. Blocking.

    What others remove meanwhile takes none.
    """
    total = 0
    for place, _, files in os.walk(directory):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                total += Path(place, name).lstat().st_blocks * 512
    return total


def _entry(place: Path) -> Entry:
    return Entry(place, disk_usage(place), last_use(place))


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
