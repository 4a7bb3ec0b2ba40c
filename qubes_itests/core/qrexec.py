"""qrexec: calls that come out of a VM, decided by policy and connected."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

from qubes_itests.core.exc import QubesException
from qubes_itests.core.policy import evaluate
from qubes_itests.exc import HarnessError
from qubes_itests.guest.link import dom0_services
from qubes_itests.guest.link.frames import NOT_FOUND
from qubes_itests.guest.link.relay import relay
from qubes_itests.limited_log import LimitedLog
from qubes_storage.uninterrupted import to_its_end

if TYPE_CHECKING:
    from qubes_itests.core.policy import Decision
    from qubes_itests.core.vm.dispvm import DispVM
    from qubes_itests.core.vm.qubesvm import QubesVM
    from qubes_itests.guest.link.calls import ServiceCall

__all__ = ["HostService", "handle_call"]

_limited = LimitedLog(logging.getLogger("qubes.qrexec"))

#: A service that dom0 offers: called with the VM that calls and the call, whose stdin
#: and stdout it uses; it returns the exit status.
HostService = Callable[["QubesVM", "ServiceCall"], Awaitable[int]]

_DISPVM: Final = "@dispvm"

#: What tells in a disposable VM's tags whose call it was made for.
_ORIGIN_TAGS: Final = ("created-by", "disp-created-by")


async def handle_call(source: QubesVM, call: ServiceCall) -> None:
    """Decide on a call of a guest, and see it through.

    Whatever goes wrong becomes the exit status of the call: 126 when it is refused, 127
    when there is no such service.

    :param source: the VM whose guest calls.
    :param call: what it calls; everything in it is the guest's word.
    """
    decision = await evaluate(source.app, call.service, source, call.target)
    if not decision.allowed:
        # The reason is for the log alone: it names VMs that the caller may not know.
        await call.refuse("denied by policy")
        return
    try:
        await _connect(source, call, decision)
    except (HarnessError, QubesException) as error:
        # The error is for the log alone, too: it may show the console of another VM.
        _limited.warning(
            source.name, "%s of %s failed: %s", call.service, source.name, str(error)
        )
        await call.refuse("the service could not be reached")


async def _connect(source: QubesVM, call: ServiceCall, decision: Decision) -> None:
    if decision.target == "@adminvm":
        await _serve_on_host(source, call)
        return
    if decision.target.startswith(_DISPVM):
        await _call_disposable(source, call, decision)
        return
    target = source.app.domains.startable_vm(decision.target)
    if decision.autostart:
        await target.start()
    await _call(target, source, call, decision)


async def _call(
    target: QubesVM, source: QubesVM, call: ServiceCall, decision: Decision
) -> int:
    process = await target.running_agent().spawn_service(
        _full_name(call), source=source.name, user=decision.user
    )
    return await relay(call, process)


def _full_name(call: ServiceCall) -> str:
    """Return the service with its argument, and the + that also an empty one has."""
    return call.service if "+" in call.service else f"{call.service}+"


async def _call_disposable(
    source: QubesVM, call: ServiceCall, decision: Decision
) -> None:
    """Make a DispVM for the time of a call; whatever ends the call, it goes too."""
    app = source.app
    name = decision.target.removeprefix(_DISPVM).removeprefix(":")
    template = app.domains[name] if name else app.dispvm_template(source)
    vm = await app.get_vm_class("DispVM").from_appvm(template)
    try:
        vm.tags.update(f"{tag}-{source.name}" for tag in _ORIGIN_TAGS)
        await vm.start()
        await _call(vm, source, call, decision)
    finally:
        # Calls are cancelled when the caller's VM ends; the disposable VM must go then,
        # too, and its removal takes several awaits.
        await to_its_end(_clean_up(vm))


async def _clean_up(vm: DispVM) -> None:
    try:
        await vm.cleanup()
    except Exception as error:  # noqa: BLE001 - the call has ended, whatever comes
        vm.note_problem(error)


async def _serve_on_host(source: QubesVM, call: ServiceCall) -> None:
    name = call.service.partition("+")[0]
    service = source.app.host_services.get(name)
    if service is not None:
        await call.finish(await service(source, call))
        return
    try:
        status = await dom0_services.serve(call)
    except OSError as error:
        _limited.warning(source.name, "%s of dom0: %s", name, str(error))
        await call.refuse("the service could not be started")
        return
    if status is None:
        _limited.warning(
            source.name, "%s called %s, which dom0 does not have", source.name, name
        )
        status = NOT_FOUND
    await call.finish(status)
