"""Examination of what power cuts leave: each state is mounted, judged, checked."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qubes_itests.faultdisk import sparse
from qubes_itests.faultdisk.exc import CrashStateError
from qubes_itests.faultdisk.filesystem import mount_device, unmounted_afterwards
from qubes_itests.host.command import CommandError, run
from qubes_itests.host.filesystem import FilesystemType
from qubes_itests.host.loop import LoopDevice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from qubes_itests.faultdisk.crash import CrashState
    from qubes_itests.faultdisk.recording import Recording

__all__ = ["Crash", "CrashExplorer"]

_CHECKERS = {
    FilesystemType.BTRFS: ("btrfs", "check", "--readonly"),
    FilesystemType.XFS: ("xfs_repair", "-n"),
    FilesystemType.EXT4: ("e2fsck", "-f", "-n"),
}

_BTRFS_CONTROL = Path("/dev/btrfs-control")
_BTRFS_IOC_FORGET_DEV = 0x50009405
_VOL_ARGS_SIZE = 4096


@dataclass(frozen=True)
class Crash:
    """A filesystem after a power cut, mounted again.

    :param directory: its root directory; may be changed.
    :param reached: the notes that were written before the power cut.
    :param ahead: those that would have been written after it.
    :param state: which power cut it was.
    """

    directory: Path
    reached: tuple[str, ...]
    ahead: tuple[str, ...]
    state: CrashState


class CrashExplorer:
    """Examines states of a recorded disk.

    :param recording: what happened to it.
    :param directory: where to put images and mount point; best in memory.
    :param check: raises if what it finds in the directory of a `Crash` is wrong.
    """

    def __init__(
        self, recording: Recording, directory: Path, check: Callable[[Crash], object]
    ) -> None:
        self._recording = recording
        self._check = check
        self._parent = directory
        self._checked = 0

    def examine(self, states: Iterable[CrashState]) -> int:
        """Mount, judge and check each state.

        :param states: ordered by their cuts.
        :return: how many there were.
        :raise CrashStateError: for the first that is not as it must be.
        """
        with (
            tempfile.TemporaryDirectory(dir=self._parent) as name,
            ThreadPoolExecutor(1) as executor,
        ):
            place, notes = Path(name), self._recording.notes
            directory = place / "fs"
            directory.mkdir(mode=0o700)
            # While one state is checked by its filesystem's program, the next is
            # mounted. Two images take turns (`_images`), so the one that is checked is
            # never that which is being made: before its turn comes again, `result` has
            # been waited for.
            before: Future[None] | None = None
            for state, image in self._images(place, states):
                noted = notes(end=state.cut), notes(start=state.cut)
                with self._mounted(image, directory, state):
                    try:
                        self._check(Crash(directory, *noted, state))
                    except Exception as error:
                        reason = f"{type(error).__name__}: {error}"
                        raise self._error(state, "the check", reason) from error
                if before:
                    before.result()
                before = executor.submit(self._check_filesystem, image, state)
            if before:
                before.result()
        return self._checked

    def _images(
        self, place: Path, states: Iterable[CrashState]
    ) -> Iterator[tuple[CrashState, Path]]:
        # States are ordered: what is certainly on the disk only ever grows.
        certain, done = place / "certain.img", 0
        sparse.copy_sparse(self._recording.base, certain)
        slots = itertools.cycle((place / "0.img", place / "1.img"))
        for state, image in zip(states, slots, strict=False):
            done = self._recording.advance(certain, done, state)
            sparse.copy_sparse(certain, image)
            self._recording.lose(image, state)
            self._checked += 1
            yield state, image

    @contextlib.contextmanager
    def _mounted(
        self, image: Path, directory: Path, state: CrashState
    ) -> Iterator[None]:
        kind = self._recording.kind
        with unmounted_afterwards(directory):
            with LoopDevice(image) as loop:
                try:
                    mount_device(loop.path, directory, kind)
                except CommandError as error:
                    raise self._error(state, "mount", error.stderr) from error
            yield
        if kind is FilesystemType.BTRFS:
            # Older kernels remember that a device of this filesystem was newer, and
            # refuse to mount the next state, which is of an earlier time.
            with contextlib.suppress(OSError), _BTRFS_CONTROL.open("rb") as control:
                fcntl.ioctl(control, _BTRFS_IOC_FORGET_DEV, bytearray(_VOL_ARGS_SIZE))

    def _check_filesystem(self, image: Path, state: CrashState) -> None:
        checker = _CHECKERS[self._recording.kind]
        try:
            run([*checker, image])
        except CommandError as error:
            raise self._error(state, " ".join(checker), str(error)) from error

    def _error(self, state: CrashState, step: str, reason: str) -> CrashStateError:
        return CrashStateError(state, step, reason, checked=self._checked)
