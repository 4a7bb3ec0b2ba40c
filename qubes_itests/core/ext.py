"""Extensions: code beside the core that answers to its events."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from qubes_itests.core import events as events_

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qubes_itests.core.events import Emitter

__all__ = ["Extension", "handler", "registered_extensions"]

_F = TypeVar("_F", bound=Callable[..., Any])


def handler(
    *events: str, vm: type[Emitter] | None = None, system: bool = False
) -> Callable[[_F], _F]:
    """Mark a method of an :class:`Extension` as handler of events.

    :param events: names, as in `qubes_itests.core.events.handler`.
    :param vm: the class of VMs it listens to; by default all of them.
    :param system: whether it listens to the app instead.
    :raise ValueError: as that one does.
    """
    listens = events_.handler(*events)

    def mark(function: _F) -> _F:
        listens(function)
        function.ha_vm = vm  # type: ignore[attr-defined]
        function.ha_system = system  # type: ignore[attr-defined]
        return function

    return mark


class Extension:
    """The base of extensions; there is one object of each class.

    A handler is called with the object that the event was fired on, the event's name,
    and the event's keywords.
    """

    _instance: Extension | None = None

    def __new__(cls) -> Extension:  # noqa: PYI034 - of any subclass
        """Return the one object of this class, registered if it is not."""
        if "_instance" not in vars(cls) or cls._instance is None:
            cls._instance = super().__new__(cls)
        cls._instance.register()
        return cls._instance

    def __init__(self) -> None:
        #: For extensions of devices: by VM and port, which VM has the device.
        self.devices_cache: defaultdict[str, dict[str, Any]] = defaultdict(dict)

    def ensure_detach(self, vm: Any, port: Any) -> None:
        """Undo what is left of an attachment when a device has gone by itself."""

    def register(self) -> None:
        """Have the handlers called; they are already when the object is made."""
        if self in _registered:
            return
        _registered.append(self)
        for listened, event, method in self._handlers():
            listened.add_class_handler(event, method)

    def unregister(self) -> None:
        """Have them called no more, until `register`."""
        if self in _registered:
            _registered.remove(self)
            for listened, event, method in self._handlers():
                listened.remove_class_handler(event, method)

    def _handlers(self) -> Iterator[tuple[type[Emitter], str, Callable[..., Any]]]:
        # here, because the app and the VM classes import this module
        from qubes_itests.core.app import Qubes  # noqa: PLC0415
        from qubes_itests.core.vm.base import BaseVM  # noqa: PLC0415

        for name in dir(type(self)):
            function = getattr(type(self), name)
            for event in getattr(function, "ha_events", ()):
                listened = Qubes if function.ha_system else function.ha_vm or BaseVM
                yield listened, event, getattr(self, name)


_registered: list[Extension] = []


def registered_extensions() -> tuple[Extension, ...]:
    """Return those whose handlers are called, in the order in which they were made."""
    return tuple(_registered)
