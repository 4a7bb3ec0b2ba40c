"""Events of an app and its VMs, on their way to any number of streams."""

from __future__ import annotations

import contextlib
import logging
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.admin.protocol import encode_event

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable, Iterator

    from qubes_itests.admin.streams import EventStream
    from qubes_itests.core.app import Qubes
    from qubes_itests.core.events import Emitter
    from qubes_itests.core.vm.base import BaseVM

__all__ = ["EventHub"]

log = logging.getLogger("qubes.admin")

#: Events that are questions between the core's own parts.
_INTERNAL: Final = (
    "admin-permission:",
    "device-get:",
    "device-list:",
    "device-list-attached:",
    "domain-is-fully-usable",
)


@dataclass(slots=True, eq=False)
class _Subscriber:
    stream: EventStream
    only: uuid.UUID | None
    filters: list[Callable[..., bool]] = field(default_factory=list)

    def may_hear(self, item: tuple[Any, str, dict[str, Any]]) -> bool:
        """Tell whether all filters agree; a defect of one harms nobody else."""
        try:
            return all(allows(item) for allows in self.filters)
        except Exception:  # noqa: BLE001 - what fired the event goes on
            # as text: a record must not keep objects of the frames alive
            log.error("a filter of events failed:\n%s", traceback.format_exc())  # noqa: TRY400
            return False


class EventHub:
    """Listens as long as anybody does, once for all of them.

    :param app: whose events, and those of its VMs, it hands on.
    """

    def __init__(self, app: Qubes) -> None:
        self._app = app
        self._subscribers: list[_Subscriber] = []
        self._listening: dict[int, tuple[Emitter, Callable[..., Any]]] = {}

    @contextlib.contextmanager
    def subscribed(
        self,
        stream: EventStream,
        filters: list[Callable[..., bool]],
        only: uuid.UUID | None = None,
    ) -> Iterator[None]:
        """Send events to a stream for the time of the block.

        :param filters: called with (subject, event, values); all must agree.
        :param only: of the VM whose events they are to be; None for all.
        """
        subscriber = _Subscriber(stream, only, filters)
        self._subscribers.append(subscriber)
        if len(self._subscribers) == 1:
            self._begin()
        try:
            yield
        finally:
            self._subscribers.remove(subscriber)
            if not self._subscribers:
                self._end()

    def _begin(self) -> None:
        self._listen(self._app, self._on_app_event)
        for vm in self._app.domains:
            self._listen(vm, self._on_event)

    def _end(self) -> None:
        for emitter, function in self._listening.values():
            emitter.remove_handler("*", function)
        self._listening.clear()

    def _listen(self, emitter: Emitter, function: Callable[..., Any]) -> None:
        emitter.add_handler("*", function)
        # by identity, and kept: while it is here nothing else gets its number
        self._listening[id(emitter)] = (emitter, function)

    def _on_app_event(self, app: Any, event: str, **values: Any) -> None:
        self._on_event(app, event, **values)
        if event == "domain-add":
            self._listen(values["vm"], self._on_event)
        elif event == "domain-delete":
            self._forget(values["vm"])

    def _forget(self, vm: BaseVM) -> None:
        if (known := self._listening.pop(id(vm), None)) is not None:
            vm.remove_handler("*", known[1])

    def _on_event(self, subject: Any, event: str, **values: Any) -> None:
        if event.startswith(_INTERNAL):
            return
        is_vm = subject is not self._app
        name, which = (subject.name, subject.uuid) if is_vm else ("", None)
        data = encode_event(name, event, values)
        # Encoded once for all, and sent without waiting: what fired the event goes on,
        # however slow its listeners are.
        for subscriber in tuple(self._subscribers):
            if subscriber.only in {None, which} and subscriber.may_hear(
                (subject, event, values)
            ):
                subscriber.stream.send(data)
