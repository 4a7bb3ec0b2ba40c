"""`TestEmitter`, which remembers the events fired on it, and assertions about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from qubes_itests.core.events import Emitter

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["EventAssertions", "TestEmitter"]


class TestEmitter(Emitter):
    """An emitter for tests of extensions: a stand-in for a VM or an app."""

    __test__ = False  # pytest: not a class of tests

    #: How often each event was fired, by its name and the items of its keywords.
    fired_events: Counter[tuple[str, frozenset[Any]]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fired_events = Counter()

    def fire_event(
        self, event: str, *, pre_event: bool = False, **kwargs: Any
    ) -> list[Any]:
        """Call the handlers, if events are enabled, and count the event."""
        effects = super().fire_event(event, pre_event=pre_event, **kwargs)
        self.fired_events[event, _frozen_items(kwargs)] += 1
        return effects

    async def fire_event_async(
        self, event: str, *, pre_event: bool = False, **kwargs: Any
    ) -> list[Any]:
        """Do what `fire_event` does, and await handlers that are asynchronous."""
        effects = await super().fire_event_async(event, pre_event=pre_event, **kwargs)
        self.fired_events[event, _frozen_items(kwargs)] += 1
        return effects


class EventAssertions:
    """Assertions about the events of a :class:`TestEmitter`, for a test case."""

    def assertEventFired(
        self,
        subject: TestEmitter,
        event: str,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Fail unless the event was fired, with these keywords among others."""
        if not _fired(subject, event, kwargs):
            raise AssertionError(
                f"event {event!r} was not fired on {subject!r} with {kwargs or {}!r},"
                f" only {sorted({name for name, _ in subject.fired_events})}"
            )

    def assertEventNotFired(
        self,
        subject: TestEmitter,
        event: str,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Fail if the event was fired with these keywords, among others."""
        if _fired(subject, event, kwargs):
            raise AssertionError(
                f"event {event!r} was fired on {subject!r} with {kwargs or {}!r}"
            )


def _fired(subject: TestEmitter, event: str, kwargs: Mapping[str, Any] | None) -> bool:
    wanted = _frozen_items(kwargs or {})
    return any(name == event and wanted <= had for name, had in subject.fired_events)


def _frozen_items(mapping: Mapping[Any, Any]) -> frozenset[tuple[Any, Any]]:
    return frozenset((key, _frozen(value)) for key, value in mapping.items())


def _frozen(value: Any) -> Any:
    """Return a hashable form of a value."""
    if isinstance(value, dict):
        return _frozen_items(value)
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    if isinstance(value, (set, frozenset)):
        return frozenset(map(_frozen, value))
    return value if isinstance(value, Hashable) else repr(value)
