"""Methods that send events until the client goes: of everything, and of usage."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.admin.dispatch import Call, method
from qubes_itests.admin.protocol import encode_event
from qubes_itests.admin.usage import Usage, cpu_percent, usage_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from qubes_itests.admin.streams import EventStream

__all__ = ["STATS_INTERVAL"]

#: Seconds between two reports of usage.
STATS_INTERVAL: Final = 3.0

_ESTABLISHED: Final = encode_event("", "connection-established", {})


@method("admin.Events", streams=True)
async def events(call: Call) -> None:
    """Send all events: of the app and all VMs on dom0, else of the destination."""
    assert call.stream is not None  # noqa: S101 - the dispatcher has seen to it
    vm = call.destination
    only = None if vm.klass == "AdminVM" else vm.uuid
    with call.hub.subscribed(call.stream, call.permit(), only):
        call.stream.send(_ESTABLISHED)
        await call.stream.wait_closed()


@method("admin.vm.Stats", streams=True)
async def stats(call: Call) -> None:
    """Send what VMs use, every few seconds: memory in KiB, CPU time in ms and %."""
    stream = call.stream
    assert stream is not None  # noqa: S101 - the dispatcher has seen to it
    filters = call.permit()
    stream.send(_ESTABLISHED)
    tasks = [
        asyncio.create_task(_report(call, stream, filters)),
        asyncio.create_task(stream.wait_closed()),
    ]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


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
    values = {
        "memory_kb": usage.memory >> 10,
        "cpu_time": round(usage.cpu_time * 1000),
        "cpu_usage": percent // max(1, getattr(vm, "vcpus", 1)),
        "cpu_usage_raw": percent,
    }
    stream.send(encode_event(vm.name, "vm-stats", values))
