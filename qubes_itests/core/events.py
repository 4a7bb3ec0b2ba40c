"""Events of objects, and their handlers.

A class lists its handlers with :func:`handler`; an object may get more, and so may
the classes of an app's objects, from its extensions.
Names of handlers may have wildcards.  Which functions of a class answer to an event is
found out once per class and event name.

Order: base class before subclass, class before object; the other way round for events
that announce something (`pre_event`).  Within one class those of its definition come
before those that were added.  This is the order of Qubes OS; where that leaves it open,
it is the order of definition and of adding.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from types import GeneratorType
from typing import Any, Final, TypeVar
from weakref import WeakKeyDictionary

from qubes_itests import timeline
from qubes_itests.core.event_names import check_pattern

__all__ = ["Emitter", "SharedHandlers", "handler"]

Handler = Callable[..., Any]
_F = TypeVar("_F", bound=Handler)

#: For how many event names a class remembers its handlers: names may come from guests.
_MOST_RESOLVED: Final = 4096

_Level = tuple[tuple[str, Handler], ...]
_Resolved = dict[tuple[str, bool], tuple[Handler, ...]]
_declared_by_class: WeakKeyDictionary[type, _Level] = WeakKeyDictionary()


def handler(*events: str) -> Callable[[_F], _F]:
    """Mark a function of a class as handler of events.

    It is called with the object, the event's name, and the event's own keywords.  It
    may be a plain function or a generator, and, for events that are fired with
    `Emitter.fire_event_async`, a coroutine function or an asynchronous generator.

    :param events: names, which may have the wildcards of the shell: ``*`` for all
        events, ``property-set:*`` for all with that beginning.
    :raise ValueError: when none of the events that are declared matches; see
        `qubes_itests.core.event_names`.
    """
    for event in events:
        check_pattern(event)

    def mark(function: _F) -> _F:
        function.ha_events = events  # type: ignore[attr-defined]
        return function

    return mark


def _declared(cls: type) -> _Level:
    """Return the handlers of a class's own definition; it may be a mere mixin."""
    found = _declared_by_class.get(cls)
    if found is None:
        found = _declared_by_class[cls] = tuple(
            (event, function)
            for function in vars(cls).values()
            for event in getattr(function, "ha_events", ())
        )
    return found


def _answering(handlers: Iterable[tuple[str, Handler]], event: str) -> list[Handler]:
    return [
        function
        for pattern, function in handlers
        if pattern == event or fnmatch.fnmatchcase(event, pattern)
    ]


def _flatten(effect: Any) -> Iterable[Any]:
    if isinstance(effect, Iterable) and not isinstance(effect, (str, bytes)):
        return effect
    return (effect,)


class SharedHandlers:
    """Handlers that are added to classes, for the objects of one app alone."""

    def __init__(self) -> None:
        self._by_class: dict[type, list[tuple[str, Handler]]] = {}
        self._resolved: dict[type, _Resolved] = {}

    def of(self, cls: type) -> Iterable[tuple[str, Handler]]:
        """Return those of a class itself, not those of its bases."""
        return self._by_class.get(cls, ())

    def resolved(self, cls: type) -> _Resolved:
        """Return what the app's objects of a class remember."""
        return self._resolved.setdefault(cls, {})

    def add(self, cls: type, event: str, function: Handler) -> None:
        """Have `function` called for an event on any object of the class, once."""
        handlers = self._by_class.setdefault(cls, [])
        if (event, function) not in handlers:
            handlers.append((event, function))
            self._forget()

    def remove(self, function: Handler) -> None:
        """Undo each `add` of a function."""
        for handlers in self._by_class.values():
            handlers[:] = [known for known in handlers if known[1] != function]
        self._forget()

    def _forget(self) -> None:
        # In place: each object of the app has a reference to one of these dictionaries,
        # and a new one would leave them with handlers that are gone.
        for resolved in self._resolved.values():
            resolved.clear()


class Emitter:
    """An object that events are fired on."""

    #: While false, no handler is called: the object is still being made.
    events_enabled: bool = False

    _shared: SharedHandlers | None = None
    #: The handlers of names that were fired; those who share handlers share this too.
    _resolved: _Resolved = {}  # noqa: RUF012 - each class and each app has its own

    def __init__(self) -> None:
        self._instance_handlers: list[tuple[str, Handler]] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._resolved = {}

    def share_handlers(self, shared: SharedHandlers) -> None:
        """Have those of an app called as well."""
        self._shared = shared
        self._resolved = shared.resolved(type(self))

    def _resolve(self, event: str, *, pre_event: bool) -> tuple[Handler, ...]:
        classes, shared = type(self).__mro__, self._shared
        return tuple(
            function
            for base in (classes if pre_event else reversed(classes))
            for level in (_declared(base), () if shared is None else shared.of(base))
            for function in _answering(level, event)
        )

    def add_handler(self, event: str, function: Handler) -> None:
        """Have `function` called for an event on this object only, once."""
        if (event, function) not in self._instance_handlers:
            self._instance_handlers.append((event, function))

    def remove_handler(self, event: str, function: Handler) -> None:
        """Undo `add_handler`; ValueError if that was not done.

        A handler may do so while it is called: an event goes to those that were there
        when it was fired.
        """
        self._instance_handlers.remove((event, function))

    def _handlers(
        self, event: str, kwargs: dict[str, Any], *, pre_event: bool
    ) -> tuple[Handler, ...]:
        """Return those of an event that is fired now, in their order."""
        if not self.events_enabled:
            return ()
        if timeline.wants_events():
            self._report(event, kwargs)
        resolved = self._resolved
        handlers = resolved.get((event, pre_event))
        if handlers is None:
            if len(resolved) >= _MOST_RESOLVED:
                resolved.clear()
            handlers = self._resolve(event, pre_event=pre_event)
            resolved[event, pre_event] = handlers
        if self._instance_handlers:
            own = tuple(_answering(self._instance_handlers, event))
            return own + handlers if pre_event else handlers + own
        return handlers

    def fire_event(
        self, event: str, *, pre_event: bool = False, **kwargs: Any
    ) -> list[Any]:
        """Call the handlers of an event, in the order that the module describes.

        :param event: the name, without wildcard.
        :param pre_event: call them in the opposite order, as an announcement that
            any of them may veto by raising.
        :return: all that the handlers returned or yielded, in one list.
        :raise RuntimeError: when a handler is asynchronous.
        """
        effects: list[Any] = []
        for function in self._handlers(event, kwargs, pre_event=pre_event):
            effect = function(self, event, **kwargs)
            if effect is None:
                continue
            if isinstance(effect, (list, GeneratorType)):
                effects.extend(effect)
            elif isinstance(effect, (Awaitable, AsyncGenerator)):
                raise _refused(function, event, effect)
            else:
                effects.extend(_flatten(effect))
        return effects

    async def fire_event_async(
        self, event: str, *, pre_event: bool = False, **kwargs: Any
    ) -> list[Any]:
        """Call the handlers as `fire_event` does; await those that are asynchronous.

        One ends before the next begins, so that the order, and a veto, hold for these
        as well.  (Qubes OS calls the plain ones first and the others all at once, in no
        particular order; a handler must not rely on another that is after it.)
        """
        effects: list[Any] = []
        for function in self._handlers(event, kwargs, pre_event=pre_event):
            effect = function(self, event, **kwargs)
            if isinstance(effect, Awaitable):
                effect = await effect
            if isinstance(effect, AsyncGenerator):
                effects.extend([item async for item in effect])
            elif effect is not None:
                effects.extend(_flatten(effect))
        return effects

    def _report(self, event: str, kwargs: dict[str, Any]) -> None:
        told: timeline.Value = {name: repr(value) for name, value in kwargs.items()}
        timeline.note("event", self.recorded_as(), name=event, kwargs=told)

    def recorded_as(self) -> str | None:
        """Return the name of the VM that this is in timelines; None if it is none."""
        return None


def _refused(function: Handler, event: str, effect: Any) -> RuntimeError:
    if inspect.iscoroutine(effect):
        # Else Python would warn, at some later time, that it was never awaited.
        effect.close()
    return RuntimeError(
        f"{function!r} is asynchronous, but {event!r} is fired synchronously:"
        " make it a plain function"
    )
