"""Clone a VM: its settings, its devices, its disks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from qubes_itests.core.exc import QubesVMError
from qubes_itests.core.vm.adminvm import AdminVM
from qubes_itests.core.vm.making import making

if TYPE_CHECKING:
    from qubes_itests.core.app import Qubes
    from qubes_itests.core.vm.qubesvm import QubesVM

__all__ = ["clone_vm"]

#: Tags that tell where a VM comes from: the copy comes from elsewhere.
_OF_ORIGIN: Final = "created-by-"


async def clone_vm(
    app: Qubes,
    source: QubesVM,
    name: str,
    *,
    cls: str | type[QubesVM] | None = None,
    pool: str | None = None,
    **properties: Any,
) -> QubesVM:
    """Make a VM as a copy of another one, which must be halted.

    It has the other's properties, features, tags, assigned devices, firewall rules,
    notes and volumes.

    :param source: the VM to copy.
    :param name: of the copy.
    :param cls: its class, by default that of `source`.
    :param pool: for its volumes but snapshots; by default those of `source`.
    :param properties: others than `source` has.
    :return: the copy.
    :raise QubesVMError: for dom0.
    :raise VolumeExistsError: when one of its volumes is there already.
    """
    if isinstance(source, AdminVM):
        raise QubesVMError(source, f"{source} cannot be cloned: there is one only")
    # what stands for a VM is of another class
    own: type[Any] = type(app.domains[source])
    vm_class = own if cls is None else app.get_vm_class(cls)
    has_template = "template" in {prop.name for prop in vm_class.property_list()}
    if has_template and source.template_or_none is not None:
        properties.setdefault("template", source.template_or_none)
    vm = app.add_new_vm(vm_class, name=name, label=source.label, **properties)
    async with making(vm):
        both = {p.name for p in vm.property_list() if p.clone}
        both &= {p.name for p in source.property_list()}
        others = both - properties.keys() - {"label", "template"}
        vm.clone_properties(source, sorted(others))
        vm.features.update(source.features)
        vm.tags.update(t for t in source.tags if _OF_ORIGIN not in t)
        vm.firewall.rules = source.firewall.rules
        vm.notes = source.notes
        for devclass, devices in list(source.devices.items()):
            for assignment in devices.get_assigned_devices():
                await vm.devices[devclass].assign(assignment)
        await vm.clone_disk_files(source, pool=pool)
    return vm
