"""StandaloneVM: a VM with its own root filesystem."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from qubes_itests.core.events import handler
from qubes_itests.core.vm.qubesvm import QubesVM
from qubes_itests.core.vm.templatevm import TemplateVM

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["StandaloneVM"]


class StandaloneVM(QubesVM):
    """A VM with its own root filesystem, often a copy of a template's."""

    volume_config: ClassVar[Mapping[str, Mapping[str, Any]]] = TemplateVM.volume_config

    @handler("domain-import-volume")
    def on_import_volume(self, _event: str, *, name: str, **_kwargs: Any) -> None:
        """Have the boot mode that a new root says standalone VMs have."""
        offered = self.features.get("boot-mode.standalone-default", "")
        known = (
            offered == "default" or f"boot-mode.kernelopts.{offered}" in self.features
        )
        if name == "root" and known:
            self.features["boot-mode.active"] = offered
