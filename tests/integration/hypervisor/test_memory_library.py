"""The library by which clones share memory: built, tried, or done without."""

from __future__ import annotations

import shutil
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
