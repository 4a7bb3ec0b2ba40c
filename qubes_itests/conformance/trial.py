"""A pool on trial: volumes in it, what is written to them, and other processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import select
import signal
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from qubes_storage import Pool, Volume

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from pathlib import Path

__all__ = ["KINDS", "MIB", "SIZE", "Owner", "Trial"]

MIB: Final = 1024**2

#: Size of a volume unless a test says otherwise, bytes.
SIZE: Final = 4 * MIB

KINDS: Final[dict[str, dict[str, Any]]] = {
    "saved": {"name": "private", "rw": True, "save_on_stop": True},
    "snapshot": {"name": "root", "rw": True, "snap_on_start": True},
    "both": {"name": "root", "rw": True, "snap_on_start": True, "save_on_stop": True},
    "volatile": {"name": "volatile", "rw": True},
    "read_only": {"name": "kernel"},
}

T = TypeVar("T")


@dataclass(frozen=True)
class Owner:
    """All that storage knows of a VM."""

    name: str
    dir_path_prefix: str = "appvms"


class Trial:
    """One pool, set up, for one test.

    :param open_pool: makes an object of the pool; every call one over the same data.
    :param pool_class: returns what makes a pool of a driver, by its name.
    :param runner: runs the coroutines.
    """

    def __init__(
        self,
        open_pool: Callable[[], Pool],
        pool_class: Callable[[str], Callable[..., Pool]],
        runner: asyncio.Runner,
    ) -> None:
        self._open_pool = open_pool
        self.pool_class = pool_class
        self._runner = runner
        self._prefix = f"t{secrets.token_hex(3)}"
        self._vids: set[str] = set()
        self.pool = self.other_pool()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end."""
        return self._runner.run(coroutine)

    def other_pool(self) -> Pool:
        """Return another object of the same pool, set up."""
        pool = self._open_pool()
        self.run(pool.setup())
        return pool

    def reopen(self, *volumes: Volume) -> list[Volume]:
        """Forget the pool and open it anew; return these volumes in it."""
        self.run(self.pool.destroy())
        self.pool = self.other_pool()
        return [self.again(self.pool, volume) for volume in volumes]

    @staticmethod
    def again(pool: Pool, volume: Volume) -> Volume:
        """Return an object of the same volume in another object of the pool."""
        if volume.source is not None:
            Trial.again(pool, volume.source)
        return pool.init_volume(None, volume.config)

    def volume(self, kind: str = "saved", vm: str = "work", **config: Any) -> Volume:
        """Return a volume that is not created yet.

        :param kind: saved, snapshot, both, volatile or read_only.
        """
        size = {} if kind == "snapshot" else {"size": SIZE}
        owner = Owner(f"{self._prefix}-{vm}")
        volume = self.pool.init_volume(owner, {**KINDS[kind], **size, **config})
        self._vids.add(volume.vid)
        return volume

    def made(
        self, content: str = "", kind: str = "saved", vm: str = "work", **config: Any
    ) -> Volume:
        """Return a volume that is created, and that a VM has written to if asked."""
        volume = self.volume(kind, vm, **config)
        self.run(volume.create())
        if content:
            self.session(volume, content)
        return volume

    def session(self, volume: Volume, *contents: str) -> None:
        """For each content start the volume, write, and stop it."""
        for content in contents:
            self.run(volume.start())
            self.write(volume, content)
            self.run(volume.stop())

    @staticmethod
    def write(place: Volume | Path, content: str) -> None:
        """Write a text at the beginning, in the middle and before the end of SIZE."""
        path = place.block_device().path if isinstance(place, Volume) else place
        with path.open("r+b") as file:
            for offset in _OFFSETS:
                file.seek(offset)
                file.write(content.encode().ljust(_WORD, b"\0"))
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def read(place: Volume | Path) -> str:
        """Return the text that `write` wrote; an error if its places differ."""
        path = place.block_device().path if isinstance(place, Volume) else place
        found = set()
        with path.open("rb") as file:
            for offset in _OFFSETS:
                file.seek(offset)
                found.add(file.read(_WORD))
        if len(found) != 1:
            raise AssertionError(f"{path} has parts of several writes: {found}")
        return found.pop().rstrip(b"\0").decode()

    def committed(self, volume: Volume) -> str:
        """Return the text that is committed in a volume."""
        path = self.run(volume.export())
        try:
            return self.read(path)
        finally:
            self.run(volume.export_end(path))

    def started(self, volume: Volume) -> str:
        """Start a volume and return the text that its VM finds."""
        self.run(volume.start())
        return self.read(volume)

    def usage(self) -> int:
        """Return what the pool takes, bytes, with all that was written."""
        os.sync()
        usage = self.pool.usage
        if usage is None:
            raise AssertionError("expected the usage of the pool, got None")
        return usage

    def clean_up(self) -> None:
        """Remove the volumes, for pools that do not go with the test."""
        for vid in self._vids:
            with contextlib.suppress(Exception):
                volume = self.pool.get_volume(vid)
                self.run(volume.stop())
                self.run(volume.remove())
        self.run(self.pool.destroy())

    @contextlib.contextmanager
    def process(
        self, action: Callable[[Pool], Coroutine[Any, Any, Any]]
    ) -> Iterator[None]:
        """Have another process run `action` on another pool object, and live on.

        It is killed when the block ends.
        """
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            # Python warns of forks with threads: the child has none of them, and a lock
            # that one of them holds stays locked there.  It uses none of theirs.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if not pid:
            # Never returns: a second pytest must not go on from here.
            self._be_process(action, writer)
        os.close(writer)
        try:
            with os.fdopen(reader, "rb", buffering=0) as pipe:
                if not select.select([pipe], [], [], _DEADLINE)[0]:
                    raise AssertionError(
                        f"the other process did not answer in {_DEADLINE} s"
                    )
                outcome = pipe.read(_MESSAGE) or b""
                if outcome != _DONE:
                    reason = outcome.decode(errors="replace")
                    raise AssertionError(f"the other process failed: {reason}")
                yield
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _be_process(
        self, action: Callable[[Pool], Coroutine[Any, Any, Any]], writer: int
    ) -> None:
        # A flock belongs to the open file, which the child has inherited: locks of the
        # parent would be held until the child ends.
        os.closerange(_FIRST_FD, writer)
        os.closerange(writer + 1, os.sysconf("SC_OPEN_MAX"))

        async def act() -> None:
            pool = self._open_pool()
            await pool.setup()
            await action(pool)
            os.write(writer, _DONE)
            # Until it is killed, as a process that crashes in the middle of its work.
            signal.pause()

        try:
            asyncio.run(act())
        except BaseException as error:  # noqa: BLE001 - the parent tells it
            os.write(writer, f"-{error!r}".encode())
        finally:
            # Without the clean-ups of the parent, which still uses what they remove.
            os._exit(1)


_WORD: Final = 16
_OFFSETS: Final = (0, SIZE // 2, SIZE - _WORD)
_DONE: Final = b"+"
_MESSAGE: Final = 4096
_FIRST_FD: Final = 3
_DEADLINE: Final = 60.0
