"""Making the clone that a volume's next start needs, while nobody waits for it.

It takes no lock before it is done, so nothing waits for it either.  Then it is taken
only if the committed image is still the one that was cloned; it bears that image's
time of last write, by which a start can tell what it is a clone of.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from qubes_storage import ficlone, files, lock

if TYPE_CHECKING:
    from collections.abc import Callable

    from qubes_storage.reflink import ReflinkVolume

__all__ = ["is_clone_of", "prepare"]


class _AbandonedError(Exception):
    """The clone is not needed any more, or not now."""


def is_clone_of(clone: os.stat_result | None, image: os.stat_result) -> bool:
    """Tell whether a prepared clone is whole, and of this image."""
    return clone is not None and (clone.st_mtime_ns, clone.st_size) == (
        image.st_mtime_ns,
        image.st_size,
    )


def prepare(volume: ReflinkVolume, go_on: Callable[[], bool]) -> None:
    """Clone the committed image of a volume for its next start, if that needs it.

    :param go_on: asked every few milliseconds; the clone is abandoned once it says no.
    :raise OSError: as the operating system says; nothing is left then.
    """
    if not volume.wants_clone():
        return
    shares = volume.pool.shares_extents
    with (
        contextlib.suppress(_AbandonedError, TimeoutError, FileNotFoundError),
        contextlib.ExitStack() as locks,
        files.new_file(volume.files.precache, durable=not shares) as target,
        files.open_image(volume.files.clean) as source,
    ):
        _clone(volume, source, target, go_on)
        directory = volume.pool.dir_path
        locks.enter_context(lock.hold(directory, write=[volume.vid], timeout=0))
        image = os.fstat(source)
        current = files.stat_image(volume.files.clean)
        if not (current and os.path.samestat(current, image) and volume.wants_clone()):
            raise _AbandonedError
        os.utime(target, ns=(image.st_atime_ns, image.st_mtime_ns))


def _clone(
    volume: ReflinkVolume, source: int, target: int, go_on: Callable[[], bool]
) -> None:
    def still_wanted() -> bool:
        return go_on() and not os.path.lexists(volume.files.dirty)

    if not volume.pool.shares_extents:
        ficlone.copy_sparse(source, target)
    elif not ficlone.clone_in_slices(source, target, still_wanted):
        raise _AbandonedError
