"""Calls of the Admin API that come out of VMs by qrexec, and that policy allows."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from qubes_itests.admin.dispatch import Dispatcher, error_name
from qubes_itests.admin.methods import METHODS
from qubes_itests.admin.protocol import LONGEST_REQUEST, Request, encode_exception
from qubes_itests.admin.streams import EventStream
from qubes_itests.core.exc import QubesVMNotFoundError
from qubes_itests.guest.link.frames import REFUSED
from qubes_itests.limited_log import LimitedLog

if TYPE_CHECKING:
    from qubes_itests.core.app import Qubes
    from qubes_itests.core.vm.qubesvm import QubesVM
    from qubes_itests.guest.link.calls import ServiceCall
    from qubes_itests.guest.link.streams import GuestWriter

__all__ = ["handle_vm_call", "offer_to_vms"]

#: Seconds that a VM has to send its request.
_TIMEOUT: Final = 30.0

_limited = LimitedLog(logging.getLogger("qubes.admin"))


def offer_to_vms(app: Qubes, dispatcher: Dispatcher | None = None) -> Dispatcher:
    """Have dom0 answer the Admin API to VMs, as far as the policy lets them call.

    :param app: whose `host_services` get the methods.
    :param dispatcher: answers; by default a new one.
    :return: who answers.
    """
    chosen = dispatcher or Dispatcher(app, METHODS)

    async def serve(source: QubesVM, call: ServiceCall) -> int:
        return await handle_vm_call(chosen, source, call)

    app.host_services.update(dict.fromkeys(METHODS, serve))
    return chosen


async def handle_vm_call(
    dispatcher: Dispatcher, source: QubesVM, call: ServiceCall
) -> int:
    """Answer one call, which the policy has allowed and sent to dom0.

    What the VM asked for as target is what the call is about, whichever VM answers.

    :param source: the VM that calls.
    :param call: names the method and the target; everything in it is the guest's word.
    :return: the call's exit status: 0 also when the reply tells of an exception.
    """
    # now: before the payload is complete, the name may be that of another VM
    destination = _destination(dispatcher.app, call.target)
    if destination is None:
        missing = QubesVMNotFoundError(call.target)
        call.stdout.write(encode_exception(error_name(missing), str(missing)))
        return 0
    payload = await _payload(call)
    if payload is None:
        _limited.warning(
            source.name,
            "%s: %s sent too much, or too slowly",
            call.service,
            source.name,
        )
        return REFUSED
    method, _, argument = call.service.partition("+")
    request = Request(method, argument, source.name, destination, payload)
    stream = _QrexecStream(call.stdout)
    reply = await dispatcher.answer(request, stream)
    if reply is not None:
        call.stdout.write(reply)
    return 0


def _destination(app: Qubes, target: str) -> str | None:
    """Return whom the policy was asked about, by UUID; None if there is no such VM."""
    word = target.replace("$", "@", 1) if target.startswith("$") else target
    if word in {"@adminvm", "@default", "dom0"}:
        return "dom0"
    if word.startswith("uuid:"):
        return word.lower()
    found = app.domains.get(word)
    return None if found is None else f"uuid:{found.uuid}"


async def _payload(call: ServiceCall) -> bytes | None:
    """Return all that the caller sends; None if that is too much or takes too long."""
    payload = bytearray()
    try:
        async with asyncio.timeout(_TIMEOUT):
            while part := await call.stdin.read(LONGEST_REQUEST):
                payload += part
                if len(payload) > LONGEST_REQUEST:
                    return None
    except TimeoutError:
        return None
    return bytes(payload)


class _QrexecStream(EventStream):
    def __init__(self, stdout: GuestWriter) -> None:
        super().__init__()
        self._stdout = stdout
        stdout.when_broken(self.close)

    def _write(self, data: bytes) -> None:
        self._stdout.write(data)

    def _backlog(self) -> int:
        return self._stdout.backlog

    def _drop(self) -> None:
        self._stdout.break_off(BrokenPipeError("the events are not read"))
