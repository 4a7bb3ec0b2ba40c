"""Root directory of the embedded QEMU driver, and its lasting capability cache.

libvirt asks a QEMU program what it can do before its first domain, for a second or
more, and keeps the answer under its root directory, which lasts one run.  So the
answer is copied in from the harness' cache when a run begins, and copied out when it
was new.  libvirt itself checks that it fits the program that it finds.
"""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING

import libvirt

from qubes_itests.host.cache import digest

if TYPE_CHECKING:
    from pathlib import Path

    from qubes_itests.host.cache import Cache

__all__ = ["CapabilityCache", "emulator_key", "make_root"]

_KIND = "libvirt-capabilities"

_CONFIGURATION = """\
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
seccomp_sandbox = 0
"""


def make_root(root: Path) -> None:
    """Make the directory that `qemu:///embed?root=` is given. Blocking."""
    (root / "etc").mkdir(parents=True, exist_ok=True)
    (root / "etc" / "qemu.conf").write_text(_CONFIGURATION)
    # In memory, which a sandbox has for itself: libvirt writes down what a domain does
    # fifteen times a start, for a libvirt after a crash, and waits for the disk each
    # time. There is none of those: what is in here ends with the process.
    if not (root / "run").exists():
        state = tempfile.mkdtemp(dir="/dev/shm", prefix="")
        (root / "run").symlink_to(state)


def emulator_key(emulator: Path) -> str:
    """Return a key for a QEMU program, as installed, under this libvirt."""
    status = emulator.stat()
    identity = f"{status.st_ino} {status.st_size} {status.st_mtime_ns}"
    return digest(str(emulator), identity, str(libvirt.getVersion()))


class CapabilityCache:
    """What libvirt knows about an emulator, from run to run.

    :param cache: where it lasts.
    :param root: the embedded driver's root directory.
    :param emulator: the QEMU program.
    """

    def __init__(self, cache: Cache, root: Path, emulator: Path) -> None:
        self._cache = cache
        self._live = root / "cache" / "qemu" / "capabilities"
        self._key = emulator_key(emulator)

    def fetch(self) -> None:
        """Give libvirt what an earlier run learnt; before it is opened. Blocking."""
        entry = self._cache.lookup(_KIND, self._key)
        if entry is None:
            return
        # nothing, if another run just replaces it: libvirt asks QEMU itself then
        learnt = _contents(entry)
        self._live.mkdir(parents=True, exist_ok=True)
        _write(self._live, learnt)

    def store(self) -> None:
        """Keep what libvirt has learnt, if it is new. Blocking."""
        learnt = _contents(self._live)
        entry = self._cache.lookup(_KIND, self._key)
        if not learnt or (entry is not None and _contents(entry) == learnt):
            return
        # Another run may do the same at the same time: then the entry of one of them is
        # there in the end, or none, and the next run asks QEMU once more.
        if entry is not None:
            self._cache.discard(_KIND, self._key)
        self._cache.entry(_KIND, self._key, lambda place: _write(place, learnt))


def _contents(directory: Path) -> dict[str, bytes]:
    try:
        return {path.name: path.read_bytes() for path in directory.glob("*.xml")}
    except FileNotFoundError:  # another run is replacing it
        return {}


def _write(directory: Path, contents: dict[str, bytes]) -> None:
    for name, data in contents.items():
        (directory / name).write_bytes(data)
