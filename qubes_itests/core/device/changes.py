"""Changes of the devices of a VM, as extensions report them.

In Qubes OS it is `qubes.ext.utils`.  An extension keeps in `devices_cache`, by names of
VMs, which ports they expose, and to which VM each is attached.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from qubes_itests.core.device.assignment import AssignmentMode
from qubes_itests.core.device.port import Port, VirtualDevice
from qubes_itests.core.exc import QubesException

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator, Mapping

    from qubes_itests.core.app import Qubes
    from qubes_itests.core.device.assignment import DeviceAssignment
    from qubes_itests.core.device.info import DeviceInfo
    from qubes_itests.core.ext import Extension
    from qubes_itests.core.vm.base import BaseVM

__all__ = [
    "SOCKET_PATH",
    "call_socket_service",
    "compare_device_cache",
    "confirm_device_attachment",
    "detach_attached_devices_on_shutdown",
    "device_list_change",
    "resolve_conflicts_and_attach",
]

log = logging.getLogger("qubes.devices")

#: Where the agent that asks users has its socket in Qubes OS.
SOCKET_PATH = "/var/run/qubes"
_AGENT = "device-agent.GUI"
_ALLOW = "allow:"


def device_list_change(
    ext: Extension,
    current_devices: Mapping[str, BaseVM | None],
    vm: BaseVM,
    path: str | None,
    device_class: type[DeviceInfo],
) -> None:
    """Tell what has changed since the last call; attach what VMs are to have.

    On the event loop: what follows from it happens later.

    :param ext: the extension, which has `devices_cache`, `ensure_detach` and
        `attach_and_notify`.
    :param current_devices: by the names of the ports that the VM exposes now, which VM
        has the device, None for none.
    :param vm: the VM that exposes them.
    :param path: in QubesDB, where the change was seen; None if the VM has ended.
    :param device_class: of the devices; its name is that of their class and ``Device``.
    """
    devclass = _devclass(device_class)

    def device(port_id: str) -> DeviceInfo:
        return device_class(Port(vm, port_id, devclass))

    if path is not None:
        vm.fire_event(f"device-list-change:{devclass}")
    added, attached, detached, removed = compare_device_cache(
        vm, ext.devices_cache, current_devices
    )
    for port_id, frontend in detached.items():
        port = device(port_id).port
        ext.ensure_detach(frontend, port)
        _later(frontend.fire_event_async(f"device-detach:{devclass}", port=port))
    for port_id in removed:
        vm.fire_event(f"device-removed:{devclass}", port=device(port_id).port)
    for port_id in added:
        vm.fire_event(f"device-added:{devclass}", device=device(port_id))
    for port_id, frontend in attached.items():
        # the options are not known: somebody else has attached it
        found = device(port_id)
        _later(
            frontend.fire_event_async(
                f"device-attach:{devclass}", device=found, options={}
            )
        )
    ext.devices_cache[vm.name] = dict(current_devices)
    wanted = _wanted(vm.app, devclass, added - attached.keys())
    _later(resolve_conflicts_and_attach(ext, wanted))


def _devclass(device_class: type[DeviceInfo]) -> str:
    return device_class.__name__.removesuffix("Device").lower()


#: Tasks that nothing waits for: the loop holds tasks weakly, so without a reference
#: one could be collected in the middle of its work.
_tasks: set[asyncio.Future[Any]] = set()


def _later(coroutine: Coroutine[Any, Any, Any]) -> None:
    # by its name in the module, which tests of extensions replace
    task = asyncio.ensure_future(coroutine)
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)


def _wanted(
    app: Qubes, devclass: str, ports: set[str]
) -> dict[str, dict[BaseVM, DeviceAssignment]]:
    """Return for each port the VMs that are to have what has come there, and how."""
    wanted: dict[str, dict[BaseVM, DeviceAssignment]] = {}
    for frontend, assignment in _assignments(app, devclass):
        for device in assignment.devices:
            if device.port_id not in ports or not assignment.matches(device):
                continue
            exact = VirtualDevice(device.port, device.device_id)
            frontends = wanted.setdefault(device.port_id, {})
            # the most specific assignment comes first
            frontends.setdefault(frontend, assignment.clone(device=exact))
    return wanted


def _assignments(
    app: Qubes, devclass: str
) -> Iterator[tuple[BaseVM, DeviceAssignment]]:
    for vm in app.domains:
        if vm.is_running():
            assigned = vm.devices[devclass].get_assigned_devices()
            for assignment in sorted(assigned, reverse=True):
                yield vm, assignment


def detach_attached_devices_on_shutdown(
    ext: Extension, vm: BaseVM, device_class: type[DeviceInfo]
) -> None:
    """Tell that a VM that has ended has lost the devices that other VMs expose.

    :param ext: the extension; its cache says what the VM had.
    :param vm: the VM.
    :param device_class: as for `device_list_change`.
    """
    devclass = _devclass(device_class)
    for backend_name, ports in ext.devices_cache.items():
        if backend_name == vm.name or backend_name not in vm.app.domains:
            continue
        for port_id in [port for port, frontend in ports.items() if frontend == vm]:
            ports[port_id] = None
            port = Port(vm.app.domains[backend_name], port_id, devclass)
            port = device_class(port).port
            _later(vm.fire_event_async(f"device-detach:{devclass}", port=port))


def compare_device_cache(
    vm: BaseVM,
    devices_cache: Mapping[str, Mapping[str, BaseVM | None]],
    current_devices: Mapping[str, BaseVM | None],
) -> tuple[set[str], dict[str, BaseVM], dict[str, BaseVM], set[str]]:
    """Return the ports that are new, attached, detached, and gone.

    :param vm: the VM that exposes them.
    :param devices_cache: what was known.
    :param current_devices: as for `device_list_change`.
    :return: the attached ones with the VM that has them, the detached ones with the one
        that had them; a device that changes hands is both.
    """
    before = devices_cache[vm.name]
    changed = {
        port
        for port in before.keys() | current_devices.keys()
        if before.get(port) != current_devices.get(port)
    }
    return (
        set(current_devices.keys() - before.keys()),
        {p: has for p in changed if (has := current_devices.get(p)) is not None},
        {p: had for p in changed if (had := before.get(p)) is not None},
        set(before.keys() - current_devices.keys()),
    )


async def resolve_conflicts_and_attach(
    ext: Extension, to_attach: Mapping[str, Mapping[BaseVM, DeviceAssignment]]
) -> None:
    """Attach devices; where several VMs are to have one, the user chooses.

    :param ext: the extension.
    :param to_attach: for each port the VMs, with their assignments.
    """
    for frontends in to_attach.values():
        target, assignment = next(iter(frontends.items()))
        if len(frontends) > 1:
            name = await confirm_device_attachment(assignment.device, frontends)
            chosen = [pair for pair in frontends.items() if pair[0].name == name]
            if not chosen:
                continue
            target, assignment = chosen[0]
            if assignment.mode is AssignmentMode.ASK:
                assignment.mode = AssignmentMode.AUTO  # that was the question
        await ext.attach_and_notify(target, assignment)


async def confirm_device_attachment(
    device: DeviceInfo, frontends: Mapping[BaseVM, DeviceAssignment]
) -> str:
    """Ask the user which VM shall have a device.

    :param device: the device.
    :param frontends: the VMs to choose from.
    :return: the name of one of them; empty if none shall have it, or nobody answers.
    """
    names = [vm.name for vm in frontends]
    params = {
        "source": device.backend_name,
        "device_name": device.description,
        "argument": device.port_id,
        "targets": names,
        "default_target": names[0] if len(names) == 1 else "",
    }
    try:
        answer = await call_socket_service("dom0", _AGENT, "dom0", params, SOCKET_PATH)
    except Exception as error:  # noqa: BLE001 - who answers is anybody's
        log.warning(
            "no user was asked which VM gets %s: %s", str(device.port), str(error)
        )
        return ""
    name = answer.removeprefix(_ALLOW)
    return name if answer.startswith(_ALLOW) and name in names else ""


async def call_socket_service(
    remote_domain: str,
    service: str,
    source_domain: str,
    params: Mapping[str, Any],
    rpc_path: str = SOCKET_PATH,
) -> str:
    """Fail: a run has no user to ask.  Tests replace this by an answer.

    :raise QubesException: always.
    """
    del source_domain, params, rpc_path
    raise QubesException(f"{remote_domain} has no {service} that could ask a user")
