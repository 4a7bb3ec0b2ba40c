"""Methods on VMs as a whole: list, create, remove."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.admin.dispatch import Call, Destination, method, save
from qubes_itests.admin.validation import pairs, printable
from qubes_itests.core.app import VM_CLASSES
from qubes_itests.core.exc import (
    ProtocolError,
    QubesValueError,
    QubesVMInUseError,
    QubesVMNotFoundError,
    QubesVMNotHaltedError,
)
from qubes_itests.core.vm.adminvm import AdminVM
from qubes_itests.core.vm.base import validate_name
from qubes_itests.core.vm.dispvm import DispVM

if TYPE_CHECKING:
    from qubes_itests.core.labels import Label
    from qubes_itests.core.vm.base import BaseVM

__all__: list[str] = []

log = logging.getLogger("qubes.admin")

_CREATE: Final = "admin.vm.Create."
_IN_POOL: Final = "admin.vm.CreateInPool."
#: Not of Qubes OS, like the other methods on volumes without a VM, those of pools.
_ADOPT: Final = "admin.vm.Adopt."
#: The classes whose VMs keep volumes.
_ADOPTERS: Final = ("AppVM", "StandaloneVM", "TemplateVM")
_VOLUMES: Final = ("root", "private", "volatile", "kernel")


@method("admin.vmclass.List", destination=Destination.DOM0)
def list_classes(call: Call) -> str:
    """Return the names of the classes of VMs, one a line."""
    return "".join(f"{name}\n" for name in call.permitted(["AdminVM", *VM_CLASSES]))


@method("admin.vm.List")
def list_vms(call: Call) -> str:
    """Return each VM's name, class, state and UUID; on a VM, of that one."""
    is_dom0 = isinstance(call.destination, AdminVM)
    vms = sorted(call.app.domains) if is_dom0 else [call.destination]
    return "".join(
        f"{vm.name} class={vm.klass} state={vm.get_power_state()} uuid={vm.uuid}\n"
        for vm in call.permitted(vms)
    )


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What the payload of a creation asks for."""

    name: str
    label: Label
    pool: str | None = None
    pools: dict[str, str] = field(default_factory=dict)


def _wanted(call: Call, data: bytes) -> _Wanted:
    given = pairs(printable(call, data).split(" "))
    if not {"name", "label"} <= set(given):
        raise ProtocolError("expected name= and label= in the payload")
    name = validate_name(None, None, given.pop("name"))
    if name in call.app.domains:
        raise QubesValueError(f"there is a VM {name!r} already")
    label = given.pop("label")
    if label.isdigit():
        raise ProtocolError(f"expected the name of a label, got {label!r}")
    in_pool = call.method.startswith((_IN_POOL, _ADOPT))
    allowed = {"pool", *(f"pool:{name}" for name in _VOLUMES)} if in_pool else set()
    if unknown := sorted(set(given) - allowed):
        raise ProtocolError(f"the payload takes no {', '.join(unknown)}")
    for pool in given.values():
        call.app.get_pool(pool)
    common = given.pop("pool", None)
    if common is not None and given:
        raise ProtocolError("expected either pool= or pool:VOLUME=, got both")
    pools = {key.removeprefix("pool:"): pool for key, pool in given.items()}
    return _Wanted(name, call.app.get_label(label), common, pools)


def _template(call: Call) -> BaseVM | None:
    cls = VM_CLASSES[call.method.rpartition(".")[2]]
    if not call.raw_argument:
        return None
    if "template" not in {prop.name for prop in cls.property_list()}:
        raise QubesValueError(f"a {cls.__name__} has no template")
    if call.raw_argument not in call.app.domains:
        raise QubesVMNotFoundError(call.raw_argument)
    return call.app.domains[call.raw_argument]


@method(
    *(prefix + name for prefix in (_CREATE, _IN_POOL) for name in VM_CLASSES),
    *(_ADOPT + name for name in _ADOPTERS),
    destination=Destination.DOM0,
    argument=_template,
    payload=_wanted,
)
async def create(call: Call) -> None:
    """Make a VM, with its volumes; to adopt takes over those that no VM has."""
    wanted: _Wanted = call.payload
    properties: dict[str, Any] = {"name": wanted.name, "label": wanted.label}
    if call.argument is not None:
        properties["template"] = call.argument
    elif call.method.endswith(".DispVM"):
        properties["template"] = call.app.dispvm_template(call.source)
    call.permit(pool=wanted.pool, pools=wanted.pools, **properties)
    await call.app.create_vm(
        call.method.rpartition(".")[2],
        pool=wanted.pool,
        pools=wanted.pools,
        adopt=call.method.startswith(_ADOPT),
        tags=[f"created-by-{call.source.name}"],
        **properties,
    )


def _uuid_wanted(call: Call, data: bytes) -> bool:
    del call
    if data not in (b"", b"uuid"):
        raise ProtocolError(f"expected an empty payload or uuid, got {data[:40]!r}")
    return data == b"uuid"


@method("admin.vm.CreateDisposable", payload=_uuid_wanted)
async def create_disposable(call: Call) -> str:
    """Make a disposable VM from the destination; from dom0's default on dom0."""
    is_dom0 = isinstance(call.destination, AdminVM)
    default = call.app.dispvm_template
    template = default(call.source) if is_dom0 else call.destination
    call.permit(dispvm_template=template)
    vm = await DispVM.from_appvm(template)
    for tag in ("created-by", "disp-created-by"):
        vm.tags.add(f"{tag}-{call.source.name}")
    return f"uuid:{vm.uuid}" if call.payload else str(vm.name)


@method("admin.vm.Remove")
async def remove(call: Call) -> None:
    """Remove a halted VM and its volumes."""
    call.permit()
    vm = call.destination
    if isinstance(vm, AdminVM):
        raise QubesVMInUseError(vm, "dom0 cannot be removed")
    if not vm.is_halted():
        raise QubesVMNotHaltedError(vm)
    try:
        await call.app.domains.remove(vm)
    finally:
        # it may be gone although not all of its volumes are
        if vm not in call.app.domains:
            await save(call.app)
