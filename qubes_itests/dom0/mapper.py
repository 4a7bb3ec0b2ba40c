"""Device mapper of dom0, as far as tests make devices of theirs.

Device mapper belongs to the machine: containers have none, and what a killed run left
of it would stay. A linear device of one part is what a loop device over that part is,
and such a one ends with the process that made it. Of these dom0 says in its qubesdb
what its VMs may have, as udev's rules of Qubes OS do; the disks and the other loop
devices of the machine are left out.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qubes_itests.dom0.snapshots import MAPPER
from qubes_itests.host.loop import LoopDevice

if TYPE_CHECKING:
    from qubes_itests.dom0.stores import QubesDB

__all__ = ["Mapper"]

_NAME: Final = re.compile(r"[A-Za-z0-9_+.-]{1,127}")
#: Of one linear part: its first sector, how many, and the device and its first.
_TABLE: Final = re.compile(r"\s*0 (\d+) linear (\d+:\d+) (\d+)\s*")
_SECTOR: Final = 512
_BLOCKS: Final = "/qubes-block-devices"


@dataclass(frozen=True, slots=True)
class _Linear:
    """A device.

    :param number: N of its other name, dm-N.
    :param size: bytes.
    """

    number: int
    size: int
    undo: contextlib.ExitStack


class Mapper:
    """Devices in /dev/mapper, by name. All of it but `find` is blocking.

    :param database: that of dom0.
    """

    def __init__(self, database: QubesDB) -> None:
        self._database = database
        self._devices: dict[str, _Linear] = {}
        # each program that calls it has a thread
        self._lock = threading.RLock()

    def create(self, name: str, table: str) -> None:
        """Make a device, as ``dmsetup create NAME --table TABLE`` does.

        :raise ValueError: it is not a linear device of one part.
        :raise OSError: there is no such part, or the name is taken.
        :raise EnvironmentNotReadyError: the machine has none to spare.
        """
        parts = _TABLE.fullmatch(table)
        if parts is None or not _NAME.fullmatch(name):
            raise ValueError(
                "expected a name, and a table `0 SECTORS linear MAJOR:MINOR FIRST`,"
                f" got {name!r}, {table!r}"
            )
        size, first = int(parts[1]) * _SECTOR, int(parts[3]) * _SECTOR
        known = Path("/sys/dev/block", parts[2]).resolve(strict=True).name
        with self._lock, contextlib.ExitStack() as stack:
            taken = {device.number for device in self._devices.values()}
            number = next(n for n in itertools.count() if n not in taken)
            source = Path("/dev", known)
            loop = stack.enter_context(LoopDevice(source, offset=first, size=size))
            node = MAPPER / name
            os.mknod(node, stat.S_IFBLK | 0o600, loop.path.stat().st_rdev)
            stack.callback(node.unlink, missing_ok=True)
            self._devices[name] = _Linear(number, size, stack.pop_all())
            self.settle()

    def remove(self, name: str) -> None:
        """Remove a device; ValueError if there is none."""
        with self._lock:
            if name not in self._devices:
                raise ValueError(f"there is no device {name!r}")
            self._devices.pop(name).undo.close()
            self.settle()

    def find(self, path: Path) -> Path:
        """Return where the device /dev/dm-N is; any other path as it is."""
        for name, device in tuple(self._devices.items()):
            if path == Path(f"/dev/dm-{device.number}"):
                return MAPPER / name
        return path

    def settle(self) -> None:
        """Say in qubesdb what VMs may have: what is not mounted."""
        with self._lock:
            mounted = set()
            mounts = Path("/proc/self/mounts").read_text(encoding="utf-8")
            for line in mounts.splitlines():
                with contextlib.suppress(OSError):
                    mounted.add(Path(line.split()[0]).stat().st_rdev)
            wanted = {}
            for name, device in self._devices.items():
                if (MAPPER / name).stat().st_rdev not in mounted:
                    values = {
                        "desc": name,
                        "size": device.size,
                        "mode": "w",
                        "parent": "",
                    }
                    for key, value in values.items():
                        path = f"{_BLOCKS}/dm-{device.number}/{key}"
                        wanted[path] = str(value).encode()
            there = {
                path: self._database.read(path)
                for path in self._database.list(f"{_BLOCKS}/")
            }
            if there == wanted:
                return
            for path in there.keys() - wanted.keys():
                self._database.remove(path)
            for path, data in wanted.items():
                self._database.write(path, data)
            # last, as this is what is watched
            self._database.write(_BLOCKS, b"")

    def close(self) -> None:
        """Remove all devices."""
        with self._lock:
            for name in [*self._devices]:
                self._devices.pop(name).undo.close()
