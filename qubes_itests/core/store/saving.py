"""An app's state as a document: what was set, and nothing that is a default."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.core.exc import QubesValueError
from qubes_itests.core.network.firewall import Firewall
from qubes_itests.core.properties import Property
from qubes_itests.core.store.collection import no_collection
from qubes_itests.core.store.document import Element, storable, to_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qubes_itests.core.app import Qubes
    from qubes_itests.core.device.assignment import DeviceAssignment
    from qubes_itests.core.properties import PropertyHolder
    from qubes_itests.core.store.file import StoreFile
    from qubes_itests.core.vm.base import BaseVM

__all__ = ["VERSION", "state_of", "write_state"]

#: The version of the format: that of Qubes OS, whose names and structure it has.
VERSION: Final = "3.0"


def write_state(store: StoreFile, state: Element, version: int, *, lock: bool) -> None:
    """Write a state to its store; this may be called from any thread.

    :param state: from `state_of`; equal ones have equal bytes.
    :param version: as for `StoreFile.write`, as is `lock`.
    :raise StoreError: when another writer has changed the store, or keeps it.
    :raise QubesValueError: for what a document cannot hold.
    """
    try:
        data = to_bytes(state)
    except ValueError as error:
        raise QubesValueError(f"the app cannot be saved: {error}") from error
    store.write(data, version, lock=lock)


def state_of(app: Qubes) -> Element:
    """Return the state of an app as a document."""
    with no_collection():
        return _state_of(app)


def _state_of(app: Qubes) -> Element:
    root = Element("qubes", {"version": VERSION})
    labels = root.add("labels")
    for label in sorted(app.labels.values(), key=lambda label: label.index):
        labels.add("label", label.name, id=f"label-{label.index}", color=label.color)
    pools = root.add("pools")
    for pool in app.pools.values():
        config = {name: _text(value) for name, value in pool.config.items()}
        pools.add("pool", **config)
    _add_properties(root, app)
    domains = root.add("domains")
    for vm in sorted(app.domains, key=lambda vm: vm.qid):
        if vm.under_way == "made":
            continue  # it is in the store when its volumes are there
        domains.children.append(_domain(vm))
    return root


def _domain(vm: BaseVM) -> Element:
    domain = Element("domain", {"id": f"domain-{vm.qid}", "class": vm.klass})
    _add_properties(domain, vm)
    features = domain.add("features")
    for name, value in sorted(vm.features.items()):
        features.add("feature", value, name=name)
    tags = domain.add("tags")
    for tag in sorted(vm.tags):
        tags.add("tag", name=tag)
    for devclass, devices in sorted(vm.devices.items()):
        _add_devices(domain, devclass, sorted(devices.get_assigned_devices()))
    if vm.firewall.rules != list(Firewall.DEFAULT):
        firewall = domain.add("firewall")
        for rule in vm.firewall.rules:
            firewall.add("rule", rule)
    if vm.notes:
        domain.add("notes", storable(vm.notes))
    _add_volumes(domain, vm)
    return domain


def _add_devices(
    domain: Element, devclass: str, assignments: Sequence[DeviceAssignment]
) -> None:
    if not assignments:
        return
    devices = domain.add("devices", **{"class": devclass})
    for assignment in assignments:
        attributes = {
            "backend-domain": assignment.backend_name,
            "id": assignment.port_id,
            "identity": assignment.device_id,
            "mode": assignment.mode.value,
        }
        device = devices.add("device", **attributes)
        for name, value in sorted(assignment.options.items()):
            device.add("option", value, name=name)


def _add_properties(element: Element, holder: PropertyHolder) -> None:
    properties = element.add("properties")
    for prop in holder.property_list():
        if not holder.property_is_default(prop):
            with contextlib.suppress(Property.DontSave):
                properties.add("property", prop.saved(holder), name=prop.name)


def _add_volumes(domain: Element, vm: Any) -> None:
    volumes = getattr(vm, "volumes", None)
    if not volumes:
        return
    config = domain.add("volume-config")
    for volume in volumes.values():
        attributes = {name: _text(value) for name, value in volume.config.items()}
        config.add("volume", **attributes)


def _text(value: object) -> str:
    return "" if value is None else str(value)
