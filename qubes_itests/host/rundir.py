"""A run's own directory: everything a run writes, except artefacts and the cache.

It is locked while its run lives, so the next run knows what a killed one left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

from qubes_itests.host.cache import disk_usage
from qubes_itests.host.command import run
from qubes_itests.host.sandbox import require

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from qubes_itests.host.cache import Cache

__all__ = ["RunDirectory", "part", "remove_stale", "short_name", "under_way"]


class RunDirectory:
    """A directory under the cache for one run, gone when the run is.

    A context manager; entering it also removes what dead runs left, and what builders
    of entries did.

    :param cache: where runs have their directories.
    """

    def __init__(self, cache: Cache) -> None:
        self._runs = cache.root / "runs"
        cache.sweep()
        with _all_runs_locked(self._runs):
            for path in _stale(self._runs):
                # What cannot go must not keep this run from starting.
                with contextlib.suppress(OSError):
                    _remove_tree(path)
            self.path = Path(tempfile.mkdtemp(dir=self._runs, prefix=""))
            self._lock: int | None = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            # it ends with the process, however that ends: then the next run removes it
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Remove the directory with all it holds; a second call does nothing.

        :raises OSError: something is still mounted in it, or cannot be removed.
        """
        if self._lock is None:
            return
        with _all_runs_locked(self._runs):
            # with all runs locked: without its own lock it looks like that of a dead
            # run, which a run that begins now would remove, too
            lock, self._lock = self._lock, None
            os.close(lock)
            _remove_tree(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


@contextlib.contextmanager
def part(run: Path, name: str) -> Iterator[Path]:
    """Make a directory for a part of a run within that of the run.

    It goes with the context; that of a part that was killed goes with the run's.

    :param run: the run's directory.
    :param name: of the part.
    :raises OSError: when leaving, if something is still mounted in it.
    """
    path = run / name
    path.mkdir()
    yield path
    _remove_tree(path)


def under_way(cache: Cache) -> list[Path]:
    """Return the directories of runs that are alive."""
    runs = cache.root / "runs"
    if not runs.is_dir():
        return []
    with _all_runs_locked(runs):
        dead = _stale(runs)
        return [path for path in runs.iterdir() if path.is_dir() and path not in dead]


def remove_stale(cache: Cache) -> dict[Path, int]:
    """Remove the directories of runs that are no longer alive.

    :return: what they were, and how many bytes each took.

    :raises OSError: something is still mounted in one of them.
    """
    runs = cache.root / "runs"
    with _all_runs_locked(runs):
        stale = {path: disk_usage(path) for path in _stale(runs)}
        for path in stale:
            _remove_tree(path)
        return stale


@contextlib.contextmanager
def short_name(path: Path) -> Iterator[Path]:
    """Give a directory a short name as well, for this sandbox only.

    The path of a Unix socket has at most 107 bytes (unix(7)), and the home of a run
    may be deep.

    :param path: the directory.
    :return: the same directory by a path of about 15 bytes.
    :raises EnvironmentNotReadyError: outside a sandbox, where the name would stay.
    """
    require()
    short = Path(tempfile.mkdtemp(dir="/dev/shm", prefix=""))
    run(["mount", "--bind", path, short])
    try:
        yield short
    finally:
        # lazily: libvirt keeps files open in there for as long as the process lives
        run(["umount", "--lazy", short])
        short.rmdir()


@contextlib.contextmanager
def _all_runs_locked(runs: Path) -> Iterator[None]:
    # Held only while directories come and go, so that nobody takes a directory
    # between its making and its locking for that of a dead run.
    runs.mkdir(mode=0o700, exist_ok=True)
    with (runs / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _stale(runs: Path) -> list[Path]:
    found = []
    for path in sorted(runs.iterdir()):
        if path.is_symlink() or not path.is_dir():
            continue
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with contextlib.suppress(BlockingIOError):  # it is under way
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found.append(path)
        finally:
            os.close(descriptor)
    return found


def _remove_tree(path: Path) -> None:
    # Never through a mount: what is mounted there is not ours to empty.
    device = path.stat().st_dev
    for directory, names, _ in os.walk(path):
        for name in names:
            inner = Path(directory, name)
            if not inner.is_symlink() and inner.stat().st_dev != device:
                raise OSError(f"{inner} is still mounted; unmount it: umount {inner}")
    shutil.rmtree(path)
