"""TemplateVM: the VM whose root filesystem others start from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from qubes_itests.core import config
from qubes_itests.core.vm.bootmode import OfferedBootModeMixin
from qubes_itests.core.vm.qubesvm import QubesVM

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["TemplateVM"]


class TemplateVM(OfferedBootModeMixin, QubesVM):
    """A VM whose root filesystem others start from."""

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
        return [vm for vm in self.app.domains if getattr(vm, "template", None) == self]
