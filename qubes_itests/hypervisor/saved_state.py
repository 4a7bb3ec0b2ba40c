"""Saved states: a domain's memory and devices in files, and back.

libvirt's own save and restore insist on one UUID.  A state is written here by QEMU's
migration to a file, which other domains of the same machine can load.

Where clones share memory that file holds the devices alone. The memory is a file beside
it, in which the saved domain ran, and which nobody writes any more: each clone has a
private mapping of it, so that it owns only those pages that it has changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from typing import TYPE_CHECKING, Any, Final, Self

from qubes_itests.exc import DeadlineError
from qubes_itests.hypervisor.exc import HypervisorError, SavedStateError
from qubes_itests.hypervisor.monitor import Monitor
from qubes_storage.uninterrupted import to_its_end

if TYPE_CHECKING:
    from pathlib import Path

    from qubes_itests.hypervisor.connection import Connection

__all__ = ["SavedState", "make_memory_file", "memory_file", "save_state"]

#: Seconds for one direction; a small guest takes one or two under emulation.
_DEADLINE = 60.0
_POLL = 0.002
_FD_NAME = "qubes_itests-state"

#: What a file begins with whose memory is elsewhere, to its full length: the size of
#: that file and when it was changed last. QEMU's own data begins otherwise.
_HEADER: Final = "memory {} bytes of {} ns"
_HEADER_LENGTH: Final = 64


def memory_file(path: Path) -> Path:
    """Return the file beside a state in which the memory is that its clones share."""
    return path.with_name(f"{path.name}.memory")


def make_memory_file(file: Path, size: int) -> None:
    """Make the memory of a domain that will be saved, all of it a hole. Blocking.

    :param size: bytes.
    :raise OSError: it cannot be made, or is there: then it is somebody else's.
    """
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.truncate(descriptor, size)
    except OSError:
        file.unlink()
        raise
    finally:
        os.close(descriptor)


def _header(memory: Path) -> bytes:
    status = memory.stat()
    text = _HEADER.format(status.st_size, status.st_mtime_ns)
    return text.ljust(_HEADER_LENGTH - 1).encode() + b"\n"


async def save_state(
    connection: Connection,
    domain: str,
    native: Any,
    path: Path,
    memory: Path | None = None,
) -> None:
    """Write a domain's state to `path`; its virtual CPUs stay stopped.

    :param memory: the file in which it runs; it becomes part of the state.
    :raise HypervisorError: it did not work; there is no file then.
    """
    monitor = Monitor(connection, domain, native)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # stopped first, or the guest dirties pages as fast as they are written
        await connection.call(domain, "save", native.suspend)
        await _leave_out_shared_memory(monitor, "save", out=memory is not None)
        # QEMU's default is a network's speed, which would make the save take seconds
        await monitor.execute(
            "save", "migrate-set-parameters", **{"max-bandwidth": 1 << 40}
        )
        if memory is not None:
            os.lseek(fd, _HEADER_LENGTH, os.SEEK_SET)
        await monitor.pass_file("save", _FD_NAME, fd)
        await monitor.execute("save", "migrate", uri=f"fd:{_FD_NAME}")
        await _wait_migrated(monitor, "save")
        # On disk before it has its name: the name is what later runs trust, and after
        # a power cut it could be that of a file with holes, from which guests crash.
        if memory is not None:
            await asyncio.to_thread(_seal, memory)
            os.pwrite(fd, _header(memory), 0)
        await asyncio.to_thread(os.fsync, fd)
        temporary.replace(path)
    except BaseException:
        # Else QEMU would write on, and at the end stop a guest that runs again by then.
        with contextlib.suppress(HypervisorError):
            await to_its_end(monitor.execute("save", "migrate_cancel"))
        raise
    finally:
        os.close(fd)
        temporary.unlink(missing_ok=True)


def _seal(memory: Path) -> None:
    """Make a memory what it stays: on the disk, and not for writing."""
    descriptor = os.open(memory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fchmod(descriptor, 0o400)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


async def _leave_out_shared_memory(monitor: Monitor, action: str, *, out: bool) -> None:
    """Have memory left out of the state, or not, that others share; on both sides.

    It changes the format.
    """
    capability = {"capability": "x-ignore-shared", "state": out}
    await monitor.execute(action, "migrate-set-capabilities", capabilities=[capability])


async def _wait_migrated(monitor: Monitor, action: str) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _DEADLINE
    while True:
        progress = await monitor.execute(action, "query-migrate")
        status = progress.get("status")
        if status == "completed":
            return
        if status in ("failed", "cancelled"):
            reason = progress.get("error-desc", f"migration {status}")
            raise HypervisorError(monitor.domain, action, reason)
        if loop.time() > deadline:
            raise DeadlineError(
                f"end of {action} of domain {monitor.domain!r}", _DEADLINE, str(status)
            )
        await asyncio.sleep(_POLL)


class SavedState:
    """A saved state that is about to be loaded; a context manager.

    :param domain: name of the domain that it is loaded into.
    :param path: what `save_state` wrote.
    :raise SavedStateError: there is no such file, or its memory is not what it was.
    """

    #: The file that is the domain's memory; None if that is in the state itself.
    memory: Path | None = None

    def __init__(self, domain: str, path: Path) -> None:
        self._domain = domain
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._error(error) from error
        try:
            self._find_memory(memory_file(path))
        except BaseException:
            os.close(self._fd)
            raise

    def _find_memory(self, file: Path) -> None:
        header = os.read(self._fd, _HEADER_LENGTH)
        if not header.startswith(_HEADER.partition(" ")[0].encode()):
            os.lseek(self._fd, 0, os.SEEK_SET)
            return
        try:
            expected, mode = _header(file), file.stat().st_mode
        except OSError as error:
            raise self._error(error) from error
        if header != expected or mode & 0o222:
            raise self._error(f"{file} was written to")
        self.memory = file

    def _error(self, reason: object) -> SavedStateError:
        words = f"its saved state did not load: {reason}"
        return SavedStateError(self._domain, "start", words)

    async def load(self, connection: Connection, native: Any, *, run: bool) -> None:
        """Load into a domain that waits for it.

        :param run: whether its virtual CPUs run from then on.
        :raise SavedStateError: it did not load; the domain is of no use then.
        """
        monitor = Monitor(connection, self._domain, native)
        try:
            if self.memory is not None:
                await _leave_out_shared_memory(monitor, "start", out=True)
            await monitor.pass_file("start", _FD_NAME, self._fd)
            await monitor.execute("start", "migrate-incoming", uri=f"fd:{_FD_NAME}")
            await _wait_migrated(monitor, "start")
            if run:
                await connection.call(self._domain, "start", native.resume)
        except HypervisorError as error:
            raise self._error(error.reason) from error
        except DeadlineError as error:
            raise self._error(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        os.close(self._fd)
