"""TemplateVM: the VM whose root filesystem others start from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from qubes_itests.core import config
from qubes_itests.core.events import handler
from qubes_itests.core.properties import Property
from qubes_itests.core.vm import bootmode
from qubes_itests.core.vm.qubesvm import QubesVM

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["TemplateVM"]


class TemplateVM(QubesVM):
    """A VM whose root filesystem others start from."""

    appvm_default_bootmode: Property[str] = Property(
        "appvm_default_bootmode",
        type=str,
        load_stage=4,
        default=lambda vm: vm.features.get("boot-mode.appvm-default", bootmode.DEFAULT),
        doc="Name of the boot mode of VMs that start from it and set none.",
    )

    volume_config: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "root": {
            "snap_on_start": False,
            "save_on_stop": True,
            "rw": True,
            "source": None,
            "size": config.defaults["root_img_size"],
        },
        "private": {
            "snap_on_start": False,
            "save_on_stop": True,
            "rw": True,
            "source": None,
            "size": config.defaults["private_img_size"],
        },
        "volatile": {
            "snap_on_start": False,
            "save_on_stop": False,
            "rw": True,
            "source": None,
            "size": config.defaults["volatile_img_size"],
        },
    }

    @property
    def dir_path_prefix(self) -> str:
        """The folder of a pool in which templates have theirs."""
        return "vm-templates"

    @property
    def appvms(self) -> list[QubesVM]:
        """The VMs that start from this one."""
        return [
            vm for vm in self.app.domains.startable() if vm.template_or_none is self
        ]

    @property
    def derived_vms(self) -> Sequence[QubesVM]:
        """The VMs that start from this one."""
        return self.appvms

    @property
    def offered_bootmode(self) -> str | None:
        """Name of the boot mode that VMs which start from it have by default."""
        return self.appvm_default_bootmode

    @handler(
        "domain-feature-set:boot-mode.appvm-default",
        "property-set:appvm_default_bootmode",
        "property-reset:appvm_default_bootmode",
    )
    def on_offered_set(self, _event: str, **_kwargs: Any) -> None:
        """Tell the VMs whose boot mode this changes."""
        for vm in self.appvms:
            if vm.property_is_default("bootmode"):
                vm.fire_event("property-reset:bootmode", name="bootmode")
