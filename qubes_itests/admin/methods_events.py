"""Methods that send events until the client goes: of everything, and of usage."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.admin.dispatch import Call, method
from qubes_itests.admin.usage import Usage, cpu_percent, usage_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from qubes_itests.admin.streams import EventStream
    from qubes_itests.core.events import Emitter

__all__ = ["STATS_INTERVAL", "Subscription"]

#: Seconds between two reports of usage.
STATS_INTERVAL: Final = 3.0

_ESTABLISHED: Final = "connection-established"
#: Events that are questions between the core's own parts.
_INTERNAL: Final = (
    "admin-permission:",
    "device-get:",
    "device-list:",
    "device-list-attached:",
    "domain-is-fully-usable",
)


class Subscription:
    """Hands the events of an app and all its VMs, or of one VM, to a stream.

    :param stream: takes them.
    :param filters: called with (subject, event, values); all must agree.
    """

    def __init__(self, stream: EventStream, filters: list[Callable[..., bool]]) -> None:
        self._stream = stream
        self._filters = filters
        self._subscribed: list[tuple[Emitter, str, Callable[..., Any]]] = []

    def app_and_vms(self, app: Any) -> None:
        """Begin with the app, its VMs, and those that it will have."""
        self._listen(app, "*", self._on_event)
        self._listen(app, "domain-add", self._on_add)
        self._listen(app, "domain-delete", self._on_delete)
        for vm in app.domains:
            self.vm(vm)

    def vm(self, vm: Any) -> None:
        """Begin with a VM."""
        self._listen(vm, "*", self._on_event)

    def end(self) -> None:
        """End with all."""
        for emitter, event, function in self._subscribed:
            emitter.remove_handler(event, function)
        self._subscribed.clear()

    def _listen(
        self, emitter: Emitter, event: str, function: Callable[..., Any]
    ) -> None:
        emitter.add_handler(event, function)
        self._subscribed.append((emitter, event, function))

    def _on_add(self, _app: Any, _event: str, vm: Any, **_values: Any) -> None:
        self.vm(vm)

    def _on_delete(self, _app: Any, _event: str, vm: Any, **_values: Any) -> None:
        for entry in [each for each in self._subscribed if each[0] is vm]:
            vm.remove_handler(*entry[1:])
            self._subscribed.remove(entry)

    def _on_event(self, subject: Any, event: str, **values: Any) -> None:
        if event.startswith(_INTERNAL):
            return
        if all(allows((subject, event, values)) for allows in self._filters):
            name = getattr(subject, "name", "")
            self._stream.send(name, event, **values)


@method("admin.Events", streams=True)
async def events(call: Call) -> None:
    """Send all events: of the app and all VMs on dom0, else of the destination."""
    assert call.stream is not None  # noqa: S101 - the dispatcher has seen to it
    subscription = Subscription(call.stream, call.permit())
    if call.destination.klass == "AdminVM":
        subscription.app_and_vms(call.app)
    else:
        subscription.vm(call.destination)
    try:
        call.stream.send("", _ESTABLISHED)
        await call.stream.wait_closed()
    finally:
        subscription.end()


@method("admin.vm.Stats", streams=True)
async def stats(call: Call) -> None:
    """Send what VMs use, every few seconds: memory in KiB, CPU time in ms and %."""
    stream = call.stream
    assert stream is not None  # noqa: S101 - the dispatcher has seen to it
    filters = call.permit()
    stream.send("", _ESTABLISHED)
    reporting = asyncio.create_task(_report(call, stream, filters))
    try:
        await stream.wait_closed()
    finally:
        reporting.cancel()
        await asyncio.gather(reporting, return_exceptions=True)


async def _report(
    call: Call, stream: EventStream, filters: list[Callable[[str], bool]]
) -> None:
    loop = asyncio.get_running_loop()
    one_only = None if call.destination.klass == "AdminVM" else call.destination.name
    before: dict[str, Usage] = {}
    while True:
        now: dict[str, Usage] = {}
        for vm in call.app.domains:
            if one_only not in {None, vm.name} or not all(f(vm.name) for f in filters):
                continue
            usage = await usage_of(vm, loop.time())
            if usage.memory:
                now[vm.name] = usage
                _send_usage(stream, vm, usage, cpu_percent(before, vm.name, usage))
        before = now
        await asyncio.sleep(STATS_INTERVAL)


def _send_usage(stream: EventStream, vm: Any, usage: Usage, percent: int) -> None:
    stream.send(
        vm.name,
        "vm-stats",
        memory_kb=usage.memory >> 10,
        cpu_time=round(usage.cpu_time * 1000),
        cpu_usage=percent // max(1, getattr(vm, "vcpus", 1)),
        cpu_usage_raw=percent,
    )
