"""What a failed test leaves to look at: consoles, definitions, logs, the storage tree.

Names come from tests and contents from guests: the former are sanitised, the latter
bounded, and safe to be shown on a terminal.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec

from qubes_itests.frozen.folder import MANIFEST, NAME, Folder, FrozenError
from qubes_itests.frozen.freezing import freeze
from qubes_itests.host.command import run
from qubes_itests.report.guest_files import read_guests
from qubes_itests.report.names import file_name
from qubes_itests.timeline import note
from qubes_itests.timeline.document import NAME as TIMELINE
from qubes_itests.untrusted_text import safe_text
from qubes_itests.whole_file import whole_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import pluggy

    from qubes_itests.core.app import Qubes
    from qubes_itests.run.testbed import Testbed

__all__ = ["LOG_LIMIT", "Artifacts", "tail"]

#: Bytes of one log that are kept: its end, where the cause is.
LOG_LIMIT = 1 << 20
_TREE_LIMIT = 2000
_Arguments = ParamSpec("_Arguments")
_COPY_TIMEOUT = 300.0
#: Tests of a run that are frozen, each of them up to `MOST_BYTES`.
_MOST_FROZEN = 8


def _or_told(method: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """Have what goes wrong in a method of `Artifacts` told at the end of the run.

    A failure is worth more than what it leaves: nothing here may take its place.
    """

    @functools.wraps(method)
    def guarded(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> None:
        try:
            method(*arguments, **options)
        except Exception as error:  # noqa: BLE001 - of plugins' hooks as well
            artifacts = arguments[0]
            assert isinstance(artifacts, Artifacts)  # noqa: S101 - for mypy
            problem = f"{type(error).__name__}: {error}"
            artifacts.problems.setdefault(problem)

    return guarded


class Artifacts:
    """The artefacts of a run.

    :param root: directory for them; it is made when there is something to put in.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        #: What could not be kept, in order: an error each, as keys.
        self.problems: dict[str, None] = {}
        self._began = time.time()

    def directory(self, test: str) -> Path:
        """Return the directory of one test, whether it exists or not."""
        return self.root / file_name(test)

    def begin(self, test: str) -> None:
        """Drop what an earlier run of this test left."""
        shutil.rmtree(self.directory(test), ignore_errors=True)

    @_or_told
    def begin_attempt(self, test: str, number: int) -> None:
        """Keep what an attempt left apart from what the next one will.

        :param number: of the one that has ended, from 1.
        """
        directory = self.directory(test)
        left = [p for p in directory.glob("*") if not p.name.startswith("attempt-")]
        if left:
            place = directory / f"attempt-{number}"
            place.mkdir()
            for path in left:
                path.rename(place / path.name)

    def files(self, test: str) -> tuple[str, ...]:
        """Return the names of what a test left so far, for people."""
        directory = self.directory(test)
        if not directory.is_dir():
            return ()
        return tuple(sorted(p.name + "/" * p.is_dir() for p in directory.iterdir()))

    def read(self, test: str, name: str) -> bytes:
        """Return a file that a test has left; OSError if there is none."""
        return (self.directory(test) / name).read_bytes()

    @_or_told
    def text(self, test: str, name: str, text: str) -> None:
        """Keep a text, or its end if it is long."""
        self._write_safe(test, name, text.encode("utf-8", "replace")[-LOG_LIMIT:])

    @_or_told
    def collect(
        self,
        test: str,
        testbed: Testbed,
        hook: pluggy.HookRelay,
        guest_files: Sequence[str] = (),
    ) -> None:
        """Keep what is to be seen of the VMs of a test, while they are there.

        :param hook: of the plugins that may have more to tell.
        :param guest_files: absolute paths in the VMs, with wildcards of a shell.
        """
        vms = [vm for app in testbed.apps for vm in app.domains.startable()]
        started = [(vm, domain) for vm in vms if (domain := vm.domain) is not None]
        directory = self.directory(test)
        for vm, domain in started:
            with contextlib.suppress(Exception):  # a dead domain has no definition
                text = domain.definition()
                self.text(test, f"{file_name(vm.name)}.domain.xml", text)
            directory.mkdir(parents=True, exist_ok=True)
            hook.qubes_itests_artifacts(test=test, vm=vm, directory=directory)
        reading = read_guests([vm for vm, _domain in started], guest_files)
        files, problems = testbed.portal.run(reading)
        self.problems |= dict.fromkeys(problems)
        for name, data in files.items():
            write = self._write if name.endswith(".bin") else self._write_safe
            write(test, name, data)
        if testbed.apps:
            tree = "\n".join(_tree(testbed.parts.pool_directory))
            self.text(test, "storage-tree.txt", tree + "\n")

    @_or_told
    def keep_disks(self, test: str, testbed: Testbed) -> None:
        """Copy the disk images of a test's VMs, holes left out."""
        for app in testbed.apps:
            for vm in app.domains:
                place = self.directory(test) / "disks" / file_name(vm.name)
                for name, volume in vm.volumes.items():
                    if not Path(volume.path).is_file():
                        continue
                    place.mkdir(parents=True, exist_ok=True)
                    copy = ("cp", "--sparse=always", "--reflink=auto", "--")
                    image = place / f"{file_name(name)}.img"
                    run([*copy, volume.path, image], timeout=_COPY_TIMEOUT)

    def freeze(self, test: str, testbed: Testbed) -> None:
        """Keep the VMs of a test as they are now, for `thaw`; they go on afterwards."""
        for app in testbed.apps:
            self._freeze(test, testbed, app)

    @_or_told
    def _freeze(self, test: str, testbed: Testbed, app: Qubes) -> None:
        vms = app.domains.startable()
        if all(vm.klass == "TemplateVM" and vm.is_halted() for vm in vms):
            return
        frozen = self.root.rglob(f"{NAME}*/{MANIFEST}")
        if sum(p.stat().st_mtime > self._began for p in frozen) >= _MOST_FROZEN:
            raise FrozenError(f"{_MOST_FROZEN} tests of this run are frozen already")
        directory = self.directory(test)
        directory.mkdir(parents=True, exist_ok=True)
        place = directory / NAME
        if place.exists():  # that of another app of the test
            place = directory / f"{NAME}-{len(list(directory.glob(f'{NAME}*'))) + 1}"
        scratch = testbed.parts.pool_directory
        testbed.portal.run(freeze(app, place, scratch, test))
        line = f"all VMs as they are now are in {place.name}: {Folder.read(place)}"
        note("log", level="INFO", logger="qubes_itests.frozen", line=line)

    @_or_told
    def logs(self, test: str, logs: Iterable[Path]) -> None:
        """Keep logs of VMs, which are still there when the VMs are gone.

        :param logs: files in directories that are named after the VMs.
        """
        for path in logs:
            name = f"{file_name(path.parent.name)}.{file_name(path.stem)}.log"
            with contextlib.suppress(OSError):
                self._write_safe(test, name, tail(path, LOG_LIMIT))

    def pack(self, test: str) -> dict[str, bytes]:
        """Return what a test left, by name, and drop it here; disks stay."""
        directory = self.directory(test)
        if not directory.is_dir():
            return {}
        paths = [path for path in directory.iterdir() if path.is_file()]
        # a timeline is bounded where it is made, and nothing without its first line
        files = {
            path.name: path.read_bytes()
            if path.name == TIMELINE
            else tail(path, LOG_LIMIT)
            for path in paths
        }
        for path in paths:
            path.unlink()
        with contextlib.suppress(OSError):  # disks
            directory.rmdir()
        return files

    @_or_told
    def add(self, test: str, files: Mapping[str, bytes]) -> None:
        """Keep more files, by name: what `pack` returned elsewhere, for one."""
        for name, data in files.items():
            self._write(test, Path(name).name, data)

    @_or_told
    def write_file(self, name: str, data: bytes) -> None:
        """Write a file about the whole run, at once or not at all."""
        self.root.mkdir(parents=True, exist_ok=True)
        with whole_file(self.root / name) as file:
            file.write(data)

    def _write_safe(self, test: str, name: str, data: bytes) -> None:
        """Write a text that may be a guest's."""
        text = safe_text(data, lines=True, limit=None)
        self._write(test, name, text.encode())

    def _write(self, test: str, name: str, data: bytes) -> None:
        directory = self.directory(test)
        directory.mkdir(parents=True, exist_ok=True)
        # a new file, and not where a link leads that a test has put there
        (directory / name).unlink(missing_ok=True)
        (directory / name).write_bytes(data)


def tail(path: Path, size: int) -> bytes:
    """Return the last `size` bytes of a file."""
    with path.open("rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - size))
        return file.read(size)


def _tree(root: Path) -> Iterator[str]:
    yield f"{'size':>14} {'allocated':>14}  below {root.name}/"
    paths = (path for path in sorted(root.rglob("*")) if not path.is_dir())
    for count, path in enumerate(paths):
        if count == _TREE_LIMIT:
            yield "… and more"
            return
        with contextlib.suppress(OSError):
            status = path.lstat()
            sizes = f"{status.st_size:14} {status.st_blocks * 512:14}"
            yield f"{sizes}  {os.fsdecode(os.fsencode(path.relative_to(root)))!r}"
