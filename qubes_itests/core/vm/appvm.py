"""AppVM: a VM that starts from its template's root filesystem, and forgets its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from qubes_itests.core import config
from qubes_itests.core.events import handler
from qubes_itests.core.exc import (
    QubesNoTemplateError,
    QubesVMInUseError,
    QubesVMNotHaltedError,
)
from qubes_itests.core.properties import Property, VMProperty
from qubes_itests.core.vm.qubesvm import QubesVM
from qubes_itests.core.vm.templatevm import TemplateVM

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qubes_itests.core.app import Qubes
    from qubes_itests.core.vm.dispvm import DispVM

__all__ = ["AppVM"]


def _check_halted(vm: AppVM, _template: object) -> None:
    if not vm.is_halted():
        raise QubesVMNotHaltedError(vm)


class AppVM(QubesVM):
    """A VM whose root is a snapshot of its template's, new at each start."""

    template: VMProperty[TemplateVM] = VMProperty(
        "template",
        klass=TemplateVM,
        allow_none=False,
        check=_check_halted,
        doc="The VM whose root it starts from.",
    )

    template_for_dispvms: Property[bool] = Property(
        "template_for_dispvms",
        type=bool,
        default=False,
        doc="May be what disposable VMs are made from.",
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

    def __init__(self, app: Qubes, **properties: Any) -> None:
        if properties.get("template") is None and not app.loading:
            raise QubesNoTemplateError(
                None, f"VM {properties.get('name')} needs a template"
            )
        super().__init__(app, **properties)

    @property
    def template_or_none(self) -> TemplateVM | None:
        """Its template; None as long as an app that is loaded has not set it."""
        return AppVM.template.get_set(self)

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

    # as a template of disposable VMs

    @property
    def makes_disposables(self) -> bool:
        """Whether it may be a DispVM's template."""
        return self.template_for_dispvms

    @property
    def dispvms(self) -> list[DispVM]:
        """The disposable VMs that are made from this one."""
        return [
            vm for vm in self.app.domains.disposables() if vm.template_or_none is self
        ]

    @property
    def derived_vms(self) -> Sequence[DispVM]:
        """The disposable VMs that are made from this one."""
        return self.dispvms if self.template_for_dispvms else ()

    @handler("property-pre-set:template_for_dispvms")
    def on_pre_set_dispvms(
        self, _event: str, *, newvalue: object, **_kwargs: Any
    ) -> None:
        """Refuse to be no template any more while disposable VMs need it, or would."""
        if newvalue:
            return
        if self.dispvms:
            names = ", ".join(vm.name for vm in self.dispvms)
            raise QubesVMInUseError(
                self,
                f"{self} has to keep template_for_dispvms: {names} are made from it;"
                " remove these first",
            )
        holders = (*self.app.domains, self.app)
        if users := [h for h in holders if "default_dispvm" in h.property_uses(self)]:
            raise QubesVMInUseError(
                self,
                f"{self} has to keep template_for_dispvms: it is the default_dispvm of"
                f" {', '.join(map(str, users))}; change that first",
            )

    @handler("property-pre-reset:template_for_dispvms")
    def on_pre_reset_dispvms(self, event: str, **_kwargs: Any) -> None:
        """Refuse likewise."""
        self.on_pre_set_dispvms(event, newvalue=False)

    @handler("property-pre-set:template")
    def on_pre_set_template(self, _event: str, **_kwargs: Any) -> None:
        """Refuse while disposable VMs run on the present one."""
        for vm in self.dispvms:
            if not vm.is_halted():
                raise QubesVMNotHaltedError(vm)
