"""Boot modes: kernel options, and a user, that a template offers by names.

A template, or a standalone VM, says what there is in its features:
``boot-mode.kernelopts.MODE`` are the options, ``boot-mode.default-user.MODE`` is who
runs commands then, ``boot-mode.active`` which one it has itself,
``boot-mode.appvm-default`` and ``boot-mode.standalone-default`` which one others have
that are made from it.
"""

from __future__ import annotations

from typing import Any, Final

from qubes_itests.core.events import handler
from qubes_itests.core.properties import Property
from qubes_itests.core.vm.base import BaseVM

__all__ = ["BootModeMixin", "OfferedBootModeMixin"]

#: The mode without options of its own.
DEFAULT: Final = "default"


def _options(vm: BaseVM, mode: str) -> str | None:
    """Return the options of a mode; None when there is no such mode."""
    if mode == DEFAULT:
        return ""
    options: str | None = vm.features.check_with_template(
        f"boot-mode.kernelopts.{mode}", None
    )
    return options


def _default_mode(vm: Any) -> str:
    offered = vm.features.get("boot-mode.active")
    if offered is not None and _options(vm, offered) is not None:
        return str(offered)
    while (template := getattr(vm, "template", None)) is not None:
        if isinstance(template, OfferedBootModeMixin):
            offered = template.appvm_default_bootmode
            if _options(vm, offered) is not None:
                return offered
        vm = template
    return DEFAULT


class BootModeMixin(BaseVM):
    """The boot mode of a VM that has a domain."""

    bootmode = Property[str](
        "bootmode",
        type=str,
        load_stage=4,
        default=_default_mode,
        doc="Name of its boot mode; one that there is not stands for the default one.",
    )

    @property
    def bootmode_kernelopts(self) -> str:
        """What its boot mode adds to the kernel's command line."""
        options = _options(self, self.bootmode)
        return _options(self, _default_mode(self)) or "" if options is None else options

    def get_default_user(self) -> str:
        """Return who runs commands: as its boot mode says, else its `default_user`."""
        user: str = self.features.check_with_template(
            f"boot-mode.default-user.{self.bootmode}",
            self.default_user,  # type: ignore[attr-defined]
        )
        return user

    @handler("domain-feature-set:boot-mode.active")
    def on_active_set(self, _event: str, **_kwargs: Any) -> None:
        """Tell that this changes the property."""
        if self.property_is_default("bootmode"):
            self.fire_event("property-reset:bootmode", name="bootmode")


class OfferedBootModeMixin(BaseVM):
    """What a template says of the boot modes of the VMs that start from it."""

    appvm_default_bootmode = Property[str](
        "appvm_default_bootmode",
        type=str,
        load_stage=4,
        default=lambda vm: vm.features.get("boot-mode.appvm-default", DEFAULT),
        doc="Name of the boot mode of VMs that start from it and set none.",
    )

    @handler(
        "domain-feature-set:boot-mode.appvm-default",
        "property-set:appvm_default_bootmode",
        "property-reset:appvm_default_bootmode",
    )
    def on_offered_set(self, _event: str, **_kwargs: Any) -> None:
        """Tell the VMs whose boot mode this changes."""
        for vm in self.app.domains:
            if getattr(vm, "template", None) is self and vm.property_is_default(
                "bootmode"
            ):
                vm.fire_event("property-reset:bootmode", name="bootmode")
