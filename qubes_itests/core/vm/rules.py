"""What has to hold of VMs, whoever wants it otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from qubes_itests.core.exc import PermissionDenied, QubesValueError
from qubes_itests.core.ext import Extension, handler

if TYPE_CHECKING:
    from collections.abc import Callable

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

    @handler("admin-permission:admin.vm.List")
    def on_list(
        self, caller: Any, _event: str, **_kwargs: Any
    ) -> list[Callable[[Any], bool]]:
        """Show a VM only those VMs that policy lets it list."""
        if caller.klass == "AdminVM":
            return []
        return [lambda vm: _lets_know("admin.vm.List", caller, vm.name)]

    @handler("admin-permission:admin.Events")
    def on_events(
        self, caller: Any, _event: str, **_kwargs: Any
    ) -> list[Callable[[Any], bool]]:
        """Send a VM only events of VMs that policy lets it hear of.

        As in Qubes OS, the event's name is the argument, with ``_`` for ``:``.
        """
        if caller.klass == "AdminVM":
            return []
        return [lambda item: _may_hear(caller, *item)]


def _may_hear(caller: Any, subject: Any, event: str, values: dict[str, Any]) -> bool:
    # a VM is added and deleted by the app; a deleted one is @default to the policy
    about = values.get("vm", "dom0") if subject is caller.app else subject
    # what has been forbidden meanwhile is so at once
    caller.app.policy.refresh()
    return _lets_know(f"admin.Events+{event.replace(':', '_')}", caller, str(about))


def _lets_know(service: str, caller: Any, target: str) -> bool:
    app = caller.app
    allowed: bool = app.policy.lets_know(app, service, caller, target)
    return allowed
