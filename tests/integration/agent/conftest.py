"""Fixtures: the mini template's parts, and guests that QEMU boots from them."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from raw_guest import BOOT_TIMEOUT, RawGuest, make_disks

from qubes_itests.guest.image.initramfs import build_initramfs
from qubes_itests.guest.image.modules import STAGE_ONE
from qubes_itests.guest.image.tiny import build_agent, build_tiny
from qubes_itests.host.cache import Cache
from qubes_itests.host.kernel import find_kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    BootGuest = Callable[..., RawGuest]


@dataclasses.dataclass(frozen=True)
class Parts:
    """What guests are made of."""

    kernel: Path
    initramfs: Path
    root: Path
    directory: Path


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """Return the mini template's parts; its stage one knows both kinds of disks."""
    cache = Cache()
    kernel = find_kernel(cache)
    directory = tmp_path_factory.mktemp("parts")
    wanted = (*STAGE_ONE, "virtio_blk")
    initramfs = build_initramfs(build_agent(cache), kernel.modules, wanted)
    (directory / "initramfs").write_bytes(initramfs)
    root = build_tiny(cache, kernel).root_image
    return Parts(kernel.image, directory / "initramfs", root, directory)


def boot(parts: Parts, bus: str, disks: dict[str, Path] | None = None) -> RawGuest:
    """Boot a guest to the end of stage one; with fresh disks, unless some are named."""
    directory = Path(tempfile.mkdtemp(dir=parts.directory))
    if disks is None:
        disks = make_disks(directory, parts.root)
    guest = RawGuest(directory, parts.kernel, parts.initramfs, disks, bus)
    try:
        guest.wire.hello(BOOT_TIMEOUT)
    except BaseException:
        guest.close()
        raise
    return guest


@pytest.fixture
def boot_guest(parts: Parts) -> Iterator[BootGuest]:
    """Return a function that boots a guest to the end of stage one."""
    with contextlib.ExitStack() as guests:

        def boot_one(disks: dict[str, Path] | None = None) -> RawGuest:
            guest = boot(parts, "scsi", disks)
            guests.callback(guest.close)
            return guest

        yield boot_one


@pytest.fixture(scope="module", params=["scsi", "blk"])
def guest(request: pytest.FixtureRequest, parts: Parts) -> Iterator[RawGuest]:
    """Return a guest that has entered stage two."""
    booted = boot(parts, request.param)
    with contextlib.closing(booted):
        entries = {"service:one": "1", "service:../two": "1", "db:/qubes-x": "y=z"}
        assert booted.enter(**entries) is None
        yield booted
