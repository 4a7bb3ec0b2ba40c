"""The rules that changes of VMs may not break."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from qubes_itests.core.exc import (
    PermissionDenied,
    QubesValueError,
    QubesVMInUseError,
)
from qubes_itests.core.ext import Extension, handler
from qubes_itests.core.network.addresses import FAKE
from qubes_itests.core.vm.adminvm import AdminVM
from qubes_itests.core.vm.qubesvm import QubesVM

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import TypeAlias

    from qubes_itests.core.app import Qubes
    from qubes_itests.core.vm.base import BaseVM

    EventItem: TypeAlias = tuple[Qubes | BaseVM, str, Mapping[str, Any]]

__all__ = ["Rules"]

#: How tags begin that say where a VM is from; policy goes by them.
_OF_ORIGIN: Final = ("created-by-", "disp-created-by-")


class Rules(Extension):
    """Refuses what would break what others rely on."""

    @handler("device-pre-assign:pci")
    def on_pre_assign_pci(self, vm: QubesVM, _event: str, **_kwargs: Any) -> None:
        """Refuse PCI devices to a VM that is to be pvh."""
        if not vm.property_is_default("virt_mode") and vm.virt_mode == "pvh":
            raise QubesValueError(
                f"virt_mode of {vm} is set to pvh, which has no PCI devices: set it to"
                " hvm first"
            )

    @handler("domain-feature-pre-set:net.*", vm=QubesVM)
    def on_net_feature_pre_set(
        self, vm: QubesVM, _event: str, feature: str, value: str, **_kwargs: Any
    ) -> None:
        """Refuse to tell a guest an address that is none."""
        if feature in FAKE and value:
            try:
                FAKE[feature](value)
            except ValueError as error:
                raise QubesValueError(
                    f"feature {feature!r} of {vm} cannot be {value!r}: {error}"
                ) from error

    @handler("property-pre-set:netvm", "property-pre-reset:netvm", vm=QubesVM)
    def on_pre_change_netvm(self, vm: QubesVM, _event: str, **kwargs: Any) -> None:
        """Refuse a net VM that does not run, if this one does."""
        reset = "newvalue" not in kwargs
        vm.require_running(
            vm.property_get_default("netvm") if reset else kwargs["newvalue"]
        )

    @handler(
        "property-pre-set:provides_network",
        "property-pre-reset:provides_network",
        vm=QubesVM,
    )
    def on_pre_change_provides_network(
        self,
        vm: QubesVM,
        _event: str,
        newvalue: bool = False,
        **_kwargs: Any,
    ) -> None:
        """Refuse to stop as long as VMs have this one as net VM, or new ones would."""
        if newvalue:
            return
        if clients := vm.connected_vms:
            raise QubesVMInUseError(
                vm,
                f"VM {vm} is the net VM of {', '.join(map(str, clients))};"
                " set their netvm first",
            )
        if uses := {"default_netvm", "default_fw_netvm"} & {*vm.app.property_uses(vm)}:
            raise QubesVMInUseError(
                vm,
                f"VM {vm} is the app's {' and '.join(sorted(uses))};"
                " set another one first",
            )

    @handler(
        "admin-permission:admin.vm.tag.Set", "admin-permission:admin.vm.tag.Remove"
    )
    def on_tag_change(
        self, _vm: object, _event: str, *, arg: str, **_kwargs: Any
    ) -> None:
        """Refuse to change over the Admin API who a VM is said to be made by."""
        if arg.startswith(_OF_ORIGIN):
            raise PermissionDenied(f"tag {arg!r} is set when a VM is made, and stays")

    @handler("admin-permission:admin.vm.List")
    def on_list(
        self, caller: BaseVM, _event: str, **_kwargs: Any
    ) -> list[Callable[[BaseVM], bool]]:
        """Show a VM only those VMs that policy lets it list."""
        if isinstance(caller, AdminVM):
            return []
        return [lambda vm: _lets_know("admin.vm.List", caller, vm.name)]

    @handler("admin-permission:admin.Events")
    def on_events(
        self, caller: BaseVM, _event: str, **_kwargs: Any
    ) -> list[Callable[[EventItem], bool]]:
        """Send a VM only events of VMs that policy lets it hear of.

        As in Qubes OS, the event's name is the argument, with ``_`` for ``:``.
        """
        if isinstance(caller, AdminVM):
            return []
        return [lambda item: _may_hear(caller, *item)]


def _may_hear(
    caller: BaseVM, subject: Qubes | BaseVM, event: str, values: Mapping[str, Any]
) -> bool:
    # a VM is added and deleted by the app; a deleted one is @default to the policy
    about = values.get("vm", "dom0") if subject is caller.app else subject
    # what has been forbidden meanwhile is so at once
    caller.app.policy.refresh()
    return _lets_know(f"admin.Events+{event.replace(':', '_')}", caller, str(about))


def _lets_know(service: str, caller: BaseVM, target: str) -> bool:
    return caller.app.policy.lets_know(caller.app, service, caller, target)
