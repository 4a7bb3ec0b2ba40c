"""What a VM has besides its properties: features, tags, volumes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

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
    if hasattr(vm, "volumes"):
        _load_volumes(loading, vm, domain)


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
