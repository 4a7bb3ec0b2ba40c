"""Methods on the devices of VMs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from qubes_itests.admin.dispatch import Call, Destination, method
from qubes_itests.core.device.assignment import AssignmentMode, DeviceAssignment
from qubes_itests.core.device.collections import DEVICE_CLASSES
from qubes_itests.core.device.port import VirtualDevice
from qubes_itests.core.exc import ProtocolError, QubesValueError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from qubes_itests.core.device.collections import DeviceCollection

__all__: list[str] = []

_MODES: Final = {
    mode.value.encode(): mode
    for mode in AssignmentMode
    if mode is not AssignmentMode.MANUAL
}


@method("admin.deviceclass.List", destination=Destination.DOM0)
def list_classes(call: Call) -> str:
    """Return the classes of devices, one a line."""
    return "".join(f"{name}\n" for name in call.permitted(DEVICE_CLASSES))


def _names(what: str) -> tuple[str, ...]:
    return tuple(f"admin.vm.device.{name}.{what}" for name in DEVICE_CLASSES)


def _class(call: Call) -> str:
    return call.method.removeprefix("admin.vm.device.").partition(".")[0]


def _devices(call: Call) -> DeviceCollection:
    found: DeviceCollection = call.destination.devices[_class(call)]
    return found


def _device(call: Call) -> VirtualDevice:
    try:
        return VirtualDevice.from_qarg(
            call.raw_argument, _class(call), call.app.domains
        )
    except QubesValueError as error:
        raise ProtocolError(str(error)) from None


def _one_or_all(call: Call) -> VirtualDevice | None:
    return _device(call) if call.raw_argument else None


def _lines(items: Iterable[Any], key: Callable[[Any], str]) -> str:
    texts = {key(item): item.serialize().decode() for item in items}
    return "".join(f"{name} {texts[name]}\n" for name in sorted(texts))


@method(*_names("Available"), argument=lambda call: call.raw_argument)
def available(call: Call) -> str:
    """Return the devices that it exposes, or the one at a port."""
    exposed = [
        device for device in _devices(call) if call.argument in ("", device.port_id)
    ]
    permitted = call.permitted(exposed, devclass=_class(call))
    return _lines(permitted, lambda device: f"{device.port_id}:{device.device_id}")


def _assignments(call: Call, found: Iterable[DeviceAssignment]) -> str:
    chosen = [
        each for each in found if call.argument is None or each.matches(call.argument)
    ]
    return _lines(call.permitted(chosen, devclass=_class(call)), repr)


@method(*_names("Assigned"), argument=_one_or_all)
def assigned(call: Call) -> str:
    """Return the devices that it is to have, or the one named."""
    return _assignments(call, _devices(call).get_assigned_devices())


@method(*_names("Attached"), argument=_one_or_all)
def attached(call: Call) -> str:
    """Return the devices that it has, or the one named."""
    return _assignments(call, _devices(call).get_attached_devices())


def _assignment(call: Call, data: bytes) -> DeviceAssignment:
    assignment = DeviceAssignment.deserialize(data, expected_device=call.argument)
    if assignment.frontend_domain not in (None, call.destination):
        raise ProtocolError(f"the payload is for {assignment.frontend_domain}")
    return assignment.clone(frontend_domain=call.destination)


def _permit_assignment(call: Call) -> None:
    call.permit(
        device=call.argument,
        mode=call.payload.mode.value,
        options=call.payload.options,
    )


@method(
    *_names("Assign"),
    destination=Destination.VM,
    argument=_device,
    payload=_assignment,
    saves=True,
)
async def assign(call: Call) -> None:
    """Have it get a device at each of its starts."""
    _permit_assignment(call)
    await _devices(call).assign(call.payload)


@method(*_names("Unassign"), destination=Destination.VM, argument=_device, saves=True)
async def unassign(call: Call) -> None:
    """Undo that."""
    call.permit(device=call.argument)
    await _devices(call).unassign(DeviceAssignment(call.argument))


@method(
    *_names("Attach"),
    destination=Destination.VM,
    argument=_device,
    payload=_assignment,
)
async def attach(call: Call) -> None:
    """Give it a device now."""
    _permit_assignment(call)
    await _devices(call).attach(call.payload)


@method(*_names("Detach"), destination=Destination.VM, argument=_device)
async def detach(call: Call) -> None:
    """Take a device from it."""
    call.permit(device=call.argument)
    await _devices(call).detach(DeviceAssignment(call.argument))


def _mode(call: Call, data: bytes) -> AssignmentMode:
    del call
    if data not in _MODES:
        known = ", ".join(mode.decode() for mode in _MODES)
        raise ProtocolError(f"expected one of {known}, got {data[:40]!r}")
    return _MODES[data]


@method(
    *_names("Set.assignment"),
    destination=Destination.VM,
    argument=_device,
    payload=_mode,
    saves=True,
)
async def set_assignment(call: Call) -> None:
    """Set what happens to an assigned device at its start."""
    call.permit(device=call.argument, mode=call.payload)
    await _devices(call).update_assignment(call.argument, call.payload)
