"""What has to hold of devices, whatever their class's extension does."""

from __future__ import annotations

from typing import Any

from qubes_itests.core.exc import QubesValueError
from qubes_itests.core.ext import Extension, handler

__all__ = ["DeviceRules"]


class DeviceRules(Extension):
    """Refuses assignments that cannot be."""

    @handler("device-pre-assign:pci")
    def on_pre_assign_pci(self, vm: Any, _event: str, **_kwargs: Any) -> None:
        """Refuse PCI devices to a VM that is to be pvh."""
        if not vm.property_is_default("virt_mode") and vm.virt_mode == "pvh":
            raise QubesValueError(
                f"virt_mode of {vm} is set to pvh, which has no PCI devices: set it to"
                " hvm first"
            )
