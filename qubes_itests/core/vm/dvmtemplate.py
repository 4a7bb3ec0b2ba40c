"""What being a template of disposable VMs asks of a VM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qubes_itests.core.events import handler
from qubes_itests.core.exc import QubesVMInUseError, QubesVMNotHaltedError
from qubes_itests.core.properties import Property

if TYPE_CHECKING:
    from qubes_itests.core.app import Qubes
    from qubes_itests.core.vm.qubesvm import QubesVM

__all__ = ["DVMTemplateMixin"]


class DVMTemplateMixin:
    """Of a VM class whose VMs may have `template_for_dispvms` set."""

    app: Qubes

    template_for_dispvms = Property[bool](
        "template_for_dispvms",
        type=bool,
        default=False,
        doc="May be what disposable VMs are made from.",
    )

    @property
    def dispvms(self) -> list[QubesVM]:
        """The disposable VMs that are made from this one."""
        return [
            vm
            for vm in self.app.domains
            if vm.klass == "DispVM" and vm.template is self
        ]

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
