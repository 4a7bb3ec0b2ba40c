"""The library by which clones share memory: built, tried, or done without."""

from __future__ import annotations

import mmap
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qubes_itests.exc import HarnessError
from qubes_itests.host.cache import Cache
from qubes_itests.hypervisor.shared_memory import (
    build_memory_library,
    link_memory_library,
)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "a cache: odd")


def test_a_qemu_that_cannot(cache, tmp_path, caplog):
    """It is said why, and there is no library."""
    with pytest.raises(HarnessError):
        build_memory_library(cache, Path("/bin/false"))
    assert link_memory_library(cache, Path("/bin/false"), tmp_path) is None
    assert "VMs share no memory" in caplog.text
    assert not cache.entries("memory-library")


def test_a_qemu_that_can(cache, tmp_path):
    emulator = Path(shutil.which("qemu-system-x86_64"))
    link = link_memory_library(cache, emulator, tmp_path)
    assert link.parent == tmp_path
    assert link.resolve() == build_memory_library(cache, emulator).resolve()
    odd = tmp_path / "a: b"
    odd.mkdir()
    assert link_memory_library(cache, emulator, odd) is None


#: Maps memory, asks for huge pages for all of it, and tells for how much it has them.
ASK = f"""
import mmap, re, sys
area = mmap.mmap(-1, int(sys.argv[1]) << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise({mmap.MADV_HUGEPAGE})
print(open("/proc/self/smaps").read())
"""


@pytest.mark.parametrize(("asked", "given"), [(2, 0), (15, 0), (64, 16)])
def test_huge_pages_are_for_what_fills_them(asked, given, cache):
    """MiB; one that is touched takes 2 MiB, of each clone."""
    library = build_memory_library(cache, Path(shutil.which("qemu-system-x86_64")))

    def huge(preload: str) -> int:
        told = subprocess.run(
            [sys.executable, "-c", ASK, str(asked)],
            env=os.environ | {"LD_PRELOAD": preload},
            check=True,
            capture_output=True,
            text=True,
            cwd=library.parent,
        )
        areas = re.split(r"^VmFlags:", told.stdout, flags=re.MULTILINE)
        sizes = [re.search(r"^Size: +(\d+) kB", a, re.MULTILINE) for a in areas[:-1]]
        flags = [area.partition("\n")[0].split() for area in areas[1:]]
        found = zip(sizes, flags, strict=True)
        return sum(int(size[1]) for size, words in found if "hg" in words) // 1024

    # by a short name: the cache's has spaces, at which the value would be cut
    assert huge("./" + library.name) == given
    assert huge("") == asked
