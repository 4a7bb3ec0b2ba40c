"""The kernel that guests boot, taken from the distribution's package.

The package is unpacked into the cache and never installed: the host's boot loader
and ``/boot`` stay as they are.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qubes_itests.host.exc import NoKernelError

if TYPE_CHECKING:
    from qubes_itests.host.cache import Cache

__all__ = ["Kernel", "find_kernel"]


@dataclass(frozen=True)
class Kernel:
    """A kernel for guests."""

    #: Its release, as ``uname -r`` says it in the guest.
    version: str
    #: The bootable image.
    image: Path
    #: The directory of its modules, ``…/lib/modules/VERSION``.
    modules: Path


def find_kernel(cache: Cache) -> Kernel:
    """Return the kernel to boot guests with; nothing is downloaded.

    :raises NoKernelError: there is none.
    """
    named = os.environ.get("QUBES_ITESTS_KERNEL")
    if named:
        return _named(Path(named))
    raise NoKernelError(f"none is in {cache.root}")


def _named(image: Path) -> Kernel:
    version = image.name.partition("-")[2]
    modules = image.absolute().parent.parent / "lib" / "modules" / version
    if not (image.is_file() and modules.is_dir()):
        raise NoKernelError(f"QUBES_ITESTS_KERNEL={image}, modules {modules}")
    return Kernel(version, image.absolute(), modules)
