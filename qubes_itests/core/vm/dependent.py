"""What of a VM changes with something else of it, or of its template or net VM."""

from __future__ import annotations

from typing import Any, Final

from qubes_itests.core.ext import Extension, handler
from qubes_itests.core.vm.qubesvm import QubesVM

__all__ = ["Dependents"]

#: What a VM has from its template as long as nobody sets it.
_INHERITED: Final = (
    "memory",
    "maxmem",
    "vcpus",
    "virt_mode",
    "kernel",
    "kernelopts",
    "default_user",
    "qrexec_timeout",
    "shutdown_timeout",
)


class Dependents(Extension):
    """Tells of properties that nobody set, and that have another value now."""

    @handler(
        *(f"property-set:{name}" for name in _INHERITED),
        *(f"property-reset:{name}" for name in _INHERITED),
        vm=QubesVM,
    )
    def on_inherited_set(
        self, vm: QubesVM, _event: str, name: str, **_kwargs: Any
    ) -> None:
        """Tell the VMs that take their default from a template."""
        for each in vm.derived_vms:
            if each.property_is_default(name):
                _tell_reset(each, name)

    @handler("domain-feature-set:boot-mode.active", vm=QubesVM)
    def on_active_set(self, vm: QubesVM, _event: str, **_kwargs: Any) -> None:
        """Tell that the boot mode is another."""
        if vm.property_is_default("bootmode"):
            _tell_reset(vm, "bootmode")

    @handler(
        *(
            f"property-{change}:{name}"
            for change in ("set", "reset")
            for name in ("ip", "ip6")
        ),
        vm=QubesVM,
    )
    def on_address_set(
        self,
        vm: QubesVM,
        _event: str,
        name: str,
        newvalue: object = None,
        oldvalue: object = None,
        **_kwargs: Any,
    ) -> None:
        """Tell of the addresses that its guest and its clients are told."""
        if newvalue == oldvalue:
            return
        version = name.removeprefix("ip")
        if vm.provides_network:
            _tell_reset(vm, f"gateway{version}")
        _tell_reset(vm, f"visible_ip{version}")
        for client in vm.connected_vms:
            _tell_reset(client, f"visible_gateway{version}")

    @handler(
        "property-set:provides_network", "property-reset:provides_network", vm=QubesVM
    )
    def on_provides_network_set(self, vm: QubesVM, event: str, **kwargs: Any) -> None:
        """Mark a net VM as one that serves others, and tell its new addresses."""
        if vm.provides_network:
            vm.features["servicevm"] = "1"
        elif "servicevm" in vm.features:
            del vm.features["servicevm"]
        changed = kwargs.get("newvalue") != kwargs.get("oldvalue")
        if event.startswith("property-set:") and changed:
            _tell_reset(vm, "gateway")
            _tell_reset(vm, "gateway6")


def _tell_reset(vm: QubesVM, name: str) -> None:
    vm.fire_event(f"property-reset:{name}", name=name)
