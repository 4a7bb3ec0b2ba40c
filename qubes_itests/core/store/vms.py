"""What a VM has besides its properties: features, tags, devices, volumes and others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from qubes_itests.core.device.assignment import AssignmentMode, DeviceAssignment
from qubes_itests.core.device.port import ANY, Port, VirtualDevice

if TYPE_CHECKING:
    from qubes_itests.core.store.document import Element
    from qubes_itests.core.store.loading import Loading
    from qubes_itests.core.vm.base import BaseVM

__all__ = ["load_extras"]

_FLAGS: Final = ("rw", "save_on_stop", "snap_on_start", "ephemeral")
_NUMBERS: Final = ("size", "revisions_to_keep")
_WORDS: Final = {"True": True, "False": False}


def load_extras(loading: Loading, vm: BaseVM, domain: Element) -> None:
    """Give a VM what its element says; it has its properties already.

    :raise StoreFormatError: for what cannot be.
    """
    features = loading.unique(domain.grandchildren("features", "feature"), "name")
    for name, element in features.items():
        with loading.at(element):
            vm.features[name] = element.text
    tags = loading.unique(domain.grandchildren("tags", "tag"), "name")
    for name, element in tags.items():
        with loading.at(element):
            vm.tags.add(name)
    for element in domain.find_all("devices"):
        _load_devices(loading, vm, element)
    for element in domain.find_all("firewall"):
        with loading.at(element):
            vm.firewall.rules = [rule.text for rule in element.find_all("rule")]
    for element in domain.find_all("notes"):
        vm.notes = element.text
    if hasattr(vm, "volumes"):
        _load_volumes(loading, vm, domain)


def _load_devices(loading: Loading, vm: BaseVM, devices: Element) -> None:
    for element in devices.find_all("device"):
        with loading.at(element):
            collection = vm.devices[loading.attribute(devices, "class")]
            assignment = _assignment(loading, vm, element, collection.devclass)
            if assignment in list(collection.get_assigned_devices()):
                loading.refuse(element, f"device {assignment} is assigned twice")
            collection.load_assignment(assignment)


def _assignment(
    loading: Loading, vm: BaseVM, element: Element, devclass: str
) -> DeviceAssignment:
    backend = loading.attribute(element, "backend-domain")
    port = Port(
        None if backend == ANY else vm.app.domains[backend],
        loading.attribute(element, "id"),
        devclass,
    )
    options = loading.unique(element.find_all("option"), "name")
    return DeviceAssignment(
        VirtualDevice(port, element.attributes.get("identity")),
        vm,
        {name: option.text for name, option in options.items()},
        _mode(element),
    )


def _mode(element: Element) -> str:
    # there was only "required" once, yes or no
    old = AssignmentMode.AUTO
    if element.attributes.get("required", "no").lower() in ("yes", "true"):
        old = AssignmentMode.REQUIRED
    return element.attributes.get("mode", old.value)


def _load_volumes(loading: Loading, vm: Any, domain: Element) -> None:
    elements = loading.unique(domain.grandchildren("volume-config", "volume"), "name")
    if not elements.keys() >= type(vm).volume_config.keys():
        with loading.at(domain):
            vm.init_storage()
    for name, element in elements.items():
        with loading.at(element):
            vm.storage.init_volume(name, _volume(loading, element))


def _volume(loading: Loading, element: Element) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for name, value in element.attributes.items():
        if name in _FLAGS:
            config[name] = _flag(loading, element, value)
        else:
            config[name] = int(value) if name in _NUMBERS else value
    del config["name"]
    return config


def _flag(loading: Loading, element: Element, value: str) -> bool:
    if value not in _WORDS:
        loading.refuse(element, f"{value!r} is neither True nor False")
    return _WORDS[value]
