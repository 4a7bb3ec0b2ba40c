"""Block devices: what all have in common, and those that guests tell of."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.core.device.info import DeviceInfo, DeviceInterface, UnknownDevice
from qubes_itests.core.device.port import Port
from qubes_itests.core.vm.qubesvm import QubesVM

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qubes_itests.core.vm.base import BaseVM
    from qubes_itests.core.vm.database import QubesDB

__all__ = ["BLOCK_DEVICES", "BlockDevice", "GuestBlockDevice", "offered"]

#: Where guests tell of their devices, in qubesdb; this entry is written last.
BLOCK_DEVICES: Final = "/qubes-block-devices"
_NAME: Final = re.compile(r"[a-z0-9-]{1,12}")
#: What no guest may say of a device.
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9()+,.:=_/ -]")
_SIZE: Final = re.compile(r"[0-9]{1,18}")
#: A part of a part of a device is as deep as it gets; a guest may say more.
_DEEPEST: Final = 8


class BlockDevice(DeviceInfo):
    """A block device that VMs may have as a disk.

    :param port: where it is.
    :param size: bytes.
    :param read_only: whether VMs may not write to it.
    :param known: what else is known of it, as for `DeviceInfo`.
    """

    def __init__(self, port: Port, *, size: int, read_only: bool, **known: Any) -> None:
        self.size = size
        self.read_only = read_only
        super().__init__(
            port,
            interfaces=[DeviceInterface("b******")],
            size=str(size),
            mode=self.mode,
            **known,
        )

    @property
    def mode(self) -> str:
        """``r`` if it can only be read, else ``w``."""
        return "r" if self.read_only else "w"

    @property
    def attachment(self) -> BaseVM | None:
        """The VM that has it now, None for none."""
        having = (
            vm
            for vm in self.port.backend.app.domains
            if "block" in vm.devices and self.port in vm.devices["block"].attached
        )
        return next(having, None)


class GuestBlockDevice(BlockDevice):
    """A block device of a VM, as its guest tells of it at the moment.

    :param port: of the VM; its name is that in ``/dev`` there.
    :param database: of the guest.
    """

    def __init__(self, port: Port, database: QubesDB) -> None:
        self._database = database
        name = str(port.port_id)
        size = self._said(name, "size")
        # as Qubes OS has it: the model, and a label in parentheses
        model, _, label = self._said(name, "desc").partition(" ")
        above = self._above(name)
        numbers = [re.search(r"[0-9]+\Z", each) for each in [*above[::-1], name]]
        super().__init__(
            port,
            size=int(size) if _SIZE.fullmatch(size) else 0,
            read_only=self._said(name, "mode") == "r",
            manufacturer=f"sub-device of {port.backend_name}:{above[0]}"
            if above
            else f"hosted by {port.backend_name}",
            serial=model.replace("_", " ").strip() or None,
            name=label[1:-1].replace("_", " ").strip() or None,
            device_id="".join(f":{number and number[0]}" for number in numbers),
        )

    def _said(self, name: str, key: str) -> str:
        """Return what the guest says of a device, an empty text for nothing."""
        value = self._database.read(f"{BLOCK_DEVICES}/{name}/{key}")
        return _UNSAFE.sub("_", (value or b"").decode("ascii", "replace"))

    def _above(self, name: str) -> list[str]:
        """Return the devices that it is a part of, from the innermost to the whole."""
        found: list[str] = []
        parent = self._said(name, "parent")
        # a guest may say that two are parts of each other
        while (
            len(found) < _DEEPEST
            and _NAME.fullmatch(parent)
            and parent not in (name, *found)
        ):
            found.append(parent)
            parent = self._said(parent, "parent")
        return found

    @property
    def device_node(self) -> str:
        """Its path in the VM."""
        return f"/dev/{self.port_id}"

    @property
    def parent_device(self) -> DeviceInfo | None:
        """What it is a part of, None for nothing."""
        above = self._above(self.port_id)
        if not above:
            return None
        port = Port(self.port.backend, above[0], "block")
        return next(offered(port.backend, above[0]), UnknownDevice(port))


def offered(vm: BaseVM, name: str | None = None) -> Iterator[DeviceInfo]:
    """Yield the block devices that the guest of a running VM tells of.

    :param name: only that one.
    """
    database = vm.untrusted_qdb if isinstance(vm, QubesVM) else None
    if database is None:
        return
    below = f"{BLOCK_DEVICES}/"
    names = {p.removeprefix(below).split("/")[0] for p in database.list(below)}
    for found in sorted(names if name is None else names & {name}):
        if _NAME.fullmatch(found):
            yield GuestBlockDevice(Port(vm, found, "block"), database)
