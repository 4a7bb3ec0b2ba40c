"""Methods that send events until the client goes: of everything, and of usage."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from qubes_itests.admin.dispatch import Call, method
from qubes_itests.admin.protocol import encode_event
from qubes_itests.admin.usage import Usage, cpu_percent, usage_of
from qubes_itests.core.vm.adminvm import AdminVM
from qubes_itests.core.vm.qubesvm import QubesVM

if TYPE_CHECKING:
    from collections.abc import Callable

    from qubes_itests.admin.streams import EventStream
    from qubes_itests.core.vm.base import BaseVM

__all__ = ["STATS_INTERVAL"]

#: Seconds between two reports of usage.
STATS_INTERVAL: Final = 3.0

_ESTABLISHED: Final = encode_event("", "connection-established", {})


@method("admin.Events", streams=True)
async def events(call: Call) -> None:
    """Send all events: of the app and all VMs on dom0, else of the destination."""
    assert call.stream is not None  # noqa: S101 - the dispatcher has seen to it
    vm = call.destination
    only = None if isinstance(vm, AdminVM) else vm.uuid
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
    one_only = None if isinstance(call.destination, AdminVM) else call.destination.name
    before: dict[str, Usage] = {}

    async def tell(vm: BaseVM) -> None:
        usage = await usage_of(vm, loop.time())
        if usage.memory:
            percent = cpu_percent(before, vm.name, usage)
            values = {
                "memory_kb": usage.memory >> 10,
                "cpu_time": round(usage.cpu_time * 1000),
                "cpu_usage": percent
                // max(1, vm.vcpus if isinstance(vm, QubesVM) else 1),
                "cpu_usage_raw": percent,
            }
            stream.send(encode_event(vm.name, "vm-stats", values))
            before[vm.name] = usage
        else:
            before.pop(vm.name, None)

    # One task for each, so that a VM that does not answer keeps no other from telling.
    telling: dict[str, asyncio.Task[None]] = {}
    try:
        while True:
            for name in [name for name, task in telling.items() if task.done()]:
                telling.pop(name).result()
            for vm in call.app.domains:
                wanted = one_only in {None, vm.name} and all(
                    f(vm.name) for f in filters
                )
                if wanted and vm.name not in telling:
                    telling[vm.name] = asyncio.create_task(tell(vm))
            await asyncio.sleep(STATS_INTERVAL)
    finally:
        for task in telling.values():
            task.cancel()
        await asyncio.gather(*telling.values(), return_exceptions=True)
