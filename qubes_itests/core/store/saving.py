"""The state of an app as a document, and saves of it.

The document has what was set, and nothing that is a default.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

from qubes_itests.core.exc import QubesValueError
from qubes_itests.core.network.firewall import Firewall
from qubes_itests.core.properties import Property
from qubes_itests.core.store.document import (
    Element,
    no_collection,
    storable,
    to_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qubes_itests.core.app import Qubes
    from qubes_itests.core.device.assignment import DeviceAssignment
    from qubes_itests.core.properties import PropertyHolder
    from qubes_itests.core.store.file import StoreFile
    from qubes_itests.core.vm.base import BaseVM

__all__ = ["VERSION", "save", "state_of", "write_state"]

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


@no_collection()
def state_of(app: Qubes) -> Element:
    """Return the state of an app as a document."""
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
            # A save may come while its volumes are being made.  It is in the store when
            # they are there; until then the journal knows of it.
            continue
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
        assignments = sorted(devices.get_assigned_devices())
        if assignments:
            _add_devices(domain, devclass, assignments)
    if vm.firewall.rules != list(Firewall.DEFAULT):
        firewall = domain.add("firewall")
        for rule in vm.firewall.rules:
            firewall.add("rule", rule)
    if vm.notes:
        domain.add("notes", storable(vm.notes))
    if vm.volumes:
        config = domain.add("volume-config")
        for volume in vm.volumes.values():
            attributes = {name: _text(value) for name, value in volume.config.items()}
            config.add("volume", **attributes)
    return domain


def _add_devices(
    domain: Element, devclass: str, assignments: Sequence[DeviceAssignment]
) -> None:
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
    for prop in holder.property_list_set():
        with contextlib.suppress(Property.DontSave):
            properties.add("property", prop.saved(holder), name=prop.name)


def _text(value: object) -> str:
    return "" if value is None else str(value)


class _Saves:
    """The saves of one app: callers that come while one is under way share the next.

    That one has begun too early to hold what they have changed.
    """

    def __init__(self) -> None:
        self._current: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None

    def join(self, app: Qubes) -> asyncio.Task[None]:
        """Return a save that has not begun yet."""
        if self._next is None:
            self._next = asyncio.create_task(self._run(app, self._current))
            # All who asked for it may be cancelled; asyncio would then complain that
            # nobody has looked at its error.
            self._next.add_done_callback(
                lambda task: task.cancelled() or task.exception()
            )
        return self._next

    async def _run(self, app: Qubes, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        self._current, self._next = self._next, None
        try:
            await app.save_async()
        finally:
            self._current = None


#: Weak, as a save must not keep an app alive; so `join` is handed the app.
_saves: Final[WeakKeyDictionary[Qubes, _Saves]] = WeakKeyDictionary()


async def save(app: Qubes) -> None:
    """Save an app; what it is now is on the disk when this returns.

    :raise StoreError: when it cannot be.
    """
    saves = _saves.setdefault(app, _Saves())
    # One caller that is cancelled must not cancel the save that others wait for.
    await asyncio.shield(saves.join(app))
