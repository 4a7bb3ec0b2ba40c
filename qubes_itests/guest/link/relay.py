"""Relay between a call out of one guest and a process in another."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from qubes_itests.guest.exc import GuestGoneError
from qubes_itests.guest.link.frames import GONE, Channel
from qubes_itests.limited_log import LimitedLog
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from qubes_itests.guest.link.calls import ServiceCall
    from qubes_itests.guest.link.process import GuestProcess
    from qubes_itests.guest.link.streams import GuestReader, GuestWriter

__all__ = ["relay"]

_limited = LimitedLog(logging.getLogger("qubes_itests.guest"))

_CHUNK: Final = 262_144
#: Of a service's stderr so much is logged; the rest is dropped.
_STDERR_LOGGED: Final = 4096


async def relay(call: ServiceCall, process: GuestProcess) -> int:
    """Pass bytes both ways until the process ends, then end the call with its status.

    A slow reader at one end slows down the writer at the other. A reader that stops,
    and a stream that is closed, is passed on; stderr of the process is logged.
    When the caller's guest goes away the process sees its peer hang up; when the
    process's guest goes away the call ends with status 255.

    :param call: not ended yet.
    :param process: its streams used by nobody else.
    :return: the exit status that the caller got.
    """
    # STOP goes on at once. A pump learns of it only with its next write, and the
    # writer at the far end may wait for a reader and send nothing before.
    process.stdin.when_broken(call.stdin.stop)
    output = process.reader(Channel.STDOUT)
    call.stdout.when_broken(output.stop)
    pumps = [
        asyncio.ensure_future(pump)
        for pump in (
            _pump(call.stdin, process.stdin),
            _pump(output, call.stdout),
            _log_stderr(process),
        )
    ]
    try:
        try:
            status = await process.wait()
        except GuestGoneError as error:
            # as text: who keeps the record would keep the error, and so the VMs
            _limited.warning(
                call.vm,
                "%s, called by %s, ended: %s",
                call.service,
                call.vm,
                str(error),
            )
            status = GONE
        # EXIT of a call must be the last of it, so all that the process wrote goes
        # first; also what came from a guest that then went away
        await pumps[1]
        if process.failure:
            await call.refuse(process.failure, exit_code=status)
        else:
            await call.finish(status)
        return status
    finally:
        process.hang_up()
        for pump in pumps:
            pump.cancel()
        # cancelled pumps still use the streams of both; who ended the call may let go
        # of them only now
        await asyncio.wait(pumps)


async def _pump(reader: GuestReader, writer: GuestWriter) -> None:
    try:
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()
    except (BrokenPipeError, GuestGoneError):
        # nobody takes what comes from here: its writer shall get SIGPIPE, not wait
        reader.stop()
    # the half-close goes on alone: a filter answers only when its input has ended
    if not writer.is_closing():
        writer.write_eof()


async def _log_stderr(process: GuestProcess) -> None:
    room = _STDERR_LOGGED
    try:
        while data := await process.stderr.read(_CHUNK):
            if room > 0:
                text = safe_text(data[:room])
                _limited.info(
                    process.vm,
                    "stderr of %s in %s: %s",
                    process.command,
                    process.vm,
                    text,
                )
                room -= len(data)
    except GuestGoneError:
        return
