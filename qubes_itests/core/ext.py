"""Extensions: code beside the core that answers to its events."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

from qubes_itests.core import events as events_

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from qubes_itests.core.device.assignment import DeviceAssignment
    from qubes_itests.core.device.port import Port
    from qubes_itests.core.events import Emitter
    from qubes_itests.core.vm.base import BaseVM

__all__ = ["Extension", "Extensions", "handler", "registered_extensions"]

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

    Making it registers it.
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
        self.devices_cache: defaultdict[str, dict[str, BaseVM | None]]
        self.devices_cache = defaultdict(dict)

    def ensure_detach(self, vm: BaseVM, port: Port) -> None:
        """Undo what is left of an attachment when a device has gone by itself."""

    async def attach_and_notify(self, vm: BaseVM, assignment: DeviceAssignment) -> None:
        """Attach a device that a VM is to have; for extensions of devices."""
        raise NotImplementedError

    def register(self) -> None:
        """Add it to the app that was made last, and to each that is made later."""
        # Not to all open apps: those before it may belong to another plugin's tests.
        if self not in _registered:
            _registered.append(self)
        if apps := list(_open.values()):
            apps[-1].add(self)

    def unregister(self) -> None:
        """Remove it from all apps, and add it to no other until `register`."""
        if self in _registered:
            _registered.remove(self)
        for extensions in list(_open.values()):
            extensions.remove(self)


class Extensions:
    """The extensions of one app, which are called for it and its VMs alone.

    :param app: the class of the app.
    :param vm: the class of all VMs.
    :param own: classes of extensions of which each app has its own object; those that
        are registered, which all apps have in common, come after them.
    """

    def __init__(
        self, app: type[Emitter], vm: type[Emitter], own: Iterable[type[Extension]]
    ) -> None:
        self._app = app
        self._vm = vm
        self._present: list[Extension] = []
        #: For the app and its VMs to share.
        self.handlers = events_.SharedHandlers()
        for cls in own:
            # Past `__new__`, which has one object for all apps: this one is the app's.
            extension = object.__new__(cls)
            extension.__init__()  # type: ignore[misc]
            self.add(extension)
        for extension in _registered:
            self.add(extension)
        _open[id(self)] = self

    def __iter__(self) -> Iterator[Extension]:
        return iter(self._present)

    def add(self, extension: Extension) -> None:
        """Have an extension called for the app, which has one of each class at most."""
        if any(type(present) is type(extension) for present in self._present):
            return
        self._present.append(extension)
        for function in _handlers(extension):
            listened = self._app if function.ha_system else function.ha_vm or self._vm
            for event in function.ha_events:
                self.handlers.add(listened, event, function)

    def remove(self, extension: Extension) -> None:
        """Undo `add`; nothing happens if that was not done."""
        if extension in self._present:
            self._present.remove(extension)
            for function in _handlers(extension):
                self.handlers.remove(function)

    def close(self) -> None:
        """Add no more that are registered: the app is closed."""
        _open.pop(id(self), None)


def _handlers(extension: Extension) -> Iterator[Any]:
    for name in dir(type(extension)):
        if hasattr(getattr(type(extension), name), "ha_events"):
            yield getattr(extension, name)


#: What each new app gets.
_registered: list[Extension] = []
#: Those of the apps that are open, in the order in which they were made; an app that
#: nobody closes is not kept alive.
_open: WeakValueDictionary[int, Extensions] = WeakValueDictionary()


def registered_extensions() -> tuple[Extension, ...]:
    """Return those that each new app gets, in the order in which they were made."""
    return tuple(_registered)
