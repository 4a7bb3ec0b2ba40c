"""Events: what happens to an object, and whom it concerns.

A class lists its handlers with :func:`handler`; any object may get more with
:meth:`Emitter.add_handler`.  A name may end in ``*``.  Which functions of a class
answer to an event is found out once per class and event name.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, ClassVar, TypeVar

__all__ = ["Emitter", "handler"]

Handler = Callable[..., Any]
_F = TypeVar("_F", bound=Handler)


def handler(*events: str) -> Callable[[_F], _F]:
    """Mark a function of a class as handler of events.

    It is called with the object, the event's name, and the event's own keywords.

    :param events: names; one that ends in ``*`` stands for all with that beginning.
    """

    def mark(function: _F) -> _F:
        function.ha_events = events  # type: ignore[attr-defined]
        return function

    return mark


def _answers(pattern: str, event: str) -> bool:
    if pattern.endswith("*"):
        return event.startswith(pattern[:-1])
    return pattern == event


def _flatten(effect: Any) -> list[Any]:
    if effect is None:
        return []
    if isinstance(effect, Iterable) and not isinstance(effect, (str, bytes)):
        return list(effect)
    return [effect]


class Emitter:
    """An object that events are fired on."""

    #: While false, no handler is called: the object is still being made.
    events_enabled: bool = False

    _own_handlers: ClassVar[list[tuple[str, Handler]]] = []
    _resolved: ClassVar[dict[str, tuple[Handler, ...]]] = {}

    def __init__(self) -> None:
        self._instance_handlers: list[tuple[str, Handler]] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._own_handlers = [
            (event, function)
            for function in vars(cls).values()
            for event in getattr(function, "ha_events", ())
        ]
        cls._resolved = {}

    @classmethod
    def add_class_handler(cls, event: str, function: Handler) -> None:
        """Have `function` called for an event on any object of this class."""
        cls._own_handlers.append((event, function))
        cls._forget_resolved()

    @classmethod
    def remove_class_handler(cls, event: str, function: Handler) -> None:
        """Undo `add_class_handler`; ValueError if that was not done."""
        cls._own_handlers.remove((event, function))
        cls._forget_resolved()

    @classmethod
    def _forget_resolved(cls) -> None:
        cls._resolved.clear()
        for subclass in cls.__subclasses__():
            subclass._forget_resolved()  # noqa: SLF001 - of this very class

    @classmethod
    def _resolve(cls, event: str) -> tuple[Handler, ...]:
        return tuple(
            function
            for base in reversed(cls.__mro__)
            for pattern, function in vars(base).get("_own_handlers", ())
            if _answers(pattern, event)
        )

    def add_handler(self, event: str, function: Handler) -> None:
        """Have `function` called for an event on this object only."""
        self._instance_handlers.append((event, function))

    def remove_handler(self, event: str, function: Handler) -> None:
        """Undo `add_handler`; ValueError if that was not done."""
        self._instance_handlers.remove((event, function))

    def _handlers(self, event: str, *, pre_event: bool) -> tuple[Handler, ...]:
        cls = type(self)
        handlers = cls._resolved.get(event)
        if handlers is None:
            handlers = cls._resolved[event] = cls._resolve(event)
        if self._instance_handlers:
            handlers += tuple(
                function
                for pattern, function in self._instance_handlers
                if _answers(pattern, event)
            )
        return handlers[::-1] if pre_event else handlers

    def fire_event(
        self, event: str, *, pre_event: bool = False, **kwargs: Any
    ) -> list[Any]:
        """Call the handlers of an event: base class first, this object's own last.

        :param event: the name, without wildcard.
        :param pre_event: call them in the opposite order, as an announcement that
            any of them may veto by raising.
        :return: all that the handlers returned or yielded, in one list.
        :raise TypeError: when a handler is a coroutine function.
        """
        if not self.events_enabled:
            return []
        effects: list[Any] = []
        for function in self._handlers(event, pre_event=pre_event):
            effect = function(self, event, **kwargs)
            if inspect.iscoroutine(effect):
                effect.close()
                raise TypeError(
                    f"{function!r} is a coroutine function, but {event!r} is fired"
                    " synchronously: make it a plain function"
                )
            effects.extend(_flatten(effect))
        return effects

    async def fire_event_async(
        self, event: str, *, pre_event: bool = False, **kwargs: Any
    ) -> list[Any]:
        """Call the handlers as `fire_event` does, and await those that are coroutines.

        One ends before the next begins, so that the order holds for these as well.
        """
        if not self.events_enabled:
            return []
        effects: list[Any] = []
        for function in self._handlers(event, pre_event=pre_event):
            effect = function(self, event, **kwargs)
            if isinstance(effect, Awaitable):
                effect = await effect
            effects.extend(_flatten(effect))
        return effects
