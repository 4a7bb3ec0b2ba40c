"""What has to hold of VMs, whoever wants it otherwise."""

from __future__ import annotations

from typing import Any, Final

from qubes_itests.core.exc import PermissionDenied, QubesValueError
from qubes_itests.core.ext import Extension, handler

__all__ = ["Rules"]

#: How tags begin that say where a VM is from; policy goes by them.
_OF_ORIGIN: Final = ("created-by-", "disp-created-by-")


class Rules(Extension):
    """Refuses what would break what others rely on."""

    @handler("device-pre-assign:pci")
    def on_pre_assign_pci(self, vm: Any, _event: str, **_kwargs: Any) -> None:
        """Refuse PCI devices to a VM that is to be pvh."""
        if not vm.property_is_default("virt_mode") and vm.virt_mode == "pvh":
            raise QubesValueError(
                f"virt_mode of {vm} is set to pvh, which has no PCI devices: set it to"
                " hvm first"
            )

    @handler(
        "admin-permission:admin.vm.tag.Set", "admin-permission:admin.vm.tag.Remove"
    )
    def on_tag_change(self, _vm: Any, _event: str, *, arg: str, **_kwargs: Any) -> None:
        """Refuse to change over the Admin API who a VM is said to be made by."""
        if arg.startswith(_OF_ORIGIN):
            raise PermissionDenied(f"tag {arg!r} is set when a VM is made, and stays")
