"""Kernel modules: where they are, and which others they need before them."""

from __future__ import annotations

import gzip
import lzma
import re
from typing import TYPE_CHECKING, Final

from qubes_itests.exc import HarnessError
from qubes_itests.guest.exc import ImageError
from qubes_itests.host.command import output

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["STAGE_ONE", "STAGE_ONE_IF_THERE", "ModuleTree"]

#: What stage one loads, in this order, each after what it needs. A guest must be able
#: to speak, to see disks and interfaces that are plugged in later, to mount its root,
#: and to give memory back; all else may be loaded from its root when it is needed.
STAGE_ONE: Final = (
    "virtio_pci",
    "virtio_console",
    "virtio_scsi",
    "sd_mod",
    "virtio_rng",
    "virtio_balloon",
    "virtio_net",
    "ext4",
)

#: What it loads of kernels that have it. With the first a kernel that panics tells
#: QEMU; without it a panic shows on the console alone, as long as no program runs. The
#: second makes the checksums of ext4, which asks for what makes them, not for this
#: module. The third is a filesystem that systemd mounts at each boot; here it takes no
#: time then.
STAGE_ONE_IF_THERE: Final = ("pvpanic_mmio", "crc32c_generic", "configfs")

_FILE: Final = re.compile(r"(.+)\.ko(?:\.(xz|zst|gz))?")
# In the section .modinfo every setting is a string between NULs.
_DEPENDS: Final = re.compile(rb"\0depends=([^\0]*)\0")


class ModuleTree:
    """The modules of one kernel.

    :param directory: its ``lib/modules/VERSION``.
    :raise ImageError: there are none.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files = {
            _canonical(match[1]): path
            for path in directory.glob("kernel/**/*.ko*")
            if (match := _FILE.fullmatch(path.name))
        }
        if not self._files:
            raise ImageError("initramfs", f"there are no modules in {directory}")
        self._builtin = _builtin(directory / "modules.builtin")
        self._contents: dict[str, bytes] = {}

    def resolve(self, names: Iterable[str], optional: Iterable[str] = ()) -> list[str]:
        """Return modules in an order to load them, with all that they need.

        What the kernel has built in is left out.

        :param names: of those that must be there.
        :param optional: of those that come last, if they are there.
        :raise ImageError: one is missing.
        """
        order: dict[str, None] = {}
        there = (name for name in optional if _canonical(name) in self._files)
        for name in (*names, *there):
            self._add(_canonical(name), order, ())
        return list(order)

    def read(self, name: str) -> bytes:
        """Return a module's file, uncompressed."""
        if name not in self._contents:
            self._contents[name] = _read(self._files[name])
        return self._contents[name]

    def _add(self, name: str, order: dict[str, None], above: tuple[str, ...]) -> None:
        if name in order or name in self._builtin:
            return
        if name not in self._files or name in above:
            raise ImageError(
                "initramfs",
                f"the kernel in {self._directory} has no usable module {name}; use"
                " the kernel that set-up fetches",
            )
        match = _DEPENDS.search(self.read(name))
        for needed in filter(None, match[1].decode().split(",") if match else ()):
            self._add(_canonical(needed), order, (*above, name))
        order[name] = None


def _canonical(name: str) -> str:
    return name.replace("-", "_")


def _builtin(path: Path) -> frozenset[str]:
    if not path.is_file():
        return frozenset()
    names = (line.rpartition("/")[2] for line in path.read_text().split())
    return frozenset(_canonical(name.removesuffix(".ko")) for name in names)


def _read(path: Path) -> bytes:
    match path.suffix:
        case ".xz":
            return lzma.decompress(path.read_bytes())
        case ".gz":
            return gzip.decompress(path.read_bytes())
        case ".zst":
            return _unzstd(path)
        case _:
            return path.read_bytes()


def _unzstd(path: Path) -> bytes:
    # the standard library knows zstd from Python 3.14 on
    try:
        return output(["zstd", "--decompress", "--stdout", "--quiet", path])
    except HarnessError as error:
        raise ImageError("initramfs", f"zstd cannot read {path}: {error}") from error
