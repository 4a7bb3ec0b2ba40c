"""Methods on properties, of VMs and of the app."""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any

from qubes_itests.admin.dispatch import Call, Destination, method, save
from qubes_itests.admin.validation import app_property, vm_property
from qubes_itests.admin.values import escape, parse_value, write_default, write_value
from qubes_itests.core.vm.qubesvm import QubesVM

if TYPE_CHECKING:
    from collections.abc import Callable

    from qubes_itests.core.properties import PropertyHolder

__all__: list[str] = []


def _holder(call: Call) -> PropertyHolder:
    if call.method.startswith("admin.property."):
        return call.app
    holder: PropertyHolder = call.destination
    return holder


def _payload(call: Call, data: bytes) -> Any:
    return parse_value(_holder(call), call.argument, data)


async def _networks_settled(call: Call) -> None:
    """Answer only when running VMs are plugged in where they now belong."""
    own = call.argument.name == "netvm"
    if not own and call.argument.name != "default_netvm":
        return
    vms = call.app.domains if _holder(call) is call.app else [call.destination]
    waits = (
        vm.network_settled()
        for vm in vms
        if isinstance(vm, QubesVM) and (own or vm.property_is_default("netvm"))
    )
    for result in await asyncio.gather(*waits, return_exceptions=True):
        if isinstance(result, BaseException):
            # the property has changed all the same
            await save(call.app)
            raise result


def _property_method(
    name: str, *, named: bool = True, **declared: Any
) -> Callable[[Callable[[Call], Any]], Callable[[Call], Any]]:
    """Make a function two methods: one for VMs, one for the app."""

    def register(function: Callable[[Call], Any]) -> Callable[[Call], Any]:
        for prefix, where, argument in (
            ("admin.vm.property.", Destination.ANY, vm_property),
            ("admin.property.", Destination.DOM0, app_property),
        ):
            method(
                prefix + name,
                destination=where,
                argument=argument if named else None,
                **declared,
            )(function)
        return function

    return register


@_property_method("List", named=False)
def list_properties(call: Call) -> str:
    """Return the names, one a line."""
    permitted = call.permitted(_holder(call).property_list())
    return "".join(f"{prop.name}\n" for prop in permitted)


@_property_method("Get")
def get(call: Call) -> str:
    """Return whether it is the default, the type and the value."""
    call.permit()
    return write_value(_holder(call), call.argument)


@_property_method("GetAll", named=False)
def get_all(call: Call) -> str:
    """Return each name and what `get` says of it, one a line."""
    holder = _holder(call)
    permitted = call.permitted(holder.property_list())
    return "".join(
        f"{prop.name} {escape(write_value(holder, prop))}\n"
        for prop in sorted(permitted, key=lambda prop: prop.name)
    )


@_property_method("GetDefault")
def get_default(call: Call) -> str:
    """Return type and value of the default; nothing if there is none."""
    call.permit()
    return write_default(_holder(call), call.argument)


@_property_method("Set", payload=_payload, saves=True)
async def set_value(call: Call) -> None:
    """Set it."""
    call.permit(newvalue=call.payload)
    setattr(_holder(call), call.argument.name, call.payload)
    await _networks_settled(call)


@_property_method("Reset", saves=True)
async def reset(call: Call) -> None:
    """Set it back to its default."""
    call.permit()
    delattr(_holder(call), call.argument.name)
    await _networks_settled(call)


@_property_method("Help")
@_property_method("HelpRst")
def show_help(call: Call) -> str:
    """Return what it means."""
    call.permit()
    return inspect.cleandoc(call.argument.__doc__ or "")
