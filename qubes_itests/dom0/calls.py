"""Calls of services out of guests, by the policy of core-qrexec.

Its own package decides, in /etc/qubes/policy.d, on what the core says of its VMs; what
it allows is done as qrexec-daemon does it. Both ask qubesd, which runs in the tests.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import importlib
import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from qubes_itests.exc import DeadlineError, HarnessError
from qubes_itests.guest.link import dom0_services
from qubes_itests.guest.link.frames import NOT_FOUND
from qubes_itests.guest.link.relay import relay
from qubes_itests.limited_log import LimitedLog

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from qubes_itests.dom0.machine import Machine
    from qubes_itests.guest.link.calls import ServiceCall

    _T = TypeVar("_T")

__all__ = ["answer"]

_limited = LimitedLog(logging.getLogger("qubes_itests.dom0"))

_DISPOSABLE: Final = "@dispvm:"
#: Services of dom0 that qubesd answers, and where. For those in the first line dom0 has
#: programs, which say nothing but a status; the others are links to the socket.
_MISC: Final = ("qubes.FeaturesRequest", "qubes.NotifyTools", "qubes.NotifyUpdates")
_MISC_SOCKET: Final = "/run/qubesd.misc.sock"
_ADMIN: Final = "admin."
_ADMIN_SOCKET: Final = Path("/run/qubesd.sock")
#: How an answer of qubesd begins that is no error.
_DONE: Final = b"0\0"
#: Of another, so many bytes are shown.
_SHOWN: Final = 500
_CHUNK: Final = 65_536
#: Seconds for qubesd to answer; it may have to start a VM for that.
_TIMEOUT: Final = 300.0
#: What a caller is told, whatever the reason is.
_DENIED: Final = "Request refused"


async def answer(machine: Machine, call: ServiceCall) -> None:
    """Carry out a call, or refuse it; it has ended on return.

    :param machine: whose guest calls.
    """
    try:
        await _carry_out(machine, call)
    except (HarnessError, OSError) as error:
        _limited.warning(
            call.vm,
            "%s from %s to %s: %s",
            *(call.service, call.vm, call.target, str(error)),
        )
        await call.refuse(_DENIED)


async def _carry_out(machine: Machine, call: ServiceCall) -> None:
    fields = await _in_thread(_decide, call)
    target = fields["target"]
    if target.startswith(_DISPOSABLE):
        made = await _ask(target.removeprefix(_DISPOSABLE), "CreateDisposable")
        try:
            await _ask(made, "Start")
            await _serve(machine, call, made, fields)
        finally:
            # one that has shut down is gone
            await _ask(made, "Kill", quiet=True)
        return
    if target == "dom0":
        await _serve_in_dom0(machine, call)
        return
    guest = machine.find(target)
    if fields["autostart"] == "True" and (guest is None or not guest.is_active):
        await _ask(target, "Start")
    await _serve(machine, call, target, fields)


def _decide(call: ServiceCall) -> Mapping[str, str]:
    """Return what the policy says, in the words that qrexec-daemon gets. Blocking."""
    parser: Any = importlib.import_module("qrexec.policy.parser")
    utils: Any = importlib.import_module("qrexec.utils")
    service, _, argument = call.service.partition("+")
    request = parser.Request(
        *(service, f"+{argument}", call.vm, call.target),
        system_info=utils.get_system_info(),
    )
    said = asyncio.run(parser.FilePolicy().evaluate(request).execute())
    return dict(line.split("=", 1) for line in said.splitlines())


async def _in_thread(function: Callable[..., _T], *words: object) -> _T:
    """Call something of core-qrexec, which waits for qubesd.

    In a thread of its own: qubesd is in the thread of the tests, and what that waits
    for may want one of the loop's threads. None is waited for at the end of the run.

    :raise HarnessError: it raised something, or there was no end of it in time.
    """
    outcome: concurrent.futures.Future[_T] = concurrent.futures.Future()
    # so that a call which is cancelled leaves it alone
    outcome.set_running_or_notify_cancel()

    def run() -> None:
        try:
            outcome.set_result(function(*words))
        except Exception as error:  # noqa: BLE001 - it may raise what it likes
            reason = f"{type(error).__name__}: {error}"
            outcome.set_exception(HarnessError(reason))

    threading.Thread(target=run, name="policy", daemon=True).start()
    try:
        async with asyncio.timeout(_TIMEOUT):
            return await asyncio.wrap_future(outcome)
    except TimeoutError:
        raise DeadlineError("answer of qubesd", _TIMEOUT) from None


async def _ask(vm: str, method: str, *, quiet: bool = False) -> str:
    """Call a method of the Admin API, ``admin.vm.METHOD``, as dom0 does."""
    utils: Any = importlib.import_module("qrexec.utils")
    try:
        made: bytes = await _in_thread(utils.qubesd_call, vm, f"admin.vm.{method}")
    except HarnessError:
        if quiet:
            return ""
        raise
    return str(made, "ascii")


async def _serve_in_dom0(machine: Machine, call: ServiceCall) -> None:
    name = call.service.partition("+")[0]
    if name in _MISC:
        # these act on what the caller has in its database
        guest = machine.find(call.vm)
        if guest is not None and guest.shared is not None:
            await guest.shared.take_over()
        await call.finish(await _notify(call))
        return
    if name.startswith(_ADMIN):
        status: int | None = await dom0_services.serve_by_socket(call, _ADMIN_SOCKET)
    else:
        status = await dom0_services.serve(call)
    if status is None:
        _limited.warning(call.vm, "%s called %s, which dom0 lacks here", call.vm, name)
        status = NOT_FOUND
    await call.finish(status)


async def _notify(call: ServiceCall) -> int:
    """Tell qubesd, and return the status, as the programs of dom0 do that are for it.

    What it answers is not for the caller.
    """
    try:
        reader, writer = await asyncio.open_unix_connection(_MISC_SOCKET)
    except OSError as error:
        raise HarnessError(f"no qubesd has {_MISC_SOCKET}: {error}") from None
    answer = b""
    try:
        async with asyncio.timeout(_TIMEOUT):
            # one after the other: it answers when it has all, and takes so much
            writer.write(f"{call.service} {call.vm} name dom0\0".encode())
            while data := await call.stdin.read(_CHUNK):
                writer.write(data)
                await writer.drain()
            writer.write_eof()
            while data := await reader.read(_CHUNK):
                answer = answer or data
    except TimeoutError:
        raise DeadlineError(f"end of {call.service}", _TIMEOUT) from None
    finally:
        writer.close()
    if answer.startswith(_DONE):
        return 0
    _limited.warning(
        call.vm, "%s of %s: qubesd said %r", call.service, call.vm, answer[:_SHOWN]
    )
    return 1


async def _serve(
    machine: Machine, call: ServiceCall, name: str, fields: Mapping[str, str]
) -> None:
    guest = machine.find(name)
    if guest is None:
        raise HarnessError(f"there is no domain {name}")
    agent = await guest.agent()
    user = None if fields["user"] == "DEFAULT" else fields["user"]
    process = await agent.spawn_service(call.service, source=call.vm, user=user)
    await relay(call, process)
