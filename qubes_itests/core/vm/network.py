"""The network settings of a VM: who connects it, and its addresses."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import Any

from qubes_itests.core.events import handler
from qubes_itests.core.exc import (
    QubesValueError,
    QubesVMInUseError,
    QubesVMNotStartedError,
)
from qubes_itests.core.network.addresses import (
    DNS,
    NETMASK,
    check_mac,
    default_mac,
    ipv4_of,
    ipv6_of,
    upstream,
)
from qubes_itests.core.properties import Property, VMProperty, stateless_property
from qubes_itests.core.vm.base import BaseVM

__all__ = ["NetMixin"]

#: Features that give the guest other addresses than it has; data, see `visible_ip`.
_FAKE = {
    "net.fake-ip": IPv4Address,
    "net.fake-gateway": IPv4Address,
    "net.fake-netmask": IPv4Address,
}


class _Addresses(tuple[IPv4Address, ...]):
    """Addresses, written with spaces between them."""

    __slots__ = ()

    def __str__(self) -> str:
        return " ".join(map(str, self))


def _check_netvm(vm: Any, found: Any) -> None:
    # in what is loaded, a default that would be a loop is none when all is there
    above = _set_upstream(found) if vm.app.loading else [found, *upstream(found)]
    if vm in above:
        raise ValueError(f"{vm} would be its own net VM by way of {found}")
    if not getattr(found, "provides_network", False):
        raise ValueError(f"{found} has not provides_network set")


def _default_netvm(vm: Any) -> Any:
    """Return the app's choice, and None where that would be a loop."""
    if not vm.provides_network:
        return vm.app.default_netvm
    found = vm.app.default_fw_netvm
    return None if vm in _set_upstream(found) else found


def _set_upstream(vm: Any) -> list[Any]:
    """Return a VM, its net VM, and so on, as far as these are set and no default."""
    above: list[Any] = []
    while vm is not None and vm not in above:
        above.append(vm)
        vm = None if vm.property_is_default("netvm") else vm.netvm
    return above


class NetMixin(BaseVM):
    """A VM's place in the network, as long as it is a matter of settings."""

    mac = Property[str](
        "mac",
        setter=check_mac,
        default=default_mac,
        clone=False,
        doc="Hardware address of the interface to its net VM.",
    )
    provides_network = Property[bool](
        "provides_network", type=bool, default=False, doc="May be others' netvm."
    )
    netvm = VMProperty[Any](
        "netvm",
        check=_check_netvm,
        default=_default_netvm,
        doc="The VM that connects this one to the network; None for no network at all.",
    )
    ip = Property[Any](
        "ip",
        type=IPv4Address,
        default=lambda vm: ipv4_of(vm) if vm.is_networked() else None,
        clone=False,
        doc="Its IPv4 address.",
    )
    ip6 = Property[Any](
        "ip6",
        type=IPv6Address,
        default=lambda vm: vm._default_ip6(),  # noqa: SLF001 - of this very class
        clone=False,
        doc="Its IPv6 address, where the feature ipv6 is set; nothing speaks it yet.",
    )

    @stateless_property
    def visible_ip(self: NetMixin) -> IPv4Address | None:
        """IPv4 address that the guest is told, by the feature net.fake-ip."""
        return self._fake("net.fake-ip") or self.ip

    @stateless_property
    def visible_gateway(self: NetMixin) -> IPv4Address | None:
        """Gateway that the guest is told, by the feature net.fake-gateway."""
        if self.netvm is None:
            return None
        return self._fake("net.fake-gateway") or self.netvm.gateway

    @stateless_property
    def visible_netmask(self: NetMixin) -> IPv4Address | None:
        """Netmask that the guest is told, by the feature net.fake-netmask."""
        return self._fake("net.fake-netmask") or self.netmask

    @stateless_property
    def visible_ip6(self: NetMixin) -> IPv6Address | None:
        """IPv6 address that the guest is told."""
        address: IPv6Address | None = self.ip6
        return address

    @stateless_property
    def visible_gateway6(self: NetMixin) -> IPv6Address | None:
        """IPv6 gateway that the guest is told."""
        if self.netvm is None:
            return None
        gateway: IPv6Address | None = self.netvm.gateway6
        return gateway

    @stateless_property
    def gateway(self: NetMixin) -> IPv4Address | None:
        """Gateway of its clients; None when it has none."""
        return self.visible_ip if self.provides_network else None

    @stateless_property
    def gateway6(self: NetMixin) -> IPv6Address | None:
        """IPv6 gateway of its clients."""
        return self.visible_ip6 if self.provides_network else None

    @stateless_property
    def netmask(self: NetMixin) -> IPv4Address | None:
        """Netmask of its address."""
        return NETMASK if self.is_networked() else None

    @stateless_property
    def dns(self: NetMixin) -> _Addresses | None:
        """Its name servers."""
        return _Addresses(DNS) if self.is_networked() else None

    def is_networked(self) -> bool:
        """Tell whether it can have an address: it has a net VM, or is one."""
        return self.provides_network or self.netvm is not None

    @property
    def connected_vms(self) -> list[Any]:
        """The VMs that have this one as net VM, whether they run or not."""
        return [vm for vm in self.app.domains if getattr(vm, "netvm", None) is self]

    def _default_ip6(self) -> IPv6Address | None:
        if self.is_networked() and self.features.check_with_netvm("ipv6", None):
            return ipv6_of(self)
        return None

    def _fake(self, feature: str) -> IPv4Address | None:
        value = self.features.get(feature)
        return IPv4Address(value) if value else None

    def network_entries(self) -> dict[str, str]:
        """Return what the guest finds about its network in qubesdb."""
        entries: dict[str, Any] = {}
        if self.provides_network:
            entries |= {
                "/qubes-netvm-network": self.gateway,
                "/qubes-netvm-gateway": self.gateway,
                "/qubes-netvm-gateway6": self.gateway6,
                "/qubes-netvm-netmask": self.netmask,
                "/qubes-netvm-primary-dns": DNS[0],
                "/qubes-netvm-secondary-dns": DNS[1],
            }
        if self.netvm is not None:
            entries |= {
                "/qubes-mac": self.mac,
                "/qubes-ip": self.visible_ip,
                "/qubes-netmask": self.visible_netmask,
                "/qubes-gateway": self.visible_gateway,
                "/qubes-primary-dns": DNS[0],
                "/qubes-secondary-dns": DNS[1],
                "/qubes-ip6": self.visible_ip6,
                "/qubes-gateway6": self.visible_gateway6,
            }
        return {path: str(value) for path, value in entries.items() if value}

    @handler("domain-feature-pre-set:net.*")
    def on_net_feature_pre_set(
        self, _event: str, feature: str, value: str, **_kwargs: Any
    ) -> None:
        """Refuse an address that is none."""
        if feature in _FAKE and value:
            try:
                _FAKE[feature](value)
            except ValueError as error:
                raise QubesValueError(
                    f"feature {feature!r} of {self} cannot be {value!r}: {error}"
                ) from error

    @handler("property-set:ip", "property-reset:ip")
    def on_ip_set(
        self, _event: str, newvalue: Any = None, oldvalue: Any = None, **_kwargs: Any
    ) -> None:
        """Tell what has changed with it."""
        if newvalue != oldvalue:
            self._announce_addresses("")

    @handler("property-set:ip6", "property-reset:ip6")
    def on_ip6_set(
        self, _event: str, newvalue: Any = None, oldvalue: Any = None, **_kwargs: Any
    ) -> None:
        """Tell what has changed with it."""
        if newvalue != oldvalue:
            self._announce_addresses("6")

    def _announce_addresses(self, version: str) -> None:
        if self.provides_network:
            self._tell_reset(f"gateway{version}")
        self._tell_reset(f"visible_ip{version}")
        for vm in self.connected_vms:
            vm._tell_reset(f"visible_gateway{version}")  # noqa: SLF001 - of this class

    def _tell_reset(self, name: str) -> None:
        self.fire_event(f"property-reset:{name}", name=name)

    @handler("property-set:provides_network", "property-reset:provides_network")
    def on_provides_network_set(self, event: str, **kwargs: Any) -> None:
        """Mark a net VM as one that serves others, and tell its new addresses."""
        if self.provides_network:
            self.features["servicevm"] = "1"
        elif "servicevm" in self.features:
            del self.features["servicevm"]
        changed = kwargs.get("newvalue") != kwargs.get("oldvalue")
        if event.startswith("property-set:") and changed:
            self._tell_reset("gateway")
            self._tell_reset("gateway6")

    @handler("property-pre-set:netvm")
    def on_netvm_pre_set(self, _event: str, newvalue: Any, **_kwargs: Any) -> None:
        """Refuse a net VM that does not run, if this one does."""
        self.require_running(newvalue)

    @handler("property-pre-reset:netvm")
    def on_netvm_pre_reset(self, _event: str, **_kwargs: Any) -> None:
        """Refuse likewise."""
        self.require_running(self.property_get_default("netvm"))

    def require_running(self, netvm: Any) -> None:
        """Raise QubesVMNotStartedError if it runs, and this net VM for it does not."""
        # of classes above, which have a life cycle
        this: Any = self
        if netvm is not None and not this.is_halted() and not netvm.is_running():
            raise QubesVMNotStartedError(
                netvm,
                f"VM {self} runs, and cannot be attached to VM {netvm}, which does not:"
                " start that first",
            )

    @handler("property-pre-set:provides_network", "property-pre-reset:provides_network")
    def on_provides_network_pre_set(
        self,
        _event: str,
        newvalue: bool = False,  # noqa: FBT001, FBT002 - of any property
        **_kwargs: Any,
    ) -> None:
        """Refuse to stop as long as VMs have this one as net VM, or new ones would."""
        if newvalue:
            return
        if clients := self.connected_vms:
            raise QubesVMInUseError(
                self,
                f"VM {self} is the net VM of {', '.join(map(str, clients))};"
                " set their netvm first",
            )
        if uses := {"default_netvm", "default_fw_netvm"} & {
            *self.app.property_uses(self)
        }:
            raise QubesVMInUseError(
                self,
                f"VM {self} is the app's {' and '.join(sorted(uses))};"
                " set another one first",
            )
