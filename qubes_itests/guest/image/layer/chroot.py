"""A root image, mounted, and programs that run in it: only in a sandbox."""

from __future__ import annotations

import contextlib
import os
import selectors
import shlex
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Final, Self

from qubes_itests.guest.exc import LayerError
from qubes_itests.host.command import run, started
from qubes_itests.host.filesystem import mount, unmount
from qubes_itests.host.sandbox import require
from qubes_itests.host.tree import files_of
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qubes_itests.guest.image.layer.request import Copy

__all__ = ["MountedRoot"]

_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ENVIRONMENT: Final = {
    "PATH": _PATH,
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
    "USER": "root",
    "LOGNAME": "root",
    "SHELL": "/bin/sh",
    "DEBIAN_FRONTEND": "noninteractive",
}
#: What is mounted on while commands run.
_MOUNT_POINTS: Final = ("dev", "proc", "run", "sys")
_DEVICES: Final = ("null", "zero", "full", "random", "urandom")
_DEV_LINKS: Final = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
}
#: The program sees its own processes only; what it leaves running ends with it.
_CONFINED: Final = (
    *("unshare", "--mount", "--pid", "--ipc", "--uts", "--cgroup"),
    *("--fork", "--kill-child", "--"),
    # without site and without our package, to start at once
    *(sys.executable, "-I", "-S", str(Path(__file__).with_name("confine.py"))),
)
_LOG_LIMIT: Final = 16 << 20
_TAIL: Final = 4000
_TAIL_LINES: Final = 30
_COPY_TIMEOUT: Final = 300.0
_CHUNK: Final = 1 << 16


class MountedRoot:
    """A root image that is mounted while the context lasts.

    :param image: the file, which changes.
    :param place: an empty directory to mount it on.
    :param template: its name, for errors.
    :param log: a file that what the programs say is added to.
    """

    def __init__(self, image: Path, place: Path, template: str, log: Path) -> None:
        require()
        self._image = image
        self._template = template
        self._log = log
        self.root = place

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            # discard: what is removed in there takes no room in the image
            mount(self._image, self.root, options=["discard", "nodev"])
            undo.callback(unmount, self.root)
            self._require_mount_points()
            self._mount_dev(undo)
            self._mount_tmpfs("run", undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._undo.close()

    @contextlib.contextmanager
    def bound(self, directory: Path, name: str) -> Iterator[str]:
        """Show a directory of the host, to be read only, while the context lasts.

        :param name: of the directory that it is below ``/run``.
        :return: its path in there.
        """
        place = self.root / "run" / name
        place.mkdir()
        run(["mount", "--bind", "-o", "ro", directory, place])
        try:
            yield f"/run/{name}"
        finally:
            unmount(place)

    def copy(self, copy: Copy) -> None:
        """Copy files into it, as root's own.

        :raise LayerError: when they cannot be written; see `run`.
        """
        target = PurePosixPath(copy.target)
        place = target if copy.source.is_dir() else target.parent
        name = "" if copy.source.is_dir() else target.name
        with tempfile.TemporaryFile() as archive:
            _pack(copy.source, name, archive)
            archive.seek(0)
            where = shlex.quote(str(place))
            script = f"mkdir -p {where} && tar -x -C {where} -f -"
            step = f"copy {copy.source.name} to {target}"
            self._run(step, script, _COPY_TIMEOUT, archive.fileno())

    def run(self, step: str, script: str, timeout: float) -> None:
        """Run a script to its end; what it leaves running is ended.

        :param step: what it does, for the error.
        :param script: for ``sh -e``.
        :param timeout: seconds.
        :raise LayerError: it failed, took too long, or said too much; has the end of
            what it said.
        """
        with Path(os.devnull).open("rb") as nothing:
            self._run(step, script, timeout, nothing.fileno())

    def _run(self, step: str, script: str, timeout: float, stdin: int) -> None:
        with (
            self._log.open("ab") as log,
            # what is ended is unshare and, by that, all that its program has started
            started(
                [*_CONFINED, str(self.root), "sh", "-e", "-c", script],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                environment=_ENVIRONMENT,
            ) as process,
        ):
            log.write(f"== {step}\n".encode())
            log.flush()
            begin = log.tell()
            problem = _follow(process, log, timeout)
        if problem:
            raise LayerError(self._template, step, problem, self._tail(begin))

    def _require_mount_points(self) -> None:
        """See that nothing is mounted on what a link in the image leads to."""
        for name in _MOUNT_POINTS:
            place = self.root / name
            if place.is_symlink() or not place.is_dir():
                raise LayerError(
                    self._template, "mount the image", f"/{name} is no directory"
                )

    def _mount_dev(self, undo: contextlib.ExitStack) -> None:
        dev = self._mount_tmpfs("dev", undo)
        for name in _DEVICES:
            (dev / name).touch()
            # of a mount to be read only the device can be written, but not its mode,
            # which is that of the host's own
            run(["mount", "--bind", "-o", "ro", f"/dev/{name}", dev / name])
            undo.callback(unmount, dev / name)
        for name, target in _DEV_LINKS.items():
            (dev / name).symlink_to(target)
        (dev / "shm").mkdir()
        (dev / "shm").chmod(0o1777)
        (dev / "pts").mkdir()
        (dev / "ptmx").symlink_to("pts/ptmx")
        options = "newinstance,ptmxmode=666,mode=620"
        run(["mount", "-t", "devpts", "-o", options, "devpts", dev / "pts"])
        undo.callback(unmount, dev / "pts")

    def _mount_tmpfs(self, name: str, undo: contextlib.ExitStack) -> Path:
        place = self.root / name
        options = "size=256m,mode=755,nosuid"
        run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place])
        undo.callback(unmount, place)
        return place

    def _tail(self, begin: int) -> str:
        with self._log.open("rb") as log:
            log.seek(max(begin, log.seek(0, os.SEEK_END) - _TAIL))
            said = safe_text(log.read().strip(), lines=True, limit=None)
        return "\n".join(said.splitlines()[-_TAIL_LINES:])


def _pack(source: Path, name: str, archive: IO[bytes]) -> None:
    """Write a tar file: a directory's files, or one file under a name."""
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for path in files_of(source):
            member = tar.gettarinfo(source / path, name or str(path))
            member.uid = member.gid = 0
            member.uname = member.gname = "root"
            # as git knows them: the rest is the umask of the checkout
            executable = not member.isfile() or member.mode & 0o100
            member.mode = 0o755 if executable else 0o644
            if member.isreg():
                with (source / path).open("rb") as file:
                    tar.addfile(member, file)
            else:
                tar.addfile(member)


def _follow(
    process: subprocess.Popen[bytes], log: IO[bytes], timeout: float
) -> str | None:
    """Write down what a program says until it ends; return what is wrong, or None."""
    said, end = 0, time.monotonic() + timeout
    pipe = process.stdout
    assert pipe is not None  # noqa: S101 - as it was started
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, end - time.monotonic())):
                return f"it did not end within {timeout:g} s"
            if not (data := os.read(pipe.fileno(), _CHUNK)):
                break
            log.write(data)
            log.flush()
            if (said := said + len(data)) > _LOG_LIMIT:
                return f"it said more than {_LOG_LIMIT >> 20} MiB"
    try:
        status = process.wait(max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return f"it did not end within {timeout:g} s"
    return f"exit status {status}" if status else None
