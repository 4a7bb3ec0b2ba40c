"""StandaloneVM: a VM with a root filesystem of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from qubes_itests.core.vm.qubesvm import QubesVM
from qubes_itests.core.vm.templatevm import TemplateVM

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["StandaloneVM"]


class StandaloneVM(QubesVM):
    """A VM with a root filesystem of its own, often a copy of a template's."""

    volume_config: ClassVar[Mapping[str, Mapping[str, Any]]] = TemplateVM.volume_config
