"""DispVM: a VM that starts from an AppVM as that is, and is gone when it stops."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

from qubes_itests.core import config
from qubes_itests.core.events import handler
from qubes_itests.core.exc import (
    QubesException,
    QubesNoTemplateError,
    QubesVMNotHaltedError,
    QubesVMNotStartedError,
)
from qubes_itests.core.properties import Property, VMProperty
from qubes_itests.core.vm.appvm import AppVM
from qubes_itests.core.vm.base import DISPOSABLE, BaseVM
from qubes_itests.core.vm.qubesvm import QubesVM
from qubes_itests.core.vm.settings import check_for_dispvms
from qubes_itests.core.volume_content import kept_by

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qubes_itests.core.app import Qubes

__all__ = ["DispVM"]

#: What a DispVM does not take over from its template.
_ITS_OWN: Final = {"template", "autostart"}


def _check_template(vm: DispVM, template: AppVM) -> None:
    check_for_dispvms(vm, template)
    if not vm.is_halted():
        raise QubesVMNotHaltedError(vm)


class DispVM(QubesVM):
    """A disposable VM: snapshots of all that its template keeps, and none is kept.

    It has the properties that are set in its template, its features, tags and firewall
    rules. With `auto_cleanup` it is removed when it stops, and when it does not start.

    :param app: the app that it belongs to.
    :param properties: `template` is one of them; `name` is ``dispNNNN`` by default.
    :raise QubesNoTemplateError: without a template.
    """

    own_names = DISPOSABLE

    template: VMProperty[AppVM] = VMProperty(
        "template",
        klass=AppVM,
        allow_none=False,
        check=_check_template,
        doc="The AppVM that it starts from.",
    )
    dispid: Property[int] = Property(
        "dispid",
        type=int,
        write_once=True,
        clone=False,
        doc="The number in its name, unless it was given another name.",
    )
    auto_cleanup: Property[bool] = Property(
        "auto_cleanup",
        type=bool,
        default=False,
        doc="Remove it when it has stopped.",
    )
    include_in_backups: Property[bool] = Property(
        "include_in_backups",
        type=bool,
        default=lambda vm: not vm.auto_cleanup,
        doc="Have it in backups.",
    )
    default_dispvm: VMProperty[AppVM | None] = VMProperty(
        "default_dispvm",
        check=check_for_dispvms,
        default=lambda vm: vm.template,
        doc="What its disposable VMs are made from.",
    )

    volume_config: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "root": {"snap_on_start": True, "save_on_stop": False, "rw": True},
        "private": {"snap_on_start": True, "save_on_stop": False, "rw": True},
        "volatile": AppVM.volume_config["volatile"],
    }

    def __init__(self, app: Qubes, **properties: Any) -> None:
        if not app.loading:
            if properties.get("template") is None:
                raise QubesNoTemplateError(None, "a DispVM needs a template")
            if "dispid" not in properties:
                properties["dispid"] = app.domains.get_new_unused_dispid()
            name = f"{config.dispvm_prefix}{properties['dispid']}"
            properties = {"name": name, **properties}
        super().__init__(app, **properties)
        if app.loading:
            return
        template = self.template
        mine = {p.name for p in self.property_list() if self.property_is_default(p)}
        taken = {p.name for p in template.property_list() if p.clone} & mine
        self.clone_properties(template, sorted(taken - _ITS_OWN))
        self.features.update(template.features)
        self.tags.update(template.tags)
        self.firewall.rules = template.firewall.rules

    @property
    def template_or_none(self) -> AppVM | None:
        """Its template; None as long as an app that is loaded has not set it."""
        return DispVM.template.get_set(self)

    @property
    def disposable_number(self) -> int | None:
        """Its `dispid`; None as long as an app that is loaded has not set it."""
        return DispVM.dispid.get_set(self)

    def volume_settings(self) -> dict[str, dict[str, Any]]:
        """Return the settings of its volumes, by their names."""
        settings = super().volume_settings()
        for name, volume in self.template.volumes.items():
            shared = {"pool": str(volume.pool), "rw": volume.rw, "size": volume.size}
            snapshot = volume.snap_on_start or volume.save_on_stop
            flags = {"snap_on_start": snapshot, "save_on_stop": False}
            source = {"source": kept_by(volume)} if snapshot else {}
            settings[name] = {**settings.get(name, {}), **shared, **flags, **source}
        return settings

    @property
    def persistence(self) -> str:
        """What it keeps, as its guest is told: nothing."""
        return "none"

    @handler("property-set:template")
    def on_template_set(self, _event: str, **_kwargs: Any) -> None:
        """Have the volumes start from the new template."""
        self.rebase_storage()

    @classmethod
    async def from_appvm(cls, appvm: BaseVM | None, **properties: Any) -> Self:
        """Make one that is removed when it stops, with its volumes; it is not started.

        :param appvm: its template.
        :param properties: others than its template has.
        :raise QubesException: when `appvm` has not `template_for_dispvms` set.
        """
        if appvm is None or not appvm.makes_disposables:
            raise QubesException(
                f"{appvm} is no template for disposable VMs: set its property"
                " template_for_dispvms, or name another VM"
            )
        properties.setdefault("auto_cleanup", True)
        return await appvm.app.create_vm(cls, template=appvm, **properties)

    def check_startable(self) -> None:
        """Raise when it must not be started, or its template no more is one."""
        super().check_startable()
        if not self.template.template_for_dispvms:
            raise QubesException(
                f"{self.template}, which {self} is made from, has not"
                " template_for_dispvms set any more"
            )

    async def start_failed(self) -> None:
        """Remove it, if it is to be removed when it stops."""
        if self.auto_cleanup:
            try:
                await self._remove()
            except Exception as error:  # noqa: BLE001 - the start's own is told
                self.note_problem(error)

    @handler("domain-shutdown")
    async def on_domain_shutdown(self, _event: str, **_kwargs: Any) -> None:
        """Remove it, if it is to be removed when it stops."""
        if self.auto_cleanup:
            await self._remove()

    async def cleanup(self) -> None:
        """Kill it if it runs, and remove it; no error when it is gone already."""
        with contextlib.suppress(QubesVMNotStartedError):
            await self.kill()
        await self.wait_ended(self.shutdown_timeout)
        await self._remove()

    async def _remove(self) -> None:
        if self in self.app.domains:
            await self.app.domains.remove(self)
            await self.app.save_async()
