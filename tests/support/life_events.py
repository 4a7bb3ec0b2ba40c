"""What may happen to a VM, and what it has to tell of that."""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import TYPE_CHECKING, Any

from qubes_itests.core import exc
from qubes_itests.exc import HarnessError
from qubes_itests.hypervisor.contract import DomainState, LifecycleEvent

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from random import Random

#: What one VM may fire, in letters: see `LETTERS`.
GRAMMAR = re.compile(r"(p(f|sf|sSf|sS[^pfsSxX]*xX))*")
LETTERS = {
    "domain-pre-start": "p",
    "domain-start-failed": "f",
    "domain-spawn": "s",
    "domain-start": "S",
    "domain-stopped": "x",
    "domain-shutdown": "X",
    "domain-pre-shutdown": "d",
    "domain-shutdown-failed": "D",
}


def letters(events: list[str]) -> str:
    return "".join(LETTERS.get(event, "~") for event in events)


def record(vm: Any, random: Random) -> list[str]:
    """Note the events of a VM when all of their handlers are done, and dawdle."""
    seen: list[str] = []
    pending: list[str] = []

    async def note(_vm: Any, event: str, **_: Any) -> None:
        assert not pending, f"{event} while {pending} is being dispatched"
        if event in LETTERS and not event.startswith("domain-pre-shut"):
            pending.append(event)
        try:
            for _step in range(random.randrange(4)):
                await asyncio.sleep(0)
        finally:  # a start that is killed
            seen.append(event)
            pending.clear()

    for event in LETTERS:
        if "shutdown-failed" not in event and "pre-shutdown" not in event:
            vm.add_handler(event, note)
    return seen


async def lose_caller(call: Awaitable[Any]) -> None:
    task = asyncio.ensure_future(call)
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])


def end(vm: Any, state: DomainState) -> None:
    if vm.domain is not None:
        vm.domain.end(state)


async def storm(vm: Any, random: Random) -> None:
    for _ in range(random.randrange(20)):
        if vm.domain is not None:
            event = random.choice(list(LifecycleEvent))
            vm.app.hypervisor.publish(vm.domain, event)
        await asyncio.sleep(0)


def actions(vm: Any, random: Random) -> list[Callable[[], Awaitable[Any]]]:
    """Return what may happen to a VM."""

    async def inside() -> None:
        end(vm, DomainState.HALTED)

    async def crash() -> None:
        end(vm, DomainState.CRASHED)

    return [
        vm.start,
        vm.start,
        vm.start,
        lambda: lose_caller(vm.start()),
        lambda: lose_caller(vm.kill()),
        vm.kill,
        vm.shutdown,
        lambda: vm.shutdown(wait=True, timeout=1),
        vm.restart,
        vm.pause,
        vm.unpause,
        vm.suspend,
        vm.resume,
        inside,
        crash,
        lambda: storm(vm, random),
    ]


async def settle(vms: list[Any]) -> None:
    """Kill what runs, and wait until all is over."""
    for vm in reversed(vms):
        while vm.is_starting() or not vm.is_halted():
            try:
                await vm.kill()
            except exc.QubesVMNotStartedError:
                await asyncio.sleep(0)
        await vm.wait_ended(300)


async def begun(vm: Any, event: str) -> None:
    """Wait until a VM gets as far as an event, or has nothing more to do."""
    reached = asyncio.Event()

    def note(*_: Any, **__: Any) -> None:
        reached.set()

    vm.add_handler(event, note)
    for _ in range(25):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reached.wait(), 0.002)
        if reached.is_set() or vm.get_power_state() in {"Halted", "Running"}:
            break
    vm.remove_handler(event, note)


async def interleave(vms: list[Any], random: Random) -> None:
    """Have several things happen at once, wait for all of them, and settle."""
    hypervisor = vms[0].app.hypervisor

    async def one() -> None:
        vm = random.choice(vms)
        if random.random() < 0.7:
            await begun(vm, random.choice(list(LETTERS)))
        for _ in range(random.randrange(40)):
            await asyncio.sleep(0)
        # an error says that the VM was in another state; the rest fails the test
        with contextlib.suppress(exc.QubesException, HarnessError):
            await random.choice(actions(vm, random))()

    hypervisor.failing = {"enter"} if random.random() < 0.1 else set()
    await asyncio.gather(*(one() for _ in range(random.randrange(4, 16))))
    hypervisor.failing = set()
    await settle(vms)
