"""AppVM: a VM that starts from its template's root filesystem, and forgets its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from qubes_itests.core import config
from qubes_itests.core.events import handler
from qubes_itests.core.exc import QubesNoTemplateError, QubesVMNotHaltedError
from qubes_itests.core.properties import VMProperty
from qubes_itests.core.vm.dvmtemplate import DVMTemplateMixin
from qubes_itests.core.vm.qubesvm import QubesVM
from qubes_itests.core.vm.templatevm import TemplateVM

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["AppVM"]


def _check_halted(vm: Any, _template: object) -> None:
    if not vm.is_halted():
        raise QubesVMNotHaltedError(vm)


class AppVM(DVMTemplateMixin, QubesVM):
    """A VM whose root is a snapshot of its template's, new at each start."""

    template = VMProperty[TemplateVM](
        "template",
        klass="TemplateVM",
        allow_none=False,
        check=_check_halted,
        doc="The VM whose root it starts from.",
    )

    volume_config: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "root": {"snap_on_start": True, "save_on_stop": False, "rw": True},
        "private": {
            "snap_on_start": False,
            "save_on_stop": True,
            "rw": True,
            "source": None,
            "size": config.defaults["private_img_size"],
        },
        "volatile": TemplateVM.volume_config["volatile"],
    }

    def __init__(self, app: Any, **properties: Any) -> None:
        if properties.get("template") is None and not app.loading:
            raise QubesNoTemplateError(
                None, f"VM {properties.get('name')} needs a template"
            )
        super().__init__(app, **properties)

    def volume_settings(self) -> dict[str, dict[str, Any]]:
        """Return the settings of its volumes, by their names."""
        settings = super().volume_settings()
        source = self.template.volumes["root"]
        settings["root"] |= {
            "source": source,
            "size": source.size,
            "pool": str(source.pool),
        }
        return settings

    @handler("property-set:template")
    def on_template_set(self, _event: str, **_kwargs: Any) -> None:
        """Have what starts from the old template start from the new one."""
        for vm in (self, *self.dispvms):
            vm.rebase_storage()
