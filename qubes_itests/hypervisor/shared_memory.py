"""Library by which QEMU shares the memory of a saved state among its clones."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qubes_itests.exc import HarnessError
from qubes_itests.host.cache import digest
from qubes_itests.host.command import run
from qubes_itests.hypervisor.domain_xml import memory_arguments
from qubes_itests.hypervisor.embed import emulator_key

if TYPE_CHECKING:
    from qubes_itests.host.cache import Cache

__all__ = ["build_memory_library", "link_memory_library"]

_LOG = logging.getLogger(__name__)

#: It says why QEMU needs it.
_SOURCE: Final = Path(__file__).with_suffix(".c")
_COMPILER: Final = ("gcc", "-std=c11", "-O2", "-Wall", "-Werror", "-shared", "-fPIC")
_NAME: Final = "shared_memory.so"
_TRIAL: Final = ("-machine", "none", "-m", "1", "-display", "none", "-qmp", "stdio")
_QUIT: Final = b'{"execute": "qmp_capabilities"} {"execute": "quit"}'


def build_memory_library(cache: Cache, emulator: Path) -> Path:
    """Return the library, compiled and tried on first use. Blocking.

    :param emulator: the QEMU program that must get along with it.
    :raise HarnessError: it does not compile, or QEMU does not take a memory by it.
    """

    def build(place: Path) -> None:
        run([*_COMPILER, "-o", place / _NAME, _SOURCE])
        memory = place / "memory"
        memory.write_bytes(bytes(1 << 20))
        arguments = memory_arguments(1, memory, writable=False)
        # by a short name: at spaces and colons in it the dynamic linker cuts the value
        environment = (f"--chdir={place}", f"LD_PRELOAD=./{_NAME}")
        run(["env", *environment, emulator, *_TRIAL, *arguments], input=_QUIT)
        memory.unlink()

    key = digest(_SOURCE, emulator_key(emulator))
    return cache.entry("memory-library", key, build) / _NAME


def link_memory_library(cache: Cache, emulator: Path, directory: Path) -> Path | None:
    """Return the library under a name in a directory, None if there is none. Blocking.

    The path of the cache may have spaces or colons in it.
    """
    link = directory / _NAME
    if re.search("[ :]", str(link)):
        _LOG.warning("VMs share no memory: %s has a space or a colon", directory)
        return None
    try:
        library = build_memory_library(cache, emulator)
    except HarnessError as error:
        _LOG.warning("VMs share no memory: %s", str(error))
        return None
    link.unlink(missing_ok=True)
    link.symlink_to(library)
    return link
