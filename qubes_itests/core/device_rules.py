"""What has to hold of devices, whatever their class's extension does."""

from __future__ import annotations

from typing import Any

from qubes_itests.core.exc import QubesValueError, QubesVMInUseError
from qubes_itests.core.ext import Extension, handler

__all__ = ["DeviceRules"]


class DeviceRules(Extension):
    """Refuses assignments that cannot be, and the removal of what they need."""

    @handler("device-pre-assign:pci")
    def on_pre_assign_pci(self, vm: Any, _event: str, **_kwargs: Any) -> None:
        """Refuse PCI devices to a VM that is to be pvh."""
        if not vm.property_is_default("virt_mode") and vm.virt_mode == "pvh":
            raise QubesValueError(
                f"virt_mode of {vm} is set to pvh, which has no PCI devices: set it to"
                " hvm first"
            )

    @handler("domain-pre-delete", system=True)
    def on_pre_delete(self, app: Any, _event: str, *, vm: Any, **_kwargs: Any) -> None:
        """Refuse to remove a VM whose devices are assigned to others."""
        users = [
            f"{user} ({assignment.devclass} device {assignment})"
            for user in app.domains
            if user is not vm
            for devices in user.devices.values()
            for assignment in devices.get_assigned_devices()
            if assignment.backend_domain is vm
        ]
        if users:
            raise QubesVMInUseError(
                vm,
                f"VM {vm} has devices that are assigned to {', '.join(users)};"
                " unassign these first",
            )
