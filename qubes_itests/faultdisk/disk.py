"""Block device that records what is written to it, and fails on request."""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from qubes_itests.exc import EnvironmentNotReadyError
from qubes_itests.faultdisk.exc import FaultDiskError
from qubes_itests.faultdisk.operations import Operation, read_journal
from qubes_itests.host.loop import LoopDevice

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FaultDisk"]

_FUSE = Path("/dev/fuse")
_TIMEOUT = 20.0
_LOG_TAIL = 2000
#: Of server.FILE_NAME, which is not imported here: it needs libfuse.
_FILE_NAME = "disk"


class FaultDisk:
    """A loop device over a file that a process serves through FUSE.

    A context manager.  Every write, discard and flush that reaches the device is
    recorded in order.  That process ends with the context, or with ours.

    :param image: the file with the disk's content; it is changed.
    :param directory: where to put the journal and the mount point.
    :raise EnvironmentNotReadyError: when the machine has no FUSE.
    """

    def __init__(self, image: Path, directory: Path) -> None:
        self.image = image
        self._directory = directory
        self._undo = contextlib.ExitStack()

    @property
    def device(self) -> Path:
        """The block device."""
        return self._loop.path

    def __enter__(self) -> Self:
        if not _FUSE.exists():
            raise _no_fuse(f"{_FUSE} is absent")
        with contextlib.ExitStack() as undo:
            place = Path(tempfile.mkdtemp(prefix="disk-", dir=self._directory))
            undo.callback(place.rmdir)
            self._serve(place, undo)
            # Detached before the process ends: a loop device over a file that nobody
            # serves any more blocks those who read it, in the kernel.
            self._loop = undo.enter_context(LoopDevice(place / "mnt" / _FILE_NAME))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._undo.close()

    def note(self, text: str) -> None:
        """Write a note between the operations; all that has returned is before it."""
        self._order("note", text=text)

    def operations(self) -> tuple[Operation, ...]:
        """Return what was recorded so far."""
        with self._journal.open("rb") as journal:
            return tuple(read_journal(journal))

    def counts(self) -> Mapping[str, int]:
        """Return how many operations came: "read", "write", "flush", "failed"."""
        return self._order("counts")

    def fail(
        self,
        operation: Literal["read", "write", "flush", "any"],
        *,
        nth: int = 1,
        times: int | None = 1,
        error: int = errno.EIO,
    ) -> None:
        """Have operations fail from now on.

        :param operation: of which kind; discards are writes.
        :param nth: the first that fails, counted from now, 1 being the next.
        :param times: how many fail; None for all that follow.
        :param error: how, as a number of `errno`; EIO and ENOSPC pass a loop device.
        """
        if nth < 1:
            raise ValueError(
                f"expected 1 or more as the number of an operation, got {nth}"
            )
        fault = {"left": nth - 1, "times": times, "error": error}
        self._order("fail", operation=operation, **fault)

    def lie_about_flushes(self) -> None:
        """Confirm flushes from now on, and do none."""
        self._order("lie")

    def mend(self) -> None:
        """Have nothing fail any more, and tell the truth about flushes."""
        self._order("mend")

    def cut_power(self) -> None:
        """Have everything fail from now on, for good, and record none of it."""
        self._order("cut")

    @property
    def _journal(self) -> Path:
        return self._place / "journal"

    def _serve(self, place: Path, undo: contextlib.ExitStack) -> None:
        self._place = place
        undo.callback(self._journal.unlink, missing_ok=True)
        mount_point = place / "mnt"
        mount_point.mkdir()
        undo.callback(mount_point.rmdir)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - goes with the process
        undo.callback(self._log.close)
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = self._spawn(mount_point, theirs.fileno())

        def end_process() -> None:
            try:
                self._process.wait(_TIMEOUT)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

        # Undone in the reverse order: the channel is closed, by which the process ends,
        # and then it is waited for. The other way round each would wait for the other.
        undo.callback(end_process)
        ours.settimeout(_TIMEOUT)
        # Closing it tells the process to unmount and to end.
        self._channel = undo.enter_context(ours)
        self._answers = undo.enter_context(ours.makefile("rb"))
        try:
            self._answer("serve")
        except FaultDiskError as error:
            raise _no_fuse(error.log or error.reason) from error

    def _spawn(self, mount_point: Path, channel: int) -> subprocess.Popen[bytes]:
        module = f"{__package__}.server"
        paths = [mount_point, self.image, self._journal]
        return subprocess.Popen(
            [sys.executable, "-P", "-m", module, *map(str, paths), str(channel)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            pass_fds=[channel],
            # Ctrl-C is for us: what is mounted on the disk is unmounted first.
            process_group=0,
        )

    def _order(self, order: str, **arguments: Any) -> dict[str, Any]:
        line = json.dumps({"order": order, **arguments}).encode() + b"\n"
        try:
            self._channel.sendall(line)
        except OSError as error:
            raise FaultDiskError(f"{order}: {error}", self._last_words()) from error
        return self._answer(order)

    def _answer(self, order: str) -> dict[str, Any]:
        try:
            line = self._answers.readline()
        except OSError as error:
            raise FaultDiskError(f"{order}: {error}", self._last_words()) from error
        if not line:
            raise FaultDiskError(f"{order}: it has ended", self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise FaultDiskError(f"{order}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        return self._log.read()[-_LOG_TAIL:].decode(errors="replace").strip()


def _no_fuse(reason: str) -> EnvironmentNotReadyError:
    return EnvironmentNotReadyError(
        f"Files cannot be served through FUSE ({reason}).",
        "Load the driver with: modprobe fuse; install libfuse3-3; a container must be"
        " given /dev/fuse and the right to mount.",
    )
