"""Block devices of dom0: images and devices of the host.

Each is a link in the folder ``block`` of the app's directory; its name is the port.  A
file that nobody may write is attached read-only.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qubes_itests.core.device.block_device import BlockDevice
from qubes_itests.core.device.port import Port
from qubes_itests.core.exc import QubesException, QubesValueError
from qubes_storage.uninterrupted import to_its_end

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qubes_itests.core.app import Qubes

__all__ = ["HostBlockDevice", "expose", "exposed", "withdraw"]

log = logging.getLogger("qubes.devices")

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_WRITABLE: Final = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH


class HostBlockDevice(BlockDevice):
    """An image or a block device of the host.

    :param port: whose name is that of the link.
    :param path: what the link leads to.
    """

    def __init__(self, port: Port, path: Path) -> None:
        status = path.stat()
        self.path = path
        super().__init__(
            port,
            size=_size(path, status),
            read_only=not status.st_mode & _WRITABLE,
            name=str(port.port_id),
            manufacturer=f"hosted by {port.backend_name}",
            device_id=f"image:{port.port_id}",
        )


def _size(path: Path, status: os.stat_result) -> int:
    if not stat.S_ISBLK(status.st_mode):
        return status.st_size
    with path.open("rb") as device:
        return device.seek(0, os.SEEK_END)


def _folder(app: Qubes) -> Path:
    return app.directory / "block"


def exposed(app: Qubes, name: str | None = None) -> Iterator[HostBlockDevice]:
    """Yield the block devices of dom0; what is neither image nor device is left out.

    So is what cannot be looked at: a link to itself, a drive without a disk in it.

    :param name: only that one.
    """
    for found in [name] if name else _names(_folder(app)):
        if not _NAME.fullmatch(found):
            continue
        try:
            path = (_folder(app) / found).resolve()
            if not (path.is_file() or path.is_block_device()):
                continue
            device = HostBlockDevice(_port(app, found), path)
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
            log.info("block device %s of dom0 is not there: %s", found, str(error))
            continue
        yield device


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _port(app: Qubes, name: str) -> Port:
    return Port(app.domains["dom0"], name, "block")


async def expose(
    app: Qubes, path: str | os.PathLike[str], name: str | None = None
) -> HostBlockDevice:
    """Expose an image or a block device of the host; VMs that wait for it get it.

    :param path: an existing raw image, as that of a volume, or a device.
    :param name: of its port; by default that of the file.
    :return: the device, as ``app.domains["dom0"].devices["block"][name]``.
    :raise QubesValueError: for a file that is no image, or an invalid or taken name.
    """
    folder = _folder(app)
    name = await to_its_end(
        asyncio.to_thread(_link, folder, path, name),
        undo=lambda made: asyncio.to_thread((folder / made).unlink),
    )
    device = next(exposed(app, name), None)
    if device is None:
        await to_its_end(asyncio.to_thread((folder / name).unlink))
        raise QubesValueError(f"{path} cannot be read as an image or a block device")
    dom0 = app.domains["dom0"]
    await dom0.fire_event_async("device-list-change:block")
    await dom0.fire_event_async("device-added:block", device=device)
    return device


def _link(folder: Path, path: str | os.PathLike[str], name: str | None) -> str:
    target = Path(path).absolute()
    name = target.name if name is None else name
    if not _NAME.fullmatch(name):
        raise QubesValueError(f"{name!r} is no name of a block device")
    if not (target.is_file() or target.is_block_device()):
        raise QubesValueError(f"{target} is neither an image nor a block device")
    folder.mkdir(exist_ok=True)
    try:
        (folder / name).symlink_to(target)
    except FileExistsError as error:
        raise QubesValueError(f"there is a block device {name!r} already") from error
    return name


async def withdraw(app: Qubes, name: str) -> None:
    """Expose a block device no longer; a VM that has it loses it. The image stays.

    :raise QubesException: when there is none of that name.
    :raise QubesVMNotHaltedError: when a running VM requires it.
    """
    if name not in await asyncio.to_thread(_names, _folder(app)):
        raise QubesException(f"dom0 exposes no block device {name!r}")
    port = _port(app, name)
    for vm in app.domains.startable():
        if port in vm.devices["block"].attached:
            await vm.devices["block"].detach(port)
    await asyncio.to_thread((_folder(app) / name).unlink)
    dom0 = app.domains["dom0"]
    await dom0.fire_event_async("device-list-change:block")
    await dom0.fire_event_async("device-removed:block", port=port)
